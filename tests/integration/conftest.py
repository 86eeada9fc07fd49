"""A database for a whole module of tests, for those that only look or that are refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine

from tests import conftest as root


@pytest.fixture(scope="module")
def module_engine(postgres_server: str, _template: str) -> Iterator[Engine]:
    """An engine on a fresh, migrated database that the tests of one module share."""
    with root._made(postgres_server, _template) as name:
        made = root.connect(root._named(postgres_server, name))
        yield made
        made.dispose()
