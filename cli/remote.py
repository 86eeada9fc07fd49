"""Talking to a running server: the options that every such command shares, and how a study is named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import settings as settings_module
from hpo.errors import Fault, Invalid, NotFound

if TYPE_CHECKING:
    from hpo.rest import Client

Url = Annotated[
    str | None, typer.Option("--url", help="Address of the server.", envvar="WHETSTONE_URL", show_default=False)
]
Token = Annotated[
    str | None,
    typer.Option("--token", help="API token; better in WHETSTONE_TOKEN.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
StudyName = Annotated[str, typer.Argument(metavar="STUDY", help="A study's number or name.")]


def connect(url: str | None, token: str | None) -> Client:
    from hpo.rest import Client

    where, secret = settings_module.address(settings_module.load(), url, token)
    try:
        return Client(where, secret)
    except ValueError as error:
        raise Invalid([Fault("", str(error))], "the server's address") from None


def find_study(client: Client, name: str) -> dict[str, Any]:
    """A study by number or by exact name. Raises `NotFound` with the remedy."""
    if name.isdigit():
        found: dict[str, Any] = client.get(f"/api/v1/studies/{name}")
        return found
    for item in client.get("/api/v1/studies", params={"name": name})["items"]:
        if item["name"] == name:
            return dict(item)
    raise NotFound(f"no study is called {name!r}: `whetstone study list` shows them all")
