"""Fetching, against a real HTTP server on this machine that serves ranges, breaks off and lies when told to."""

import gzip
import hashlib
import http.server
import json
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from model import fetch, omniglot, vision
from model.download import download
from model.drawings import DataError
from model.fetch import Item
from tests.unit import fake_omniglot as fake


def idx(count: int) -> bytes:
    """`count` digits of MNIST's format, 28 x 28."""
    return struct.pack(">4B3I", 0, 0, 8, 3, count, 28, 28) + bytes(i % 256 for i in range(count * 784))


@dataclass
class Upstream:
    """What the server has, and how it behaves."""

    files: dict[str, bytes] = field(default_factory=dict)
    break_after: list[int] = field(default_factory=list)
    """Bytes after which to break off the next answers, one each."""
    statuses: list[int] = field(default_factory=list)
    """Status codes to give the next requests, one each."""
    ranges: bool = True
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""

    def item(self, name: str, path: str) -> Item:
        md5 = hashlib.md5(self.files[name]).hexdigest()
        return Item(name, path, (f"{self.url}/{name}",), md5)

    def catalogue(self) -> tuple[Item, ...]:
        places = {
            "all_runs.zip": "omniglot-py",
            "images_background.zip": "omniglot-py",
            "images_evaluation.zip": "omniglot-py",
        }
        return tuple(self.item(name, f"{places.get(name, 'MNIST/raw')}/{name}") for name in self.files)


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    here = Upstream({"all_runs.zip": fake.packed_runs(), "t10k-images-idx3-ubyte.gz": gzip.compress(idx(300), mtime=0)})

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers["Range"]
            here.asked.append((self.path, asked))
            content = here.files.get(self.path.removeprefix("/"))
            if content is None or here.statuses:
                self.send_error(here.statuses.pop(0) if here.statuses else 404)
                return
            start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and here.ranges else 0
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            body = content[start:]
            self.wfile.write(body[: here.break_after.pop(0)] if here.break_after else body)

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    here.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield here
    server.shutdown()
    thread.join()
    server.server_close()


def get(upstream: Upstream, root: Path, **options: object) -> tuple[list[str], dict[str, str]]:
    lines: list[str] = []
    done = fetch.fetch(root, items=upstream.catalogue(), notify=lines.append, pause_s=0.01, **options)  # type: ignore[arg-type]
    return lines, {status.item.name: status.state for status in done}


