import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model import dataset, folder
from model.drawings import DataError, Dataset
from model.pairs import PairSampler

NAME = "letters"


def quiet(line: str) -> None:
    raise AssertionError(f"nothing was to be said: {line}")


def load(root: Path | None, size: int = 4, notify: Callable[[str], None] = quiet, **asked) -> Dataset:
    return folder.load(root, asked.pop("name", NAME), size, notify=notify, **asked)


def picture(path: Path, value: int, side: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (side, side), value).save(path)


def make(root: Path, alphabets: dict[str, Iterable[int]], below: str = NAME) -> Path:
    """Alphabets of characters with so many drawings each; what a drawing shows is `shade` of its place."""
    for alphabet, drawings in alphabets.items():
        for c, count in enumerate(drawings):
            (root / below / alphabet / f"c{c:02}").mkdir(parents=True, exist_ok=True)
            for d in range(count):
                picture(root / below / alphabet / f"c{c:02}" / f"{d:02}.png", 10 * c + d)
    return root


def shades(data: Dataset, part: str) -> dict[str, list[int]]:
    """What each character's drawings show, turned back to dark ink."""
    drawings = getattr(data, part)
    return {name: (255 - drawings.images[c, :, 1, 1].int()).tolist() for c, name in enumerate(drawings.characters)}


def two() -> dict[str, Iterable[int]]:
    return dict.fromkeys(("A", "B", "C"), (2, 2))


def faulty(root: Path | None, **asked) -> str:
    with pytest.raises(DataError) as fault:
        load(root, notify=lambda line: None, **asked)
    assert "\n" not in str(fault.value)
    return str(fault.value)


def test_alphabets_characters_and_drawings_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    data = load(make(tmp_path, {"B": (3, 3), "A": (3, 3, 3), "C": (3, 3)}))
    assert (data.name, data.size, data.channels) == ("folder:letters", 4, 1)
    assert shades(data, "train") == {"A/c00": [0, 1, 2], "A/c01": [10, 11, 12], "A/c02": [20, 21, 22]}
    assert shades(data, "validation") == {"B/c00": [0, 1, 2], "B/c01": [10, 11, 12]}
    assert shades(data, "test") == {"C/c00": [0, 1, 2], "C/c01": [10, 11, 12]}
    for part in (data.train, data.validation, data.test):
        for c, name in enumerate(part.characters):
            assert part.alphabets[part.alphabet[c]] == name.partition("/")[0]


@pytest.mark.parametrize(("count", "parts"), [(3, (1, 1, 1)), (4, (2, 1, 1)), (5, (3, 1, 1)), (12, (8, 2, 2))])
def test_alphabets_are_split_by_name(tmp_path: Path, count: int, parts: tuple[int, ...]) -> None:
    names = [f"a{i:02}" for i in range(count)]
    data = load(make(tmp_path, dict.fromkeys(names, (2, 2))))
    found = [data.train.alphabets, data.validation.alphabets, data.test.alphabets]
    assert tuple(map(len, found)) == parts
    assert [name for part in found for name in part] == names


def test_one_alphabet_has_its_characters_split_and_says_so(tmp_path: Path) -> None:
    lines: list[str] = []
    data = load(make(tmp_path, {"A": [2] * 10}), notify=lines.append)
    assert data.train.characters == tuple(f"A/c{c:02}" for c in range(6))
    assert data.validation.characters == ("A/c06", "A/c07")
    assert data.test.characters == ("A/c08", "A/c09")
    assert data.test.alphabets == ("A",)
    assert len(lines) == 1
    assert "characters of each are split: 6 to train, 2 to validate, 2 to test" in lines[0]


def test_two_alphabets_have_their_characters_split_each(tmp_path: Path) -> None:
    data = load(make(tmp_path, {"A": [2] * 6, "B": [2] * 7}), notify=lambda line: None)
    assert data.train.characters == ("A/c00", "A/c01", "B/c00", "B/c01", "B/c02")
    assert data.test.characters == ("A/c04", "A/c05", "B/c05", "B/c06")


def test_too_little_to_split_says_what_it_takes(tmp_path: Path) -> None:
    fault = faulty(make(tmp_path, {"A": [2] * 9, "B": [2] * 5}))
    assert "3 alphabets, or 6 characters in each of fewer (B has 5), or folders train/ and validation/" in fault


