"""A P x K batch holds the drawings and the pairs that it promises, each as likely as any other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.batch import Batch
from model.drawings import DataError, Drawings
from model.pxk import CharacterBatches

DRAWERS = 5


def make(*sizes: int, drawers: int = DRAWERS) -> Drawings:
    count = sum(sizes)
    return Drawings(
        torch.zeros(count, drawers, 2, 2, dtype=torch.uint8),
        torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)),
        tuple(f"A{i}" for i in range(len(sizes))),
        tuple(f"c{i}" for i in range(count)),
    )


DRAWINGS = make(4, 9, 3, 6, 5)


def source(drawings: Drawings = DRAWINGS, same_alphabet: bool = True, alphabets: int = 2) -> CharacterBatches:
    return CharacterBatches(
        drawings, characters=8, per_character=3, alphabets=alphabets, negatives=2, same_alphabet=same_alphabet
    )


def many(times: int = 50, same_alphabet: bool = True, seed: int = 0) -> list[Batch]:
    batches, generator = source(same_alphabet=same_alphabet), torch.Generator().manual_seed(seed)
    return [batches.draw(generator, step) for step in range(times)]


def character(batch: Batch, position: Tensor) -> Tensor:
    return batch.images[position] // DRAWERS


def test_p_characters_in_equal_numbers_from_each_alphabet_by_k_people_each() -> None:
    for batch in many():
        images = batch.images.view(8, 3)
        own, hands = images // DRAWERS, images % DRAWERS
        assert (own == own[:, :1]).all()
        assert len(own[:, 0].unique()) == 8
        assert all(len(row.unique()) == 3 for row in hands)
        of = DRAWINGS.alphabet[own[:, 0]]
        assert (of[:4] == of[0]).all()
        assert (of[4:] == of[4]).all()
        assert of[0] != of[4]


@pytest.mark.parametrize("same_alphabet", [True, False])
def test_each_two_drawings_of_a_character_are_a_pair_with_its_own_negatives(same_alphabet: bool) -> None:
    crossing = 0
    for batch in many(same_alphabet=same_alphabet):
        positives = batch.positives
        assert positives == 8 * 3
        assert len(batch.first) == len(batch.second) == positives * (1 + 2)
        assert (batch.same == 1).nonzero().flatten().tolist() == list(range(positives))
        pairs = {frozenset(pair) for pair in zip(batch.first.tolist(), batch.second.tolist(), strict=True)}
        wanted = {frozenset((3 * p + i, 3 * p + j)) for p in range(8) for i, j in ((0, 1), (0, 2), (1, 2))}
        assert {pair for pair in pairs if len({p // 3 for p in pair}) == 1} == wanted
        first, second = character(batch, batch.first), character(batch, batch.second)
        assert torch.equal(first == second, batch.same == 1)
        assert torch.equal(batch.first[positives:], batch.first[:positives].repeat_interleave(2))
        crossing += int((DRAWINGS.alphabet[first] != DRAWINGS.alphabet[second]).sum())
    assert (crossing > 0) is not same_alphabet


def test_weights_add_up_to_one_half_for_each_kind() -> None:
    (batch,) = many(1)
    assert batch.weight[: batch.positives].sum().item() == pytest.approx(0.5)
    assert batch.weight[batch.positives :].sum().item() == pytest.approx(0.5)
    assert len(batch.weight[: batch.positives].unique()) == len(batch.weight[batch.positives :].unique()) == 1


def test_every_alphabet_character_drawing_and_negative_is_as_likely_as_any_other() -> None:
    batches = many(3000)
    of = torch.stack([DRAWINGS.alphabet[batch.images // DRAWERS] for batch in batches])
    chosen = torch.bincount(of.flatten(), minlength=5) / of.numel()
    assert chosen[2] == 0, "an alphabet of 3 cannot give 4 characters"
    assert (chosen[[0, 1, 3, 4]] - 0.25).abs().max() < 0.02
    images = torch.bincount(torch.cat([batch.images for batch in batches]), minlength=27 * DRAWERS)
    for alphabet in (0, 1, 3, 4):
        members = (DRAWINGS.alphabet == alphabet).nonzero().flatten()
        share = images.view(27, DRAWERS)[members] / images.view(27, DRAWERS)[members].sum()
        assert (share * share.numel() - 1).abs().max() < 0.15
    # Among the three other characters of the half, and their three drawings, by place.
    positives = batches[0].positives
    apart = torch.stack([batch.second[positives:] - batch.first[positives:] // 12 * 12 for batch in batches])
    for anchor in range(4):
        ours = apart[:, (batches[0].first[positives:] // 3) == anchor]
        share = torch.bincount(ours.flatten(), minlength=12).view(4, 3) / ours.numel()
        assert (share[anchor] == 0).all()
        assert (share[torch.arange(4) != anchor] * 9 - 1).abs().max() < 0.1


def test_with_other_alphabets_allowed_a_negative_is_any_other_character() -> None:
    batches = many(1000, same_alphabet=False)
    positives = batches[0].positives
    first = batches[0].first[positives:] // 3
    second = torch.stack([batch.second[positives:] // 3 for batch in batches])
    for anchor in range(8):
        share = torch.bincount(second[:, first == anchor].flatten(), minlength=8) / second[:, first == anchor].numel()
        assert share[anchor] == 0
        assert (share[torch.arange(8) != anchor] * 7 - 1).abs().max() < 0.1


def test_the_same_generator_gives_the_same_batches_and_leaves_the_global_one_alone() -> None:
    before = torch.get_rng_state()
    one, same, other = many(5), many(5), many(5, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert all(
        torch.equal(a.images, b.images) and torch.equal(a.second, b.second) for a, b in zip(one, same, strict=True)
    )
    assert not any(torch.equal(a.images, b.images) for a, b in zip(one, other, strict=True))


def test_a_batch_in_which_everything_is_compared_comes_whole() -> None:
    (batch,) = many(1)
    ((part, places),) = batch.parts(4)
    assert part is batch
    assert places.tolist() == list(range(len(batch)))


def test_what_cannot_give_such_batches_is_refused_with_the_settings_to_change() -> None:
    with pytest.raises(DataError, match=r"setting drawings\): there are 2"):
        source(make(8, 8, drawers=2))
    with pytest.raises(DataError, match=r"of 3 to train on, 1 have so many; set characters and alphabets"):
        source(make(4, 3, 3))
    source(make(4, 4, 3, drawers=3)).draw(torch.Generator().manual_seed(0))
