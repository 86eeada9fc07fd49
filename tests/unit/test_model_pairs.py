import pytest
import torch

from model.drawings import DataError, Drawings
from model.pairs import PairBatches, PairSampler, TripletBatches


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


@pytest.mark.parametrize("same_alphabet", [True, False])
def test_a_triplet_is_a_pair_of_each_kind_with_one_anchor(same_alphabet: bool) -> None:
    drawings = make((4, 2, 7))
    batches = TripletBatches(PairSampler(drawings, 16, same_alphabet))
    generator, crossing = torch.Generator().manual_seed(0), 0
    for step in range(50):
        batch = batches.draw(generator, step)
        assert batch.triplets is not None
        anchor, positive, negative = batch.images[batch.triplets].unbind(1)
        assert torch.equal(anchor // 3, positive // 3)
        assert (anchor // 3 != negative // 3).all()
        assert (anchor % 3 != positive % 3).all()
        assert torch.equal(positive % 3, negative % 3), "the hand must not tell which is which"
        crossing += int((drawings.alphabet[anchor // 3] != drawings.alphabet[negative // 3]).sum())
    assert (crossing > 0) is not same_alphabet


@pytest.mark.parametrize("same_alphabet", [True, False])
def test_the_other_character_and_the_other_hand_are_any_other_equally_often(same_alphabet: bool) -> None:
    """Of five characters in one alphabet and two in another; a modulo gone wrong would favour the neighbours."""
    drawings = make((5, 2), drawers=4)
    first, second, same = many(drawings, same_alphabet=same_alphabet, times=1500)
    ones, others = first[same == 0] // 4, second[same == 0] // 4
    met = torch.zeros(7, 7).index_put((ones, others), torch.ones(()), accumulate=True)
    assert not met.diagonal().any()
    for character in range(7):
        allowed = [c for c in range(7) if c != character and (not same_alphabet or (c < 5) == (character < 5))]
        share = met[character] / met[character].sum()
        assert share[allowed].sum() == pytest.approx(1.0)
        assert (share[allowed] * len(allowed) - 1).abs().max() < 0.1
    hands = torch.zeros(4, 4).index_put((first.flatten() % 4, second.flatten() % 4), torch.ones(()), accumulate=True)
    hands /= hands.sum()
    assert not hands.diagonal().any()
    assert (hands[~torch.eye(4, dtype=torch.bool)] * 12 - 1).abs().max() < 0.05


@pytest.mark.parametrize("batch", [7, 8, 9, 60])
def test_equal_shares_take_the_alphabets_in_turn(batch: int) -> None:
    drawings = make((4, 1, 7, 2))
    sampler = PairSampler(drawings, batch)
    first, second, same = sampler.draw(torch.Generator().manual_seed(0), equal_shares=True)
    of = drawings.alphabet[first // 3]
    assert torch.equal(of, drawings.alphabet[second // 3])
    for kind in (0, 1):
        shares = torch.bincount(of[same == kind], minlength=4)[[0, 2, 3]]
        assert shares.max() - shares.min() <= 1
    assert torch.equal(first // 3 == second // 3, same == 1)


def test_a_batch_of_pairs_weighs_them_alike_and_adds_up_to_one() -> None:
    batch = PairBatches(PairSampler(make((4, 2)), 24)).draw(torch.Generator().manual_seed(0))
    assert len(batch.weight.unique()) == 1
    assert batch.weight.sum().item() == pytest.approx(1.0)
    one, other = batch.images[batch.first], batch.images[batch.second]
    assert torch.equal(one // 3 == other // 3, batch.same == 1)
    assert torch.equal(torch.cat([batch.first, batch.second]), torch.arange(48))
