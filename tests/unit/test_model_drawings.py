import pytest
import torch

from model.drawings import DataError, Drawings


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
