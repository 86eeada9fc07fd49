import pytest
import torch

from model.drawings import DataError, Dataset, Drawings, rotated


def make() -> Drawings:
    images = torch.arange(5 * 3, dtype=torch.uint8).view(5, 3, 1, 1).expand(5, 3, 4, 4).contiguous()
    return Drawings(images, torch.tensor([0, 0, 1, 2, 2]), ("A", "B", "C"), ("A/1", "A/2", "B/1", "C/1", "C/2"))


def test_the_flat_index_of_a_drawing_is_character_times_drawers_plus_drawer() -> None:
    drawings = make()
    assert drawings.flat.shape == (15, 4, 4)
    for c in range(5):
        for d in range(3):
            assert torch.equal(drawings.flat[c * 3 + d], drawings.images[c, d])
    assert drawings.flat.data_ptr() == drawings.images.data_ptr()


def test_selecting_keeps_characters_and_their_alphabets_together() -> None:
    chosen = make().select(alphabets=["C", "A"], drawers=[2, 0])
    assert chosen.alphabets == ("C", "A")
    assert chosen.characters == ("C/1", "C/2", "A/1", "A/2")
    assert chosen.alphabet.tolist() == [0, 0, 1, 1]
    assert chosen.images[:, :, 0, 0].tolist() == [[11, 9], [14, 12], [2, 0], [5, 3]]


def test_selecting_nothing_in_particular_changes_nothing() -> None:
    drawings = make()
    assert torch.equal(drawings.select().images, drawings.images)


@pytest.mark.parametrize(
    ("asked", "named"), [({"alphabets": ["A", "Z"]}, "Z"), ({"drawers": [0, 3]}, "0 to 2"), ({"drawers": []}, "0 to 2")]
)
def test_selecting_what_is_not_there_is_refused_by_name(asked: dict, named: str) -> None:
    with pytest.raises(DataError, match=named):
        make().select(**asked)


def colour() -> Drawings:
    grey = make()
    images = torch.stack([grey.images, grey.images + 50, grey.images + 100], dim=2)
    return Drawings(images, grey.alphabet, grey.alphabets, grey.characters)


def test_colour_has_three_channels_and_the_same_flat_index() -> None:
    drawings = colour()
    assert (drawings.channels, make().channels) == (3, 1)
    assert (len(drawings), drawings.drawers, drawings.size) == (15, 3, 4)
    assert drawings.flat.shape == (15, 3, 4, 4)
    assert torch.equal(drawings.flat[7], drawings.images[2, 1])
    assert drawings.flat.data_ptr() == drawings.images.data_ptr()
    chosen = drawings.select(alphabets=["C"], drawers=[1])
    assert chosen.images[:, :, :, 0, 0].tolist() == [[[10, 60, 110]], [[13, 63, 113]]]
    assert drawings.to("cpu").channels == 3


def test_grey_shown_in_colour_is_the_same_three_times_and_takes_no_memory() -> None:
    grey = make()
    shown = Dataset(grey, grey, grey, "strokes", 4).coloured()
    assert shown.channels == 3
    assert shown.train.flat.shape == (15, 3, 4, 4)
    assert all(torch.equal(shown.test.flat[:, channel], grey.flat) for channel in range(3))
    assert shown.train.flat.data_ptr() == grey.images.data_ptr()
    already = colour()
    assert already.coloured() is already


def test_turned_characters_are_further_characters_in_alphabets_of_their_turn() -> None:
    images = torch.zeros(5, 3, 4, 4, dtype=torch.uint8)
    images[:, :, 0, 3] = torch.arange(1, 6, dtype=torch.uint8)[:, None]  # ink at the upper right
    before = Drawings(images, *(getattr(make(), name) for name in ("alphabet", "alphabets", "characters")))
    after = rotated(before)
    assert torch.equal(after.images[:5], images)
    assert after.images.shape == (20, 3, 4, 4)
    assert after.images.dtype == torch.uint8
    assert after.images.sum() == 4 * images.sum()
    for turn, corner in enumerate([(0, 3), (0, 0), (3, 0), (3, 3)]):  # counter-clockwise
        assert after.images[5 * turn : 5 * turn + 5, 1, corner[0], corner[1]].tolist() == [1, 2, 3, 4, 5]
    assert after.alphabets[3:] == ("A@90", "B@90", "C@90", "A@180", "B@180", "C@180", "A@270", "B@270", "C@270")
    assert after.characters[:6] == (*before.characters, "A@90/1")
    for c, name in enumerate(after.characters):
        assert after.alphabets[after.alphabet[c]] == name.partition("/")[0]


def test_colour_turns_in_the_plane_alone() -> None:
    after = rotated(colour())
    assert after.images.shape == (20, 3, 3, 4, 4)
    assert after.images[5:, :, :, 0, 0].tolist() == colour().images[:, :, :, 0, 0].tolist() * 3
