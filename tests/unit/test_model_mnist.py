import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from model import dataset, mnist
from model.drawings import DataError
from model.mnist import FOLDER, Counts

REAL = os.environ.get("WHETSTONE_DATA")
TINY = Counts(train_file=120, test_file=60, train=5, validation=3, test=4)

real = pytest.mark.skipif(
    not REAL or not Path(REAL, FOLDER).is_dir(), reason="WHETSTONE_DATA names no folder with MNIST/raw"
)


def idx(values: np.ndarray) -> bytes:
    header = b"\0\0\x08" + bytes([values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    return header + values.astype(np.uint8).tobytes()


def number(images: torch.Tensor) -> list[int]:
    """The place in its file that each image of the tiny set shows in its first pixel."""
    return images[..., 0, 0].flatten().tolist()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A small MNIST: image i of a file is filled with i, and shows the digit i modulo 10."""
    folder = tmp_path / FOLDER
    folder.mkdir(parents=True)
    for part, count in (("train", TINY.train_file), ("t10k", TINY.test_file)):
        images = np.broadcast_to(np.arange(count)[:, None, None], (count, 28, 28))
        for name, content in (("images-idx3", images), ("labels-idx1", np.arange(count) % 10)):
            (folder / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(idx(content)))
    return tmp_path


def test_the_parts_are_the_first_images_of_each_digit_in_the_order_of_the_file(root: Path) -> None:
    data = mnist.load(root, 28, TINY)
    assert (data.name, data.size, data.channels) == ("mnist", 28, 1)
    for part, start, drawers in ((data.train, 0, 5), (data.validation, 5, 3), (data.test, 0, 4)):
        assert part.images.shape == (10, drawers, 28, 28)
        assert part.alphabets == ("MNIST",)
        assert part.alphabet.tolist() == [0] * 10
        assert part.characters == tuple(f"MNIST/{digit}" for digit in range(10))
        for digit in range(10):
            assert number(part.images[digit]) == [digit + 10 * (start + d) for d in range(drawers)]


@pytest.mark.filterwarnings("error")  # torch warns of memory that must not be written to
def test_the_test_images_are_the_whole_file_with_its_digits(root: Path) -> None:
    images, labels = mnist.test_images(root, 28, TINY)
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    assert number(images) == list(range(60))
    assert labels.tolist() == [i % 10 for i in range(60)]


def test_unpacked_files_serve_where_the_packed_ones_are_gone_or_damaged(root: Path) -> None:
    packed = root / FOLDER / "train-images-idx3-ubyte.gz"
    expected = mnist.load(root, 28, TINY).train.images
    packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.write_bytes(packed.read_bytes()[:-20])
    assert torch.equal(mnist.load(root, 28, TINY).train.images, expected)
    whole = packed.with_suffix("").read_bytes()
    packed.with_suffix("").write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz is damaged"):
        mnist.load(root, 28, TINY)
    packed.with_suffix("").write_bytes(whole)
    packed.unlink()
    assert torch.equal(mnist.load(root, 28, TINY).train.images, expected)


def test_a_missing_file_is_named_with_what_to_do(root: Path) -> None:
    (root / FOLDER / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte\.gz is not there.*whetstone data fetch"):
        mnist.load(root, 28, TINY)
    with pytest.raises(DataError, match=r"WHETSTONE_DATA is not set; run `whetstone data fetch`"):
        mnist.load(None, 28, TINY)


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("train-images-idx3", idx(np.zeros((120, 28, 28)))[:-1], "cut short"),
        ("train-images-idx3", idx(np.zeros((120, 28, 28))) + b"\0", "too long"),
        ("train-images-idx3", idx(np.zeros((120, 28, 27))), "holds 120 x 28 x 27; expected 120 x 28 x 28"),
        ("train-images-idx3", idx(np.zeros(120)), "does not begin as an idx file of 3 dimensions"),
        ("train-images-idx3", b"", "does not begin"),
        ("train-images-idx3", idx(np.zeros((120, 28, 28)))[:10], "expected 120 x 28 x 28"),
        ("t10k-labels-idx1", idx(np.zeros(59)), "holds 59; expected 60"),
        ("t10k-labels-idx1", idx(np.full(60, 10)), "holds the label 10"),
        ("train-labels-idx1", idx(np.arange(120) % 9), "names 0 images of the digit 9; expected at least 8"),
    ],
    ids=range(9),
)
def test_a_file_that_is_not_mnists_is_named_with_what_is_wrong(
    root: Path, name: str, content: bytes, fault: str
) -> None:
    (root / FOLDER / f"{name}-ubyte.gz").write_bytes(gzip.compress(content))
    with pytest.raises(DataError, match=rf"{name}-ubyte\.gz.*{fault}.*Remove it and run `whetstone data fetch`") as e:
        mnist.load(root, 28, TINY)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda packed: packed[:-30],
        lambda packed: packed[:40],
        lambda packed: packed[:10] + b"\xff" * 20 + packed[30:],
        lambda packed: packed[:-8] + b"\0" * 8,
        lambda packed: b"no gzip",
    ],
    ids=range(5),
)
def test_a_file_that_does_not_unpack_is_named(root: Path, spoil) -> None:
    path = root / FOLDER / "train-images-idx3-ubyte.gz"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz is damaged.*whetstone data fetch"):
        mnist.load(root, 28, TINY)


def test_any_size_is_given(root: Path) -> None:
    for size in (14, 35):
        data = mnist.load(root, size, TINY)
        assert data.size == data.validation.size == size
        assert number(data.test.images[3]) == [3, 13, 23, 33]
        assert mnist.test_images(root, size, TINY)[0].shape == (60, size, size)


@real
def test_the_real_files_give_the_parts_as_documented() -> None:
    data = dataset.load(35, source="mnist", data_root=Path(str(REAL)), home=Path("unused"), notify=pytest.fail)
    assert data.name == "mnist"
    assert [p.images.shape for p in (data.train, data.validation, data.test)] == [
        (10, drawers, 35, 35) for drawers in (5000, 400, 892)
    ]
    images, labels = mnist.test_images(Path(str(REAL)), 35)
    assert images.shape == (10_000, 35, 35)
    assert labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert torch.equal(data.test.images[5], images[labels == 5])
    # The digits are what their labels say: a test image lies nearest to the mean of its own digit, mostly.
    means = data.train.images.float().mean(1).flatten(1)
    nearest = torch.cdist(images.flatten(1).float(), means).argmin(1)
    assert (nearest == labels).float().mean() > 0.8
    assert not any(
        torch.equal(data.validation.images[d, 0], image) for d in range(10) for image in data.train.images[d, -50:]
    )
