"""The app whose pages are looked at, its coordinator, and browsers that are signed in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from starlette.testclient import TestClient

from hpo.coordinator import Coordinator
from tests.integration.pages.app import browser, make_app, sign_in


@pytest.fixture
def app(engine: sa.Engine, tmp_path: Path) -> FastAPI:
    return make_app(engine, tmp_path)


@pytest.fixture
def hpo(app: FastAPI) -> Coordinator:
    made = app.state.coordinator
    assert isinstance(made, Coordinator)
    return made


@pytest.fixture
def admin(app: FastAPI) -> Iterator[TestClient]:
    with browser(app) as client:
        sign_in(client, "admin")
        yield client


@pytest.fixture
def viewer(app: FastAPI) -> Iterator[TestClient]:
    with browser(app) as client:
        sign_in(client, "viewer")
        yield client
