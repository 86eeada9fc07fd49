"""Outcomes and releases that no server took, kept for the next worker of this home to deliver.

A worker that is told to stop while the server is away cannot hand its trial back; the lease would run out and count as
a death of the worker, and a trial survives only so many. Promise: what is kept here is delivered once, or dropped as
soon as the server says that it does not count any more. A note holds a lease's number and fencing token, which are of
no use without the worker's own API token; it is readable to its user only.
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from pathlib import Path
from typing import Any

from hpo.rest import ApiError, Client, ServerUnreachable, is_transient

log = logging.getLogger("whetstone.worker")
_LARGEST = 1_000_000
"""What a server takes of one message, and more than any tell is long."""


class Unsent:
    """The notes below `home`. No fault of the disk is raised: what cannot be kept or read is as if it never was."""

    def __init__(self, home: Path) -> None:
        self._folder = home / "unsent"

    def keep(self, url: str, path: str, body: Any) -> bool:
        """Leave a message for a later process; False where that is impossible."""
        name = uuid.uuid4().hex
        unborn = self._folder / f".{name}.tmp"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(unborn, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                json.dump({"url": url, "path": path, "body": body}, file)
            unborn.rename(self._folder / f"{name}.json")
        except OSError:
            return False
        return True

    def deliver(self, client: Client) -> None:
        """Send what was left for this client's server, each once; what only time can cure is kept."""
        for note in sorted(self._folder.glob("*.json")):
            taken = note.with_suffix(f".{os.getpid()}")
            try:
                left = json.loads(note.read_text()[:_LARGEST])
                if left["url"] != client.url:
                    continue
                note.rename(taken)  # two workers of one home do not send the same
            except (OSError, ValueError, KeyError, TypeError):
                continue
            try:
                client.once("POST", str(left["path"]), json=left["body"], timeout_s=10.0)
                log.info("the server now knows how a trial of an earlier worker ended")
            except (ServerUnreachable, ApiError) as error:
                if is_transient(error):
                    taken.rename(note)
                    continue
                log.info("how a trial of an earlier worker ended does not count any more: %s", error)
            taken.unlink(missing_ok=True)