def tree(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_everything_is_fetched_once_and_then_left_alone(upstream: Upstream, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    lines, states = get(upstream, tmp_path / "new", progress=lambda *step: seen.append(step))
    assert set(states.values()) == {"fetched"}
    assert len(lines) == 2
    for name, content in upstream.files.items():
        path = next((tmp_path / "new").rglob(name))
        assert path.read_bytes() == content
        steps = [(done, total) for file, done, total in seen if file == name]
        assert steps[0] == (0, len(content))
        assert steps[-1] == (len(content), len(content))
        assert steps == sorted(steps)
    asked = len(upstream.asked)
    lines, states = get(upstream, tmp_path / "new")
    assert set(states.values()) == {"there"}
    assert all("already there" in line for line in lines)
    assert len(upstream.asked) == asked


def test_mnist_is_laid_out_so_that_torchvision_opens_it(upstream: Upstream, tmp_path: Path) -> None:
    labels = struct.pack(">4BI", 0, 0, 8, 1, 300) + bytes(i % 10 for i in range(300))
    for prefix in ("train", "t10k"):
        upstream.files[f"{prefix}-images-idx3-ubyte.gz"] = gzip.compress(idx(300), mtime=0)
        upstream.files[f"{prefix}-labels-idx1-ubyte.gz"] = gzip.compress(labels, mtime=0)
    get(upstream, tmp_path)
    opened = vision.datasets().MNIST(str(tmp_path), train=False, download=False)
    assert opened.data.shape == (300, 28, 28)
    assert opened.targets[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    # With the packed files gone the unpacked ones still count.
    for path in (tmp_path / "MNIST").rglob("*.gz"):
        path.unlink()
    assert set(get(upstream, tmp_path)[1].values()) == {"there"}


def test_a_broken_connection_is_taken_up_where_it_broke(upstream: Upstream, tmp_path: Path) -> None:
    upstream.break_after = [1000, 500]
    get(upstream, tmp_path)
    assert [asked for path, asked in upstream.asked if path == "/all_runs.zip"] == [None, "bytes=1000-", "bytes=1500-"]
    assert (tmp_path / "omniglot-py" / "all_runs.zip").read_bytes() == upstream.files["all_runs.zip"]


def test_a_later_call_goes_on_from_what_an_interrupted_one_left(upstream: Upstream, tmp_path: Path) -> None:
    def interrupt(name: str, done: int, total: int | None) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(upstream, tmp_path, progress=interrupt)
    assert tree(tmp_path) == {"omniglot-py/all_runs.zip.part"}
    had = (tmp_path / "omniglot-py" / "all_runs.zip.part").stat().st_size
    assert had > 0
    get(upstream, tmp_path)
    assert upstream.asked[1] == ("/all_runs.zip", f"bytes={had}-")
    assert "omniglot-py/all_runs.zip.part" not in tree(tmp_path)


def test_a_server_that_knows_no_ranges_sends_the_whole_file_again(upstream: Upstream, tmp_path: Path) -> None:
    upstream.ranges, upstream.break_after = False, [1000]
    get(upstream, tmp_path)
    assert [asked for path, asked in upstream.asked if path == "/all_runs.zip"] == [None, "bytes=1000-"]
    assert (tmp_path / "omniglot-py" / "all_runs.zip").read_bytes() == upstream.files["all_runs.zip"]


@pytest.mark.parametrize("left", [b"another beginning", b"x" * 10_000_000], ids=["short", "longer than the file"])
def test_a_wrong_beginning_is_thrown_away(upstream: Upstream, tmp_path: Path, left: bytes) -> None:
    target = tmp_path / "omniglot-py" / "all_runs.zip"
    target.parent.mkdir()
    target.with_name("all_runs.zip.part").write_bytes(left)
    get(upstream, tmp_path)
    assert target.read_bytes() == upstream.files["all_runs.zip"]


def test_a_whole_part_is_put_into_place_without_a_network(upstream: Upstream, tmp_path: Path) -> None:
    target = tmp_path / "omniglot-py" / "all_runs.zip"
    target.parent.mkdir()
    target.with_name("all_runs.zip.part").write_bytes(upstream.files["all_runs.zip"])
    download(("http://127.0.0.1:9/",), target, upstream.catalogue()[0].md5, lambda *step: None, tries=1)
    assert target.read_bytes() == upstream.files["all_runs.zip"]


def test_a_file_with_another_checksum_is_never_installed(upstream: Upstream, tmp_path: Path) -> None:
    items = [Item("Runs", "omniglot-py/all_runs.zip", (f"{upstream.url}/all_runs.zip",), "0" * 32)]
    with pytest.raises(DataError, match=r"all_runs\.zip was not fetched .*another file \(MD5 \w+, expected 0{32}\)"):
        fetch.fetch(tmp_path, items=items, pause_s=0.01)
    assert tree(tmp_path) == set()


def test_without_a_network_one_line_says_what_is_missing_and_what_to_do(tmp_path: Path) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and nobody listens
        items = [
            Item("Runs", "omniglot-py/all_runs.zip", (f"http://127.0.0.1:{bound.getsockname()[1]}/r.zip",), "0" * 32)
        ]
        with pytest.raises(DataError) as fault:
            fetch.fetch(tmp_path, items=items, pause_s=0.01)
    text = str(fault.value)
    assert "\n" not in text
    for part in (
        "all_runs.zip was not fetched",
        "127.0.0.1: cannot be reached: Connection refused",
        "put it at",
        str(tmp_path),
    ):
        assert part in text
    assert tree(tmp_path) == set()


def test_the_next_mirror_is_tried_and_a_hiccup_is_outwaited(upstream: Upstream, tmp_path: Path) -> None:
    md5 = upstream.catalogue()[0].md5
    urls = (f"{upstream.url}/gone.zip", f"{upstream.url}/all_runs.zip")
    upstream.statuses = [404, 503, 429]
    download(urls, tmp_path / "all_runs.zip", md5, lambda *step: None, pause_s=0.01)
    # A refusal is not asked twice; a hiccup is.
    assert [path for path, _ in upstream.asked] == ["/gone.zip", "/all_runs.zip", "/all_runs.zip", "/all_runs.zip"]


def test_a_damaged_file_is_replaced_only_by_a_verified_one(upstream: Upstream, tmp_path: Path) -> None:
    target = tmp_path / "omniglot-py" / "all_runs.zip"
    target.parent.mkdir()
    target.write_bytes(upstream.files["all_runs.zip"][:5000])
    upstream.statuses = [500] * 3
    with pytest.raises(DataError, match="HTTP 500"):
        get(upstream, tmp_path)
    assert target.stat().st_size == 5000
    lines, states = get(upstream, tmp_path)
    assert states["all_runs.zip"] == "fetched"
    assert any("damaged, fetching it again" in line and str(target) in line for line in lines)
    assert target.read_bytes() == upstream.files["all_runs.zip"]


def test_repacked_zips_are_used_as_they_are_after_counting(upstream: Upstream, tmp_path: Path) -> None:
    root = fake.root(tmp_path)
    upstream.files = {"images_evaluation.zip": b"upstream's", "all_runs.zip": b"upstream's"}
    lines, states = get(upstream, root)
    assert set(states.values()) == {"there"}
    assert upstream.asked == []
    assert any("659 characters x 20 drawings" in line for line in lines)
    assert any("20 runs of 20 tasks" in line for line in lines)


def test_two_fetches_do_not_write_at_once(upstream: Upstream, tmp_path: Path) -> None:
    with fetch._alone(tmp_path), pytest.raises(DataError, match="another fetch is writing under"):
        get(upstream, tmp_path)
    assert set(get(upstream, tmp_path)[1].values()) == {"fetched"}


def test_a_root_that_cannot_be_written_is_named(upstream: Upstream, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="file/data cannot be written"):
        get(upstream, tmp_path / "file" / "data")


def test_progress_is_told_in_quarters_where_the_caller_shows_none(upstream: Upstream, tmp_path: Path) -> None:
    lines, _ = get(upstream, tmp_path)
    size = len(upstream.files["all_runs.zip"]) / 1e6
    told = [f"all_runs.zip: {part}% of {size:.1f} MB" for part in (0, 25, 50, 75)]
    assert [line for line in lines if line.startswith("all_runs.zip: ") and "%" in line] == told


def test_fetching_packs_omniglot_for_fast_loading(
    upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(omniglot, "SPLITS", fake.SMALL)
    upstream.files = {f"{part}.zip": fake.packed(part, small=True) for part in fake.SMALL}
    get(upstream, tmp_path / "data", home=tmp_path / "home")
    assert fetch.info(tmp_path / "data", tmp_path / "home", upstream.catalogue())["cached"] == {"105": True}


def test_the_catalogue_is_upstreams() -> None:
    items = {Path(item.path).name: item for item in fetch.catalogue()}
    assert len(items) == 7
    assert items["images_background.zip"].md5 == "68d2efa1b9178cc56df9314c21c6e718"
    assert items["train-labels-idx1-ubyte.gz"].md5 == "d53e105ee54ea40749a09fcbcd1e9432"
    assert items["all_runs.zip"].urls[0].endswith("/one-shot-classification/all_runs.zip")
    for item in items.values():
        assert all(url.endswith(Path(item.path).name) for url in item.urls)


def test_info_tells_what_is_there_missing_and_damaged_and_writes_nothing(upstream: Upstream, tmp_path: Path) -> None:
    root = tmp_path / "data"
    (root / omniglot.FOLDER).mkdir(parents=True)
    (root / omniglot.FOLDER / "all_runs.zip").write_bytes(b"no zip")
    before = tree(tmp_path)
    shown = fetch.info(root, tmp_path / "home", upstream.catalogue())
    assert {row["name"]: row["state"] for row in shown["sets"]} == {
        "all_runs.zip": "damaged",
        "t10k-images-idx3-ubyte.gz": "missing",
    }
    assert shown["cached"] == {}
    assert json.loads(json.dumps(shown)) == shown
    assert fetch.info(None, tmp_path / "home", upstream.catalogue())["sets"] == []
    assert tree(tmp_path) == before
