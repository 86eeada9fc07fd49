"""Where checkpoints go: below the root and nowhere else, and at a URL as whole as in a directory."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from tests.unit.worker_server import until
from workers.artifacts import Artifacts, ArtifactsUnusable, UnsafeName, checked

NAME = "studies/1/trials/3/attempts/1"


def write(folder: Path, kind: str, content: str) -> None:
    for suffix in (".safetensors", ".json"):
        part = folder / f".{kind}.part"
        part.write_text(content)
        part.replace(folder / f"{kind}{suffix}")


@pytest.fixture
def memory() -> Iterator[str]:
    url = f"memory://whetstone-{uuid.uuid4().hex}"
    yield url
    fs, path = fsspec.core.url_to_fs(url)
    if fs.exists(path):
        fs.rm(path, recursive=True)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/etc",
        "../up",
        "studies/../../up",
        "a//b",
        "a/./b",
        "a/b/",
        "a\\b",
        "a\x00b",
        "a\n",
        "C:/x",
        "~root",
        ".hidden",
        "é",
    ],
)
def test_a_name_that_leads_anywhere_else_is_refused(name: str, tmp_path: Path, memory: str) -> None:
    with pytest.raises(UnsafeName):
        checked(name)
    for root in (str(tmp_path / "root"), memory):
        artifacts = Artifacts(root, tmp_path / "scratch")
        with pytest.raises(UnsafeName):
            artifacts.open(name, lambda epoch: None)
        place = artifacts.open(NAME, lambda epoch: None)
        with pytest.raises(UnsafeName):
            place.fetch(name)
        place.close()


def test_a_link_that_leads_out_of_the_root_is_not_followed(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    outside.mkdir()
    root.mkdir()
    (root / "studies").symlink_to(outside)
    with pytest.raises(UnsafeName):
        Artifacts(root, tmp_path).open(NAME, lambda epoch: None)
    assert not list(outside.iterdir())


def test_in_a_directory_a_checkpoint_counts_as_soon_as_it_is_saved(tmp_path: Path) -> None:
    kept: list[int] = []
    place = Artifacts(tmp_path / "root", tmp_path).open(NAME, kept.append)
    assert place.path == tmp_path / "root" / NAME
    write(place.path, "last", "x")
    place.saved("last", 4)
    place.saved("best", 3)
    assert kept == [4]
    assert place.finish(0.0)


def test_an_earlier_attempt_is_found_where_it_was_left(tmp_path: Path, memory: str) -> None:
    for root in (str(tmp_path / "root"), memory):
        first = Artifacts(root, tmp_path / "a").open(NAME, lambda epoch: None)
        write(first.path, "last", "state of attempt 1")
        (first.path / "notes.pickle").write_text("never read")
        first.saved("last", 1)
        assert first.finish(60)
        first.close()
        second = Artifacts(root, tmp_path / "b").open(NAME[:-1] + "2", lambda epoch: None)
        earlier = second.fetch(NAME)
        assert earlier is not None
        assert (earlier / "last.json").read_text() == "state of attempt 1"
        assert (earlier / "last.safetensors").read_text() == "state of attempt 1"
        assert second.fetch("studies/1/trials/3/attempts/99") is None
        second.close()


def test_the_first_choice_stands_for_all_workers(tmp_path: Path, memory: str) -> None:
    for root in (str(tmp_path / "root"), memory):
        places = [Artifacts(root, tmp_path / f"s{n}").open(NAME, lambda epoch: None) for n in range(2)]
        assert places[0].agree("studies/1/data.json", "strokes") == "strokes"
        assert places[1].agree("studies/1/data.json", "omniglot") == "strokes"
        assert places[1].agree("studies/2/data.json", "omniglot") == "omniglot"
        with pytest.raises(UnsafeName):
            places[0].agree("../data.json", "omniglot")
        for place in places:
            place.close()
    assert [path.name for path in (tmp_path / "root/studies/1").glob("*.*")] == ["data.json"]
    (tmp_path / "root/studies/1/data.json").write_text("[")
    place = Artifacts(tmp_path / "root", tmp_path).open(NAME, lambda epoch: None)
    assert place.agree("studies/1/data.json", "omniglot") == "omniglot", "what is no choice binds nobody"


def test_of_many_first_choices_one_stands(tmp_path: Path) -> None:
    places = [Artifacts(tmp_path / "root", tmp_path).open(NAME, lambda epoch: None) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        chosen = set(pool.map(lambda n: places[n].agree("studies/1/data.json", f"choice {n}"), range(8)))
    assert len(chosen) == 1


def test_at_a_url_a_checkpoint_counts_once_it_is_there(tmp_path: Path, memory: str) -> None:
    kept: list[int] = []
    place = Artifacts(memory, tmp_path / "scratch").open(NAME, kept.append)
    for epoch in range(1, 4):
        write(place.path, "last", f"epoch {epoch}")
        place.saved("last", epoch)
    write(place.path, "best", "the best")
    place.saved("best", 2)
    assert place.finish(60)
    fs, base = fsspec.core.url_to_fs(memory)
    assert kept[-1] == 3
    assert fs.cat_file(f"{base}/{NAME}/last.json") == b"epoch 3"
    assert fs.cat_file(f"{base}/{NAME}/last.safetensors") == b"epoch 3"
    assert fs.cat_file(f"{base}/{NAME}/best.safetensors") == b"the best"
    place.close()
    assert not place.path.exists(), "the scratch folder is cleared away"
    until(lambda: not any(thread.name == "uploads" for thread in threading.enumerate()))


def test_a_reader_at_a_url_always_finds_weights_that_fit_the_json(tmp_path: Path, memory: str) -> None:
    """The JSON names its weights by content; they are there as themselves or as "previous" between any two writes."""
    place = Artifacts(memory, tmp_path / "scratch").open(NAME, lambda epoch: None)
    fs, base = fsspec.core.url_to_fs(memory)
    folder = f"{base}/{NAME}"
    moments: list[bool] = []

    def look() -> None:
        if fs.exists(f"{folder}/last.json"):
            names = [f"{folder}/last.safetensors", f"{folder}/last.previous.safetensors"]
            weights = [fs.cat_file(name) for name in names if fs.exists(name)]
            moments.append(fs.cat_file(f"{folder}/last.json") in weights)

    for action in ("put_file", "cp_file", "rm_file"):
        real = getattr(fs, action)

        def watched(*args: object, real: object = real, **kwargs: object) -> None:
            look()
            real(*args, **kwargs)  # type: ignore[operator]
            look()

        setattr(fs, action, watched)
    try:
        for epoch in range(3):
            write(place.path, "last", f"epoch {epoch}")
            place.saved("last", epoch)
            assert place.finish(60)
    finally:
        for action in ("put_file", "cp_file", "rm_file"):
            delattr(fs, action)
    place.close()
    assert len(moments) > 12
    assert all(moments)


def test_training_does_not_wait_for_a_place_that_is_away(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = tmp_path / "away"
    blocked.write_text("a file where a folder should be")
    kept: list[int] = []
    place = Artifacts(f"file://{blocked}/deep", tmp_path / "scratch").open(NAME, kept.append)
    write(place.path, "last", "1")
    place.saved("last", 1)
    until(lambda: "trying again" in caplog.text)
    write(place.path, "last", "2")
    place.saved("last", 2)
    assert not place.finish(0.5)
    blocked.unlink()
    until(lambda: kept == [2])  # what was overtaken is not sent
    assert (blocked / "deep" / NAME / "last.json").read_text() == "2"
    place.close()


def test_a_newer_checkpoint_saved_while_an_upload_fails_wins(
    tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The upload under way belongs to epoch 1; epoch 2 is saved before it fails, and must not be overwritten by it."""
    kept: list[int] = []
    place = Artifacts(memory, tmp_path / "scratch").open(NAME, kept.append)
    fs, base = fsspec.core.url_to_fs(memory)
    under_way, saved = threading.Event(), threading.Event()
    real = fs.put_file
    tries: list[str] = []

    def put_file(local: str, remote: str) -> None:
        tries.append(Path(local).read_text())
        if len(tries) == 1:
            under_way.set()
            assert saved.wait(60)
            raise OSError("the connection broke")
        real(local, remote)

    monkeypatch.setattr(fs, "put_file", put_file)
    write(place.path, "last", "epoch 1")
    place.saved("last", 1)
    assert under_way.wait(60)
    write(place.path, "last", "epoch 2")
    place.saved("last", 2)
    saved.set()
    assert place.finish(60)
    assert kept == [2]
    assert tries[1:] == ["epoch 2", "epoch 2"], "what was overtaken is not sent again"
    assert fs.cat_file(f"{base}/{NAME}/last.json") == b"epoch 2"
    place.close()


