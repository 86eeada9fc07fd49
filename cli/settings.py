"""The settings of one process, read from the environment once, in `main()`, and passed down.

Empty variables count as unset, so that a compose file may pass them all on.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from hpo.errors import Fault, Invalid

DEFAULT_URL = "http://127.0.0.1:8000"


class Settings(BaseSettings):
    """Every variable that Whetstone reads. docs/settings.md lists the same, and a test compares the two."""

    model_config = SettingsConfigDict(env_ignore_empty=True, extra="ignore")

    database_url: str | None = Field(None, validation_alias="DATABASE_URL")
    data: Path | None = Field(None, validation_alias="WHETSTONE_DATA")
    home: Path = Field(Path("~/.local/share/whetstone"), validation_alias="WHETSTONE_HOME")
    artifacts: str | None = Field(None, validation_alias="WHETSTONE_ARTIFACTS")
    url: str | None = Field(None, validation_alias="WHETSTONE_URL")
    token: str | None = Field(None, validation_alias="WHETSTONE_TOKEN", repr=False)

    host: str = Field("127.0.0.1", validation_alias="WHETSTONE_HOST")
    port: int = Field(8000, ge=0, le=65535, validation_alias="WHETSTONE_PORT")
    public_url: str | None = Field(None, validation_alias="WHETSTONE_PUBLIC_URL")
    admin_token: str | None = Field(None, min_length=16, validation_alias="WHETSTONE_ADMIN_TOKEN", repr=False)
    worker_token: str | None = Field(None, min_length=16, validation_alias="WHETSTONE_WORKER_TOKEN", repr=False)
    wait_s: float = Field(0.0, ge=0, le=3600, validation_alias="WHETSTONE_WAIT_S")
    term_s: float = Field(30.0, ge=0.2, le=3600, validation_alias="WHETSTONE_LEASE_TERM_S")
    heartbeat_s: float = Field(10.0, ge=0.05, le=1200, validation_alias="WHETSTONE_HEARTBEAT_S")
    stall_s: float = Field(600.0, ge=1, le=86400, validation_alias="WHETSTONE_STALL_S")

    @property
    def home_dir(self) -> Path:
        return self.home.expanduser().absolute()

    @property
    def data_root(self) -> Path:
        """WHETSTONE_DATA, or HOME/data."""
        return self.data.expanduser().absolute() if self.data else self.home_dir / "data"

    @property
    def artifacts_root(self) -> str:
        """A directory, or an fsspec URL."""
        return self.artifacts or str(self.home_dir / "artifacts")


def load(**overrides: object) -> Settings:
    """Read the environment. Raises `Invalid` that names each variable that is wrong, never its value."""
    given = {str(Settings.model_fields[name].validation_alias): value for name, value in overrides.items()}
    try:
        settings = Settings(**{variable: value for variable, value in given.items() if value is not None})  # type: ignore[arg-type]
    except ValidationError as error:
        faults = [Fault(at=str(e["loc"][0]), fault=e["msg"]) for e in error.errors(include_input=False)]
        raise Invalid(faults, "the environment") from None
    if settings.heartbeat_s * 2 > settings.term_s:
        raise Invalid(
            [Fault("WHETSTONE_HEARTBEAT_S", "must be at most half of WHETSTONE_LEASE_TERM_S, or leases run out")],
            "the environment",
        )
    return settings


def server_note(home: Path) -> Path:
    """Where a running `whetstone serve` leaves its address and token for commands of the same user."""
    return home / "server.json"


def address(
    settings: Settings, url: str | None = None, token: str | None = None, *, role: Literal["token", "worker"] = "token"
) -> tuple[str, str]:
    """URL and token to talk to: the options, the environment, or the server that runs in the same home.

    Of the server's tokens `role` picks the admin's, which dies with it, or the home's workers', which does not. Raises
    `Invalid` where there is no token to be found.
    """
    noted = noted_server(settings.home_dir)
    given = url or settings.url
    secret = token or settings.token
    if not secret and noted and (given is None or _same_place(given, noted["url"])):
        return noted["url"], noted.get(role) or noted["token"]
    if not secret and given:
        remedy = "`whetstone token create NAME --role admin` (or worker), where its database is, makes one"
        raise Invalid([Fault("WHETSTONE_TOKEN", f"no token for {given}: set it or pass --token; {remedy}")])
    if not secret:
        start = f"no server runs in {settings.home_dir}: start one with `whetstone serve`"
        remedy = "set WHETSTONE_HOME to the home of one that runs (the demo's is .whetstone)"
        raise Invalid([Fault("", f"{start}, {remedy}, or set WHETSTONE_URL and WHETSTONE_TOKEN")], "")
    return given or noted.get("url") or DEFAULT_URL, secret


def noted_server(home: Path) -> dict[str, str]:
    """What the server that runs in `home` has noted: url, token, worker (a token), pid. Empty where none runs."""
    try:
        noted: dict[str, str] = json.loads(server_note(home).read_text())
        os.kill(int(noted["pid"]), 0)
        command = Path(f"/proc/{noted['pid']}/cmdline")
        alive = not command.exists() or b"serve" in command.read_bytes()  # the number may be somebody else's by now
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return noted if alive else {}


def _same_place(one: str, other: str) -> bool:
    """Whether two addresses are of one server on this machine, however each is spelt."""
    parts = [urlsplit(each if "//" in each else f"//{each}") for each in (one, other)]
    hosts = ["127.0.0.1" if part.hostname == "localhost" else part.hostname for part in parts]
    return hosts[0] == hosts[1] and parts[0].port == parts[1].port
