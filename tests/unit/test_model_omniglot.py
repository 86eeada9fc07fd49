import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from model import omniglot
from model.drawings import DataError
from tests.unit import fake_omniglot as fake

COUNTS = {"Greek": 3, "Latin": 2}
REAL = os.environ.get("WHETSTONE_DATA")
needs_omniglot = pytest.mark.skipif(not REAL, reason="WHETSTONE_DATA is not set: no real Omniglot")


def files(counts: Mapping[str, int] = COUNTS) -> dict[str, bytes]:
    listed = fake.names("images_background", counts)
    return {name: fake.png(i + 1) for i, (name, *_) in enumerate(listed)}


def unpack(content: Mapping[str, bytes], folder: Path) -> omniglot.Source:
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return omniglot.Source("images_background", folder / "images_background")


def spelled(rows: np.ndarray) -> list[int]:
    bits = np.unpackbits(rows, axis=1, count=105 * 105).reshape(-1, 105, 105) * np.uint8(255)
    return [fake.number_of(image) for image in bits]


def test_drawings_come_ordered_by_alphabet_character_and_drawer(tmp_path: Path) -> None:
    shuffled = dict(sorted(files().items(), key=lambda item: hash(item[0])))
    assert spelled(omniglot.read(fake.small(tmp_path, shuffled), COUNTS)) == list(range(1, 101))


def test_an_unpacked_folder_gives_what_its_zip_gives(tmp_path: Path) -> None:
    packed = omniglot.read(fake.small(tmp_path / "zip", files()), COUNTS)
    assert np.array_equal(omniglot.read(unpack(files(), tmp_path), COUNTS), packed)


def test_what_file_managers_leave_behind_is_not_data(tmp_path: Path) -> None:
    litter = {
        "__MACOSX/images_background/Greek/character01/._0001_01.png": b"x",
        "images_background/.DS_Store": b"x",
        "images_background/Greek/character01/._0001_01.png": b"x",
        "images_background/LICENSE.txt": b"x",
        "images_background/Thumbs.db": b"x",
    }
    assert len(omniglot.read(fake.small(tmp_path, files() | litter), COUNTS)) == 100
    assert len(omniglot.read(unpack(files() | litter, tmp_path), COUNTS)) == 100


def test_a_grey_copy_of_a_drawing_reads_as_the_drawing(tmp_path: Path) -> None:
    import io

    from PIL import Image

    content = files()
    name = next(iter(content))
    for mode in ("L", "RGB"):
        out = io.BytesIO()
        Image.open(io.BytesIO(content[name])).convert(mode).save(out, "PNG")
        assert spelled(omniglot.read(fake.small(tmp_path, content | {name: out.getvalue()}), COUNTS))[0] == 1


def drop(fragment: str) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    return lambda content: {name: data for name, data in content.items() if fragment not in name}


def put(name: str, data: bytes) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    return lambda content: content | {f"images_background/{name}": data}


DAMAGE = {
    "a missing alphabet": (drop("Latin"), "no alphabet Latin; expected 2 alphabets, 5 characters x 20 drawings"),
    "a missing character": (drop("Greek/character02"), "Greek has 2 characters; expected 3"),
    "a missing drawing": (drop("0001_07"), "Greek/character01 has 19 drawings; expected 20"),
    "an alphabet too many": (put("Klingon/character01/0001_01.png", fake.png(1)), "'Klingon' that Omniglot has not"),
    "a character too many": (put("Latin/character03/0003_01.png", fake.png(1)), "Latin has 3 characters; expected 2"),
    "a drawing too many": (
        put("Latin/character01/0001_21.png", fake.png(1)),
        "character01 has 21 drawings; expected 20",
    ),
    "a drawing twice": (
        put("Latin/character01/0009_01.png", fake.png(1)),
        "'Latin/character01/0009_01.png' is there twice",
    ),
    "another size": (
        put("Latin/character01/0001_01.png", fake.png(1, side=104)),
        "is 104 x 104 pixels; expected 105 x 105",
    ),
    "no image": (put("Latin/character01/0001_01.png", b"no image"), "is not a readable PNG image"),
    "half an image": (put("Latin/character01/0001_01.png", fake.png(1)[:60]), "is not a readable PNG image"),
    "another name": (put("Latin/01.png", fake.png(1)), "'Latin/01.png' is not named"),
}