def test_what_a_dead_process_left_in_the_scratch_folder_is_removed(tmp_path: Path, memory: str) -> None:
    scratch = tmp_path / "scratch"
    (scratch / "dead" / "studies").mkdir(parents=True)
    (scratch / "dead.lock").touch()
    alive = Artifacts(memory, scratch)
    place = alive.open(NAME, lambda epoch: None)
    assert not (scratch / "dead").exists()
    Artifacts(memory, scratch)
    assert place.path.exists(), "a living process keeps its own"
    place.close()


def test_an_unusable_root_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactsUnusable, match="WHETSTONE_ARTIFACTS") as caught:
        Artifacts(tmp_path / "file" / "artifacts", tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ArtifactsUnusable, match="WHETSTONE_ARTIFACTS"):
        Artifacts("/proc", tmp_path)  # a folder that is there, and takes no file of anybody's
    with pytest.raises(ArtifactsUnusable, match="nosuchscheme"):
        Artifacts("nosuchscheme://bucket", tmp_path / "scratch")


def test_only_tensors_and_json_ever_leave_or_come(tmp_path: Path, memory: str) -> None:
    fs, base = fsspec.core.url_to_fs(memory)
    fs.pipe_file(f"{base}/{NAME}/last.json", json.dumps({}).encode())
    fs.pipe_file(f"{base}/{NAME}/last.pkl", b"evil")
    place = Artifacts(memory, tmp_path / "scratch").open(NAME[:-1] + "2", lambda epoch: None)
    earlier = place.fetch(NAME)
    assert earlier is not None
    assert [path.name for path in earlier.iterdir()] == ["last.json"]
    place.close()
