"""Our storage is Optuna's: it passes Optuna's own conformance suite, and stock Optuna reads and writes beside it."""

from __future__ import annotations

import pytest
from optuna.storages import BaseStorage
from optuna.testing.pytest_storages import StorageTestCase
from sqlalchemy import Engine

from hpo.storage import PostgresStorage


@pytest.fixture
def storage(engine: Engine) -> BaseStorage:
    return PostgresStorage(engine)


class TestConformance(StorageTestCase):
    """Optuna's suite, each test on a database of its own."""