@pytest.mark.parametrize("unpacked", [False, True], ids=["zip", "folder"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_with_its_file_what_was_expected_and_what_to_run(
    tmp_path: Path, damage: str, unpacked: bool
) -> None:
    change, message = DAMAGE[damage]
    content = change(files())
    source = unpack(content, tmp_path) if unpacked else fake.small(tmp_path, content)
    with pytest.raises(DataError) as fault:
        omniglot.read(source, COUNTS)
    text = str(fault.value)
    assert text.startswith(str(source.path))
    assert message in text
    assert "whetstone data fetch" in text
    assert "\n" not in text


@pytest.mark.parametrize("keep", [0, 10, 0.5, -1])
def test_a_truncated_zip_is_named_as_damaged(tmp_path: Path, keep: float) -> None:
    source = fake.small(tmp_path, files())
    whole = source.path.read_bytes()
    source.path.write_bytes(whole[: int(len(whole) * keep) if 0 < keep < 1 else int(keep)])
    with pytest.raises(
        DataError, match=r"images_background\.zip: damaged \(.*\); expected a whole zip file.*data fetch"
    ):
        omniglot.read(source, COUNTS)


def test_a_flipped_byte_inside_a_zip_is_noticed(tmp_path: Path) -> None:
    source = fake.small(tmp_path, files())
    content = bytearray(source.path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    source.path.write_bytes(content)
    with pytest.raises(DataError, match=r"damaged|not a readable PNG"):
        omniglot.read(source, COUNTS)


def test_a_member_that_claims_to_be_huge_is_not_unpacked(tmp_path: Path) -> None:
    source = fake.small(tmp_path, files() | {"images_background/Latin/character01/0001_01.png": b"\0" * (1 << 20)})
    with pytest.raises(DataError, match="1048576 bytes; a drawing has a few hundred"):
        omniglot.read(source, COUNTS)


def test_the_zip_is_preferred_and_the_folder_will_do(tmp_path: Path) -> None:
    root = tmp_path / "data"
    folder = root / omniglot.FOLDER
    assert omniglot.sources(root) == ()
    assert omniglot.sources(None) == ()
    (folder / "images_background").mkdir(parents=True)
    (folder / "images_evaluation.zip").write_bytes(b"")
    found = omniglot.sources(root)
    assert [source.path.name for source in found] == ["images_background", "images_evaluation.zip"]
    (folder / "images_background.zip").write_bytes(b"")
    assert omniglot.sources(root)[0].path.name == "images_background.zip"


def test_one_part_without_the_other_is_a_fault_that_names_the_missing_one(tmp_path: Path) -> None:
    (tmp_path / omniglot.FOLDER / "images_background").mkdir(parents=True)
    with pytest.raises(DataError, match=r"images_evaluation\.zip is not there.*whetstone data fetch.*WHETSTONE_DATA"):
        omniglot.sources(tmp_path)


def test_a_root_one_folder_too_deep_is_recognised(tmp_path: Path) -> None:
    folder = fake.root(tmp_path) / omniglot.FOLDER
    assert omniglot.sources(folder) == ()
    assert "must be the folder that holds omniglot-py/" in str(omniglot.missing(folder))


def test_signatures_follow_the_content_of_a_zip_and_the_files_of_a_folder(tmp_path: Path) -> None:
    source = fake.small(tmp_path, files())
    before = source.signature()
    os.utime(source.path, (0, 0))
    assert source.signature() == before
    source.path.write_bytes(source.path.read_bytes() + b"\0")
    assert source.signature() != before

    unpacked = unpack(files(), tmp_path)
    before = unpacked.signature()
    assert unpacked.signature() == before
    one = next(unpacked.path.rglob("*.png"))
    os.utime(one, (0, 0))
    assert unpacked.signature() != before
    before = unpacked.signature()
    one.unlink()
    assert unpacked.signature() != before


def test_runs_that_are_not_there_or_not_whole_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"WHETSTONE_DATA is not set; run `whetstone data fetch`"):
        omniglot.read_lake_runs(None, 28)
    with pytest.raises(DataError, match=r"all_runs\.zip is not there"):
        omniglot.read_lake_runs(tmp_path, 28)
    root = fake.root(tmp_path / "data")
    path = root / omniglot.FOLDER / "all_runs.zip"
    runs = omniglot.Source("all_runs", path)
    whole = dict(runs.files())
    path.write_bytes(fake.zipped({name: data for name, data in whole.items() if name != "run03/test/item04.png"}))
    with pytest.raises(DataError, match=r"all_runs\.zip: 1 of its 820 files are missing, run03/test/item04\.png"):
        omniglot.read_lake_runs(root, 28)
    labels = whole["run05/class_labels.txt"].replace(b"class01", b"class02")
    path.write_bytes(fake.zipped(whole | {"run05/class_labels.txt": labels}))
    with pytest.raises(DataError, match=r"run05/class_labels\.txt does not give each of 20 items a class of its own"):
        omniglot.read_lake_runs(root, 28)


def test_unpacked_runs_read_as_the_packed_ones(tmp_path: Path) -> None:
    root = fake.root(tmp_path)
    packed, answers = omniglot.read_lake_runs(root, 28)
    shutil.unpack_archive(root / omniglot.FOLDER / "all_runs.zip", root / omniglot.FOLDER / "all_runs")
    (root / omniglot.FOLDER / "all_runs.zip").unlink()
    unpacked, same = omniglot.read_lake_runs(root, 28)
    assert packed.images.equal(unpacked.images)
    assert answers.equal(same)


@needs_omniglot
def test_the_real_files_have_the_published_counts() -> None:
    assert REAL is not None
    for source, characters in zip(omniglot.sources(Path(REAL)), (964, 659), strict=True):
        assert omniglot.read(source).shape == (characters * 20, 1379)
