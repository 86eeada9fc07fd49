"""A fixed training set is the paper's: equal shares, each copy once a pass, decided by the seed alone."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from model.batch import Batch
from model.distortion import IDENTITY, clean, warp
from model.fixed import FixedPairs
from tests.unit.test_model_pxk import DRAWERS, make

DRAWINGS = make(4, 9, 1, 6)
USABLE = (0, 1, 3)


def stream(seed: int) -> dict[str, torch.Generator]:
    class Streams(dict[str, torch.Generator]):
        def __missing__(self, purpose: str) -> torch.Generator:
            return torch.Generator().manual_seed(sum(map(ord, purpose)) * 1000 + seed)

    return Streams()


def pairs(count: int = 24, batch: int = 10, copies: int = 2, seed: int = 0, same_alphabet: bool = True) -> FixedPairs:
    return FixedPairs(
        DRAWINGS, count, batch, copies=copies, same_alphabet=same_alphabet, stream=stream(seed).__getitem__
    )


def draw(source: FixedPairs, step: int, generator: int = 0) -> Batch:
    return source.draw(torch.Generator().manual_seed(generator), step)


def seen(batch: Batch) -> list[tuple[int, int, bytes]]:
    """What a batch shows of each pair: two images, and both distortions."""
    pair = len(batch.same)
    matrices = batch.matrices if batch.matrices is not None else IDENTITY.expand(2 * pair, 2, 3)
    first, second = batch.images[:pair].tolist(), batch.images[pair:].tolist()
    return [(first[i], second[i], matrices[[i, pair + i]].numpy().tobytes()) for i in range(pair)]


@pytest.mark.parametrize("count", [24, 600])
def test_every_alphabet_gives_the_same_number_of_pairs_of_each_kind(count: int) -> None:
    source = pairs(count, copies=0)
    assert torch.equal(source.first // DRAWERS == source.second // DRAWERS, source.same == 1)
    assert (source.first % DRAWERS != source.second % DRAWERS).all()
    of = DRAWINGS.alphabet[source.first // DRAWERS]
    assert torch.equal(of, DRAWINGS.alphabet[source.second // DRAWERS])
    for kind in (0, 1):
        shares = torch.bincount(of[source.same == kind], minlength=4)[list(USABLE)]
        assert shares.sum() == count // 2
        assert shares.max() - shares.min() <= 1


def test_other_alphabets_may_meet_when_told_so() -> None:
    source = pairs(600, same_alphabet=False)
    of = DRAWINGS.alphabet
    assert (of[source.first // DRAWERS] != of[source.second // DRAWERS]).any()
    assert torch.bincount(of[source.first // DRAWERS], minlength=4).tolist() == [150] * 4


@pytest.mark.parametrize("batch", [1, 7, 10, 72, 100])
def test_a_pass_takes_each_copy_of_each_pair_exactly_once_and_wraps_within_a_batch(batch: int) -> None:
    source = pairs(24, batch)
    assert len(source) == 72
    shown: list[tuple[int, int, bytes]] = []
    step = 0
    while len(shown) < 3 * 72:
        drawn = draw(source, step)
        assert len(drawn) == 2 * batch
        shown += seen(drawn)
        step += 1
    passes = [shown[72 * p : 72 * (p + 1)] for p in range(3)]
    for one in passes:
        assert Counter(one) == Counter(passes[0])
        assert max(Counter(one).values()) == 1
    assert passes[0] != passes[1] != passes[2], "each in an order of its own"


def test_of_each_pair_one_copy_is_as_it_was_drawn_and_the_others_keep_their_distortion() -> None:
    source = pairs(24, 72)
    drawn = draw(source, 0)
    assert drawn.matrices is not None
    plain = (drawn.matrices == IDENTITY).flatten(1).all(1)
    both = plain[:72] & plain[72:]
    chosen = Counter(zip(drawn.images[:72][both].tolist(), drawn.images[72:][both].tolist(), strict=True))
    assert chosen.total() >= 24
    assert chosen.keys() == set(zip(source.first.tolist(), source.second.tolist(), strict=True))
    again = draw(source, 1)
    assert Counter(seen(drawn)) == Counter(seen(again))
    assert not torch.equal(drawn.matrices[:72], drawn.matrices[72:]), "the two images of a pair separately"


def test_the_labels_follow_the_pairs_through_every_order() -> None:
    source = pairs()
    for step in range(20):
        batch = draw(source, step)
        assert torch.equal(batch.images[:10] // DRAWERS == batch.images[10:] // DRAWERS, batch.same == 1)
        assert batch.weight.sum().item() == pytest.approx(1.0)


def test_a_step_s_batch_depends_on_the_seed_and_the_step_alone() -> None:
    """Not on the generator of the training, nor on what was drawn before: a resumed run goes on in mid-pass."""
    source = pairs()
    told = [seen(draw(source, step, generator=step)) for step in range(20)]
    for step in (19, 0, 7, 8, 15):
        assert seen(draw(pairs(), step, generator=99)) == told[step]
        assert seen(draw(source, step)) == told[step]
    assert seen(draw(pairs(seed=1), 0)) != told[0]
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    source.draw(generator, 0)
    assert torch.equal(before, generator.get_state())


def test_without_copies_nothing_is_distorted_and_nothing_resampled() -> None:
    source = pairs(24, 10, copies=0)
    assert len(source) == 24
    assert draw(source, 0).matrices is None


def test_the_copy_that_is_not_distorted_looks_as_it_was_drawn() -> None:
    images = torch.randint(0, 256, (4, 28, 28), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    torch.testing.assert_close(warp(images, IDENTITY.expand(4, 2, 3)), clean(images), atol=1e-4, rtol=0)


def test_parts_of_a_batch_keep_their_distortions() -> None:
    batch = draw(pairs(), 2)
    shown = [pair for part, _ in batch.parts(3) for pair in seen(part)]
    assert shown == seen(batch)