def test_given_parts_are_taken_as_they_are(tmp_path: Path) -> None:
    make(tmp_path, {"A": (3, 3), "B": (3, 3)}, f"{NAME}/train")
    make(tmp_path, {"C": (2, 2)}, f"{NAME}/validation")
    data = load(tmp_path)
    assert (data.train.alphabets, data.validation.alphabets) == (("A", "B"), ("C",))
    assert (data.train.drawers, data.validation.drawers) == (3, 2)
    assert data.test.images.shape == (0, 2, 4, 4)
    make(tmp_path, {"D": (4, 4)}, f"{NAME}/test")
    lines: list[str] = []
    make(tmp_path, {"lost": (2, 2)})
    picture(tmp_path / NAME / "train" / "cover.png", 0)
    data = load(tmp_path, notify=lines.append)
    assert (data.test.alphabets, data.test.drawers) == (("D",), 4)
    assert len(lines) == 1
    assert "2 ignored, not alphabet/character/drawing.png: lost, train/cover.png" in lines[0]


@pytest.mark.parametrize(("there", "lacking"), [("train", "validation"), ("validation", "train")])
def test_half_of_a_split_is_refused(tmp_path: Path, there: str, lacking: str) -> None:
    make(tmp_path, two(), f"{NAME}/{there}")
    assert f"has {there}/ and no {lacking}/" in faulty(tmp_path)


def test_all_characters_of_a_part_have_as_many_drawings_as_the_rarest_and_the_rest_is_counted(tmp_path: Path) -> None:
    lines: list[str] = []
    data = load(make(tmp_path, {"A": (3, 5), "B": (2, 2), "C": (4, 4)}), notify=lines.append)
    assert shades(data, "train") == {"A/c00": [0, 1, 2], "A/c01": [10, 11, 12]}
    assert (data.validation.drawers, data.test.drawers) == (2, 4)
    assert len(lines) == 1
    assert "2 of 20 drawings left out" in lines[0]
    assert "train 3, validation 2, test 4" in lines[0]


@pytest.mark.parametrize(("count", "number"), [(1, "1 drawing"), (0, "no drawings")])
def test_a_character_with_fewer_than_two_drawings_is_named(tmp_path: Path, count: int, number: str) -> None:
    fault = faulty(make(tmp_path, {**two(), "B": (2, count)}))
    assert f"{tmp_path}/letters/B/c01 has {number}; a character needs at least 2" in fault


def test_unreadable_files_are_one_fault_that_names_the_first(tmp_path: Path) -> None:
    make(tmp_path, two())
    (tmp_path / NAME / "A" / "c01" / "00.png").write_bytes(b"")
    assert "A/c01/00.png is empty: replace or remove" in faulty(tmp_path)
    (tmp_path / NAME / "B" / "c00" / "01.png").write_text("no image")
    whole = tmp_path / NAME / "C" / "c00" / "00.png"
    Image.effect_noise((64, 64), 50).save(whole)
    whole.write_bytes(whole.read_bytes()[:-100])
    fault = faulty(tmp_path)
    assert "A/c01/00.png is empty and 2 more" in fault
    (tmp_path / NAME / "A" / "c01" / "00.png").unlink()
    picture(tmp_path / NAME / "A" / "c01" / "00.png", 0)
    assert "B/c00/01.png is not a readable image" in faulty(tmp_path)
    picture(tmp_path / NAME / "B" / "c00" / "01.png", 0)
    assert "C/c00/00.png is not a readable image (image file is truncated" in faulty(tmp_path)


@pytest.mark.parametrize(("shape", "fault"), [((20_000, 10_000), "bomb"), ((10_001, 1), "10001 x 1 pixels; at most")])
def test_images_too_large_to_read_are_refused_unread(tmp_path: Path, shape: tuple[int, int], fault: str) -> None:
    make(tmp_path, two())
    Image.new("1", shape).save(tmp_path / NAME / "A" / "c01" / "00.png")
    assert fault in faulty(tmp_path)


def test_more_than_memory_or_patience_holds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, two())
    monkeypatch.setattr(folder, "MOST_BYTES", 12 * 16 * 3 - 1)
    assert load(tmp_path).channels == 1
    assert "at 4 x 4 pixels" in faulty(tmp_path, channels=3)
    monkeypatch.setattr(folder, "MOST_ENTRIES", 20)
    assert "more than 20 files" in faulty(tmp_path)


