"""A trial's best checkpoint, as a download.

The path is made of what the server itself wrote down when it leased the trial, and has to lie under the artifacts root
once every link is followed: nothing that a client sends becomes part of a file's name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse

from api.routes.base import Hpo, StudyId, TrialNumber, needs
from api.routes.base import router as api_router
from hpo.errors import NotFound

router: APIRouter = api_router(tags=["trials"])

FILES = {"weights": "best.safetensors", "config": "best.json"}
KINDS = {"weights": "application/octet-stream", "config": "application/json"}


@router.get(
    "/studies/{study}/trials/{n}/checkpoint",
    response_class=FileResponse,
    **needs("viewer", 404, answers={kind: {} for kind in KINDS.values()}),
)
def checkpoint(
    study: StudyId,
    n: TrialNumber,
    request: Request,
    hpo: Hpo,
    part: Annotated[
        Literal["weights", "config"], Query(description="safetensors, or the JSON beside them.")
    ] = "weights",
) -> FileResponse:
    """The trial's best checkpoint: its weights, or the configuration that they belong to."""
    folder = hpo.get_trial(study, n).checkpoint
    if folder is None:
        raise NotFound(f"trial {n} of study {study} has left no checkpoint")
    path = resolve(request.app.state.artifacts, folder, FILES[part])
    name = f"study-{study}-trial-{n}{path.suffix}"
    return FileResponse(path, media_type=KINDS[part], filename=name)


def resolve(root: Path | str, folder: str, name: str) -> Path:
    """The file `name` in `folder` under the artifacts root.

    Raises:
        NotFound: it is not on this machine; the message says where to look.
    """
    address = urlsplit(str(root))
    scheme = address.scheme if isinstance(root, str) else ""
    if len(scheme) > 1 and scheme != "file":
        raise NotFound(f"the artifacts are not on this machine but in a {scheme} store: fetch {folder}/{name} there")
    local = Path(address.path if scheme == "file" else root).resolve()
    path = (local / folder / name).resolve()
    if not path.is_relative_to(local) or not path.is_file():
        raise NotFound(
            f"{folder}/{name} is not under this server's artifacts: they are on the machine of the worker that trained "
            "the trial, or were removed (let server and workers share WHETSTONE_ARTIFACTS)"
        )
    return path
