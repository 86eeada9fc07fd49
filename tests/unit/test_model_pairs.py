import pytest
import torch

from model.drawings import DataError, Drawings
from model.pairs import PairSampler


def make(sizes: tuple[int, ...], drawers: int = 3) -> Drawings:
    count = sum(sizes)
    return Drawings(
        torch.zeros(count, drawers, 2, 2, dtype=torch.uint8),
        torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)),
        tuple(f"A{i}" for i in range(len(sizes))),
        tuple(f"c{i}" for i in range(count)),
    )


def many(drawings: Drawings, batch: int = 64, same_alphabet: bool = True, seed: int = 0, times: int = 200):
    sampler, generator = PairSampler(drawings, batch, same_alphabet), torch.Generator().manual_seed(seed)
    batches = [sampler.draw(generator) for _ in range(times)]
    return tuple(torch.stack(column) for column in zip(*batches, strict=True))


@pytest.mark.parametrize("same_alphabet", [True, False])
def test_half_of_every_batch_is_the_same_character_and_always_by_two_people(same_alphabet: bool) -> None:
    first, second, same = many(make((4, 2, 7)), same_alphabet=same_alphabet)
    assert (same.sum(1) == 32).all()
    assert torch.equal(first // 3 == second // 3, same == 1)
    assert (first % 3 != second % 3).all()


def test_different_pairs_stay_within_an_alphabet_when_told_so() -> None:
    drawings = make((4, 2, 7))
    for same_alphabet, crosses in ((True, False), (False, True)):
        first, second, _ = many(drawings, same_alphabet=same_alphabet)
        crossing = drawings.alphabet[first // 3] != drawings.alphabet[second // 3]
        assert bool(crossing.any()) is crosses


def test_every_drawing_appears_on_both_sides_and_every_alphabet_equally_often() -> None:
    drawings = make((4, 2, 7))
    first, second, _ = many(drawings)
    assert len(first.unique()) == len(second.unique()) == len(drawings)
    share = torch.bincount(drawings.alphabet[first.flatten() // 3]) / first.numel()
    assert torch.allclose(share, torch.full((3,), 1 / 3), atol=0.02)


def test_an_alphabet_of_one_character_gives_no_different_pair_and_is_left_out() -> None:
    drawings = make((1, 5))
    first, _, _ = many(drawings)
    assert (first // 3 != 0).all()
    first, _, _ = many(drawings, same_alphabet=False)
    assert (first // 3 == 0).any()


def test_the_same_generator_state_gives_the_same_pairs() -> None:
    drawings = make((4, 2, 7))
    for one, other in zip(many(drawings, seed=5), many(drawings, seed=5), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(many(drawings, seed=5)[0], many(drawings, seed=6)[0])


def test_an_odd_batch_holds_one_more_same_pair_and_any_prefix_both_kinds() -> None:
    _, _, same = PairSampler(make((4,)), 5).draw(torch.Generator().manual_seed(0))
    assert same.tolist() == [1, 0, 1, 0, 1]


def test_what_cannot_give_pairs_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 pairs"):
        PairSampler(make((4,)), 1)
    with pytest.raises(DataError, match="2 people"):
        PairSampler(make((4,), drawers=1), 8)
    with pytest.raises(DataError, match="one alphabet"):
        PairSampler(make((1, 1)), 8)
    PairSampler(make((1, 1)), 8, same_alphabet=False).draw(torch.Generator().manual_seed(0))