def test_what_is_no_drawing_is_ignored_and_mentioned_once(tmp_path: Path) -> None:
    make(tmp_path, two())
    for name in (".DS_Store", "A/Thumbs.db", "A/c00/._00.png", "A/c00/desktop.ini", "B/.hidden/x.png"):
        (tmp_path / NAME / name).parent.mkdir(exist_ok=True)
        (tmp_path / NAME / name).write_text("litter")
    assert len(load(tmp_path).train) == 4
    for name in ("README.md", "cover.png", "A/c00/notes.txt", "B/loose.png", "C/c00/deeper/x.png", "empty/none"):
        (tmp_path / NAME / name).parent.mkdir(exist_ok=True)
        (tmp_path / NAME / name).write_text("stray")
    lines: list[str] = []
    assert load(tmp_path, notify=lines.append).train.images.shape == (2, 2, 4, 4)
    assert len(lines) == 1
    assert "7 ignored, not alphabet/character/drawing.png: " in lines[0]  # empty/ and empty/none both


def test_folders_that_are_not_alphabets_of_characters_say_what_the_layout_is(tmp_path: Path) -> None:
    assert f"{tmp_path}/letters is not a folder; put the images there as letters/alphabet/" in faulty(tmp_path)
    (tmp_path / NAME).mkdir()
    assert "holds no drawings as alphabet/character/drawing.png" in faulty(tmp_path)
    picture(tmp_path / NAME / "x" / "1.png", 0)
    assert "letters/x holds images and no characters" in faulty(tmp_path)
    assert "WHETSTONE_DATA is not set" in faulty(None)


def test_alphabets_of_one_character_are_refused_where_a_part_has_no_other(tmp_path: Path) -> None:
    assert "no alphabet of the validation part has 2 characters" in faulty(make(tmp_path, {**two(), "B": (2,)}))
    lines: list[str] = []
    data = load(make(tmp_path, {"A": (2,), "B": (2, 2), "C": (2, 2), "D": (2, 2)}, "more"), name="more",
                notify=lines.append)  # fmt: skip
    assert data.train.characters == ("A/c00", "B/c00", "B/c01")
    assert len(lines) == 1
    assert "one character only, so no pairs of its own, has A (train)" in lines[0]
    PairSampler(data.train, 8).draw(torch.Generator())


@pytest.mark.parametrize("name", ["", "/etc", "..", "a/../../b", ".", "C:\\x", "a\\b", "a\0b", "a\nb"])
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="`folder`"):
        load(make(tmp_path, two()), name=name)


@pytest.mark.parametrize("link", ["letters", "letters/Z", "letters/A/z", "letters/A/c00/z.png"])
def test_links_that_leave_the_data_are_refused_and_others_followed(tmp_path: Path, link: str) -> None:
    root = make(tmp_path / "data", two(), "elsewhere" if link == NAME else NAME)
    outside = make(tmp_path / "outside", two())
    target = {"letters": outside, "letters/Z": outside / NAME / "A", "letters/A/z": outside / NAME / "A" / "c00"}.get(
        link, outside / NAME / "A" / "c00" / "00.png"
    )
    (root / link).symlink_to(target)
    assert f"{link} is a link that leads out of WHETSTONE_DATA" in faulty(root)
    (root / link).unlink()
    (root / link).symlink_to(tmp_path / "nowhere")
    assert ("is not a folder" if link == NAME else "is a link that leads nowhere") in faulty(root)
    (root / link).unlink()
    if link == NAME:
        (root / link).symlink_to(root / "elsewhere")
    elif link == "letters/Z":
        (root / link).symlink_to(root / NAME / "A")
    else:
        return
    assert len(load(root).train) in (4, 8)


def test_dark_ink_is_turned_round_and_light_ink_is_not(tmp_path: Path) -> None:
    make(tmp_path, two())
    for d in range(2):
        picture(tmp_path / NAME / "A" / "c00" / f"{d:02}.png", 30)
    assert load(tmp_path).train.images[0].unique().tolist() == [225]
    assert load(tmp_path, ink="light").train.images[0].unique().tolist() == [30]
    with pytest.raises(ValueError, match="ink is dark"):
        load(tmp_path, ink="red")


def first(root: Path, image: Image.Image, suffix: str = "png", size: int = 8, **asked) -> np.ndarray:
    """How one drawing comes out."""
    target = make(root, two()) / NAME / "A" / "c00" / "00.png"
    target.unlink()
    image.save(target.with_suffix(f".{suffix}"))
    return load(root, size, **asked).train.images[0, 0].numpy()


