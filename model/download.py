"""One file from the network onto the disk, whole and verified or not at all.

Promise: the target appears by one rename, after its checksum was seen to be right; until then the bytes lie beside it
in ``<name>.part``, where a later call, after an interruption of any kind, goes on. A target that is there already is
only ever replaced by a verified one.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, cast
from urllib.parse import urlsplit

from model.drawings import DataError

Progress = Callable[[str, int, int | None], None]
"""Called with the file's name, the bytes that are there, and how many there will be (None: not known)."""

_BLOCK = 1 << 16
_TIMEOUT_S = 30.0
_NETWORK = (OSError, http.client.HTTPException)
"""URLError, time-outs and broken connections are OSErrors; a server that speaks no HTTP gives an HTTPException."""


class _Refused(Exception):
    """This address will not give the file, however often it is asked."""


class _Broken(Exception):
    """The transfer did not reach its end; what arrived is kept."""


def download(
    urls: Sequence[str], target: Path, md5: str, progress: Progress, *, tries: int = 3, pause_s: float = 1.0
) -> None:
    """Gets `target` from the first of `urls` that gives the file with that MD5.

    Raises DataError, in one line, where none does, or where the target cannot be written.
    """
    part = target.with_name(target.name + ".part")
    faults: list[str] = []
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab") as file:
            whole = file.tell() > 0 and md5_of(part) == md5  # an earlier call was cut off before the rename
            for url in urls:
                fault = (
                    None
                    if whole
                    else _from(url, file, md5, lambda done, total: progress(target.name, done, total), tries, pause_s)
                )
                if fault is None:
                    os.fsync(file.fileno())
                    os.replace(part, target)
                    sync_folder(target.parent)
                    return
                faults.append(f"{urlsplit(url).hostname}: {fault}")
    except OSError as fault:
        raise DataError(f"{target} cannot be written: {fault.strerror or fault}") from fault
    if part.stat().st_size == 0:
        part.unlink()
    remedy = f"Try again with a network, or get {urls[0]} elsewhere and put it at {target}"
    raise DataError(f"{target.name} was not fetched ({'; '.join(faults)}). {remedy}")


def sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` outlast a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def md5_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, _md5).hexdigest()


def _from(
    url: str, file: BinaryIO, md5: str, progress: Callable[[int, int | None], None], tries: int, pause_s: float
) -> str | None:
    """Tries one address; None where `file` now holds the right bytes, else why not."""
    fault = ""
    for attempt in range(tries):
        if attempt:
            time.sleep(pause_s * 2 ** (attempt - 1))
        try:
            _transfer(url, file, progress)
        except _Refused as refused:
            return str(refused)
        except _Broken as broken:
            fault = str(broken)
            continue
        file.flush()
        found = md5_of(Path(file.name))
        if found == md5:
            return None
        # Perhaps the beginning was of another version: once more, from the first byte.
        fault = f"what it sends is another file (MD5 {found}, expected {md5})"
        file.truncate(0)
    return fault


def _transfer(url: str, file: BinaryIO, progress: Callable[[int, int | None], None]) -> None:
    """Appends what is missing of `url` to `file`."""
    have = file.seek(0, os.SEEK_END)
    headers = {"User-Agent": "whetstone", **({"Range": f"bytes={have}-"} if have else {})}
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 (addresses come from the catalogue)
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_S)  # noqa: S310
    except urllib.error.HTTPError as fault:
        with fault:
            if fault.code == 416:  # nothing is missing, or what is here is longer than what is there
                return
            if fault.code in (408, 429) or fault.code >= 500:
                raise _Broken(f"HTTP {fault.code}") from fault
            raise _Refused(f"HTTP {fault.code} {fault.reason}") from fault
    except _NETWORK as fault:
        raise _Broken(f"cannot be reached: {_reason(fault)}") from fault
    with cast(http.client.HTTPResponse, response):
        begins = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
        if have and not (response.status == 206 and begins == str(have)):
            file.truncate(0)  # it sends the whole file
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length and length.isdigit() else None
        progress(have, total)
        while True:
            try:
                block = response.read(_BLOCK)
            except _NETWORK as fault:
                raise _Broken(f"the connection broke after {have} bytes: {_reason(fault)}") from fault
            if not block:
                break
            file.write(block)
            have += len(block)
            progress(have, total)
    if total is not None and have < total:
        raise _Broken(f"the connection broke after {have} of {total} bytes")


def _reason(fault: BaseException) -> str:
    inner = getattr(fault, "reason", fault)
    text = str(getattr(inner, "strerror", None) or inner)
    return text if text else type(inner).__name__


def _md5() -> hashlib._Hash:
    return hashlib.md5(usedforsecurity=False)
