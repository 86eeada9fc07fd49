"""PostgreSQL stopped at once in the middle of studies: what was acknowledged stays, and no worker ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.outage import outage


@pytest.mark.slow
def test_an_immediate_stop_of_postgres_loses_nothing_acknowledged_and_ends_no_worker(tmp_path: Path) -> None:
    """Three seconds away, with leases of two; `make soak` has 0, 20 and 60."""
    outage(tmp_path, 3.0)