def test_a_rectangle_is_padded_with_background(tmp_path: Path) -> None:
    out = first(tmp_path, Image.new("L", (8, 4), 0))
    assert (out[2:6] == 255).all()
    assert (out[:2] == 0).all()
    assert (out[6:] == 0).all()


def test_light_ink_on_a_rectangle_is_padded_with_black(tmp_path: Path) -> None:
    out = first(tmp_path, Image.new("RGB", (4, 8), "white"), channels=3, ink="light")
    assert (out[:, :, 2:6] == 255).all()
    assert (out[:, :, :2] == 0).all()


@pytest.mark.parametrize(("ink", "stroke"), [("dark", (0, 0, 0, 255)), ("light", (255, 255, 255, 255))])
def test_transparent_parts_show_the_background(tmp_path: Path, ink: str, stroke: tuple[int, ...]) -> None:
    image = Image.new("RGBA", (8, 8), (120, 120, 120, 0))
    image.paste(stroke, (0, 0, 8, 2))
    out = first(tmp_path, image, ink=ink)
    assert (out[:2] == 255).all()
    assert (out[2:] == 0).all()


def test_images_shrink_by_area_averaging(tmp_path: Path) -> None:
    image = Image.new("L", (16, 16), 255)
    image.putpixel((0, 0), 0)  # one pixel of ink in a square of 16
    assert first(tmp_path, image, size=4).flatten().tolist() == [16] + [0] * 15


def test_colour_is_kept_or_turned_to_grey(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), (200, 100, 0))
    assert first(tmp_path, image, channels=3)[:, 3, 3].tolist() == [55, 155, 255]
    grey = load(tmp_path, 8).train.images[0, 0, 3, 3]
    assert grey == 255 - image.convert("L").getpixel((0, 0))


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "bmp", "gif", "webp", "PNG"])
def test_every_named_format_is_read(tmp_path: Path, suffix: str) -> None:
    image = Image.new("L", (16, 16), 255)
    image.paste(0, (0, 0, 16, 8))
    out = first(tmp_path, image, suffix, size=4)
    assert out[0].min() > 245
    assert out[3].max() < 10


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "LA", "RGBA", "I;16"])
def test_every_depth_of_pixels_is_read(tmp_path: Path, mode: str) -> None:
    light = 255 if mode == "1" else 130
    grey = Image.new("L", (8, 8), light)
    grey.paste(0, (0, 0, 8, 4))
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    out = first(tmp_path, deep if mode == "I;16" else grey.convert(mode))
    assert (out[:4] == 255).all()
    assert (out[4:] == 255 - light).all()
    assert load(tmp_path, 8, channels=3).train.images.shape == (2, 2, 3, 8, 8)


def test_a_photograph_stands_upright(tmp_path: Path) -> None:
    image = Image.new("L", (8, 8), 255)
    image.paste(0, (0, 0, 8, 4))  # ink above; "turn by 180 degrees"
    exif = Image.Exif()
    exif[0x0112] = 3
    target = make(tmp_path, two()) / NAME / "A" / "c00" / "00.png"
    image.save(target, exif=exif)
    out = load(tmp_path, 8).train.images[0, 0]
    assert (out[4:] == 255).all()
    assert (out[:4] == 0).all()


def test_names_of_any_bytes_can_be_shown_and_kept(tmp_path: Path) -> None:
    strange = os.fsdecode(b"A\xff\n")
    data = load(make(tmp_path, {strange: (2, 2), "B": (2, 2), "C": (2, 2)}))
    assert data.train.alphabets == ("A\\udcff\\n",)
    assert data.train.characters[0].encode() == rb"A\udcff\n/c00"
    (tmp_path / NAME / strange / "c00" / "00.png").write_bytes(b"")
    assert "A\\udcff\\n/c00/00.png is empty" in faulty(tmp_path)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, two())
    listed = os.scandir

    def refuse(path: Path):
        if Path(path).name == "B":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert "letters/B cannot be read: Permission denied" in faulty(tmp_path)


def test_nothing_is_written(tmp_path: Path) -> None:
    make(tmp_path, two())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    home = tmp_path / "home"
    dataset.load(4, source="folder", folder=NAME, data_root=tmp_path, home=home, notify=quiet)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
