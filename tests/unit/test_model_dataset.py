from pathlib import Path

import pytest
import torch

from model import dataset, omniglot
from model.drawings import DataError, Dataset
from tests.unit import fake_omniglot as fake


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake.root(tmp_path_factory.mktemp("data"))


def times(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]}


@pytest.fixture(scope="module")
def before(root: Path) -> dict[Path, int]:
    """The data root as it was before anything was loaded."""
    return times(root)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def data(root: Path, before: dict[Path, int], home: Path) -> Dataset:
    return dataset.load(105, data_root=root, home=home, notify=lambda line: None)


def quiet(line: str) -> None:
    raise AssertionError(f"nothing was to be said: {line}")


def test_the_split_is_the_papers(data: Dataset) -> None:
    assert data.name == "omniglot"
    assert (data.train.images.shape, data.train.drawers) == (torch.Size([964, 12, 105, 105]), 12)
    assert set(data.train.alphabets) == set(omniglot.BACKGROUND)
    assert set(data.test.alphabets) == set(omniglot.LAKE)
    assert set(data.validation.alphabets) == set(omniglot.EVALUATION) - set(omniglot.LAKE)
    assert (len(data.validation.alphabets), data.validation.drawers) == (10, 4)
    assert (len(data.test.alphabets), data.test.drawers) == (10, 4)


@pytest.mark.parametrize(("part", "drawers"), [("train", (1, 12)), ("validation", (13, 16)), ("test", (17, 20))])
def test_every_drawing_is_that_of_its_alphabet_character_and_drawer(
    data: Dataset, part: str, drawers: tuple[int, int]
) -> None:
    drawings = getattr(data, part)
    counts = omniglot.BACKGROUND if part == "train" else omniglot.EVALUATION
    assert drawings.drawers == drawers[1] - drawers[0] + 1
    for c, name in enumerate(drawings.characters):
        alphabet, _, character = name.partition("/character")
        assert drawings.alphabets[drawings.alphabet[c]] == alphabet
        for d in range(drawings.drawers):
            expected = fake.number(counts, alphabet, int(character), drawers[0] + d)
            assert fake.number_of(drawings.images[c, d].numpy()) == expected


def test_without_data_one_line_says_so_and_strokes_are_used(tmp_path: Path) -> None:
    for data_root in (None, tmp_path / "nothing"):
        lines: list[str] = []
        loaded = dataset.load(28, data_root=data_root, home=tmp_path / "home", notify=lines.append)
        assert loaded.name == "strokes"
        assert len(lines) == 1
        assert "\n" not in lines[0]
        for part in ("no Omniglot", "whetstone data fetch", "WHETSTONE_DATA", "built-in stroke characters"):
            assert part in lines[0]


def test_omniglot_asked_for_and_absent_is_a_fault_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"images_background\.zip is not there.*whetstone data fetch.*WHETSTONE_DATA"):
        dataset.load(28, source="omniglot", data_root=tmp_path, home=tmp_path, notify=quiet)
    with pytest.raises(DataError, match="WHETSTONE_DATA is not set"):
        dataset.load(28, source="omniglot", data_root=None, home=tmp_path, notify=quiet)


def test_damaged_data_is_never_replaced_by_strokes_in_silence(tmp_path: Path) -> None:
    root = fake.root(tmp_path / "data")
    path = root / omniglot.FOLDER / "images_evaluation.zip"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"images_evaluation\.zip: damaged"):
        dataset.load(28, source="auto", data_root=root, home=tmp_path / "home", notify=lambda line: None)


def test_strokes_asked_for_are_given_beside_real_data(root: Path, tmp_path: Path) -> None:
    assert dataset.load(28, source="strokes", data_root=root, home=tmp_path, notify=quiet).name == "strokes"
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_under_the_data_root(data: Dataset, root: Path, before: dict[Path, int]) -> None:
    assert data.name == "omniglot"
    assert times(root) == before


def test_a_size_or_a_source_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    for size in (0, -1, 421):
        with pytest.raises(ValueError, match="1 to 420 pixels"):
            dataset.load(size, data_root=None, home=tmp_path, notify=quiet)
    with pytest.raises(ValueError, match="auto, omniglot, strokes, mnist or folder"):
        dataset.load(28, source="emnist", data_root=None, home=tmp_path, notify=quiet)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"1 channel .* or 3"):
        dataset.load(28, channels=2, data_root=None, home=tmp_path, notify=quiet)
    with pytest.raises(ValueError, match="data: folder needs `folder`"):
        dataset.load(28, source="folder", data_root=tmp_path, home=tmp_path, notify=quiet)


def test_any_data_is_given_in_three_channels(root: Path, data: Dataset, home: Path, tmp_path: Path) -> None:
    shown = dataset.load(105, channels=3, data_root=root, home=home, notify=quiet)
    assert (shown.channels, data.channels) == (3, 1)
    assert shown.validation.images.shape == (data.validation.images.shape[0], 4, 3, 105, 105)
    assert all(torch.equal(shown.test.flat[:, channel], data.test.flat) for channel in range(3))
    assert dataset.load(8, source="strokes", channels=3, data_root=None, home=tmp_path, notify=quiet).channels == 3


def test_mnist_asked_for_and_absent_is_a_fault_with_a_remedy(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no MNIST: .*train-images-idx3-ubyte\.gz is not there.*whetstone data fetch"):
        dataset.load(28, source="mnist", data_root=root, home=tmp_path, notify=quiet)
