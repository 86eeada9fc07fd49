"""`whetstone token`: API tokens, straight in the database (so that the first one needs none)."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated

import typer

from cli import output, settings, store
from cli.remote import Json

app = typer.Typer(help="Create, list and revoke API tokens.", no_args_is_help=True)


class Role(StrEnum):
    admin = "admin"
    worker = "worker"
    viewer = "viewer"


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Whose token it is, for the list.")],
    role: Annotated[Role, typer.Option(help="admin: everything; worker: claims and reports; viewer: reads.")],
    days: Annotated[float | None, typer.Option(min=0, help="Expires after so many days.")] = None,
    json: Json = False,
) -> None:
    """Create a token. It is shown once: only its SHA-256 is stored."""
    from hpo import tokens

    expires = datetime.now(UTC) + timedelta(days=days) if days is not None else None
    with store.open_store(settings.load()) as engine:
        token_id, secret = tokens.create(engine, name, role.value, expires)
    if json:
        output.print_json({"id": token_id, "name": name, "role": role.value, "token": secret})
    else:
        output.out.print(secret, soft_wrap=True)
        output.say(f"Token {token_id} ({role.value}). Keep it now: it cannot be shown again.")


@app.command("list")
def list_tokens(json: Json = False) -> None:
    """List tokens (never their secrets)."""
    from hpo import tokens

    with store.open_store(settings.load()) as engine:
        found = [_row(token) for token in tokens.listing(engine)]
    if json:
        output.print_json(found)
        return
    columns = [("#", "right"), ("name", "cut"), "role", "state", "created", "last used"]
    rows = [
        [str(t["id"]), output.escape(t["name"]), t["role"], t["state"], t["created"], t["used"] or "-"] for t in found
    ]
    output.out.print(output.table(None, columns, rows) if rows else "No tokens yet.")


def _row(token: object) -> dict[str, str]:
    def moment(name: str) -> str:
        at = getattr(token, name)
        return at.astimezone(UTC).isoformat(timespec="seconds") if at else ""

    expired = moment("expires_at") and token.expires_at < datetime.now(UTC)  # type: ignore[attr-defined]
    return {
        "id": token.token_id,  # type: ignore[attr-defined]
        "name": token.name,  # type: ignore[attr-defined]
        "role": token.role,  # type: ignore[attr-defined]
        "state": "revoked" if moment("revoked_at") else "expired" if expired else "valid",
        "created": moment("created_at"),
        "expires": moment("expires_at"),
        "used": moment("last_used_at"),
    }


@app.command()
def revoke(token: Annotated[int, typer.Argument(metavar="ID", help="The token's number, from `token list`.")]) -> None:
    """Revoke a token: from now on it opens nothing."""
    from hpo import tokens

    with store.open_store(settings.load()) as engine:
        tokens.revoke(engine, token)
    output.out.print(f"Token {token} is revoked.")
