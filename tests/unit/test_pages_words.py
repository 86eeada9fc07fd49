"""How pages write numbers and times, and that the vendored scripts are what they claim."""

from __future__ import annotations

import hashlib
import math
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import api
from api.pages import words

VENDOR = Path(api.__file__).parent / "static" / "vendor"


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0.032, "3.2e-2"), (0.0001, "1e-4"), (-0.01234, "-1.23e-2"), (0.0, "0"), (0.1, "0.1"), (0.71349, "0.7135"),
        (12.5, "12.5"), (128, "128"), (128.0, "128"), (8192, "8192"), (38_951_745, "38,951,745"), (2.5e8, "2.5e8"),
        (True, "true"), ("he", "he"), (None, "–"), (math.nan, "not finite"),
    ],
)  # fmt: skip
def test_numbers_are_short_and_readable(value: object, written: str) -> None:
    assert words.number(value) == written


@pytest.mark.parametrize(
    ("seconds", "written"),
    [
        (0.44, "0.4 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min"), (185, "3 min 5 s"),
        (3599.7, "1 h"), (8040, "2 h 14 min"), (90_000, "1 d 1 h"), (None, "–"), (-1, "0.0 s"),
    ],
)  # fmt: skip
def test_durations_read_as_people_say_them(seconds: float | None, written: str) -> None:
    assert words.duration(seconds) == written


def test_a_relative_time_has_the_exact_one_in_its_title() -> None:
    now = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
    written = {
        "just now": timedelta(seconds=-3),
        "42 s ago": timedelta(seconds=42),
        "3 min ago": timedelta(minutes=3, seconds=50),
        "5 h ago": timedelta(hours=5),
        "9 days ago": timedelta(days=9),
        "2025-03-01": timedelta(days=365),
    }
    for text, age in written.items():
        moment = now - age
        markup = str(words.ago(moment, now))
        assert f">{text}</time>" in markup
        assert f'title="{moment:%Y-%m-%d %H:%M:%S} UTC"' in markup


def test_the_vendored_scripts_are_the_ones_that_are_listed() -> None:
    rows = re.findall(r"^\| (\S+\.js) \|.*\| ([0-9a-f]{64}) \|$", (VENDOR / "README.md").read_text(), re.M)
    assert {name for name, _ in rows} == {path.name for path in VENDOR.glob("*.js")}
    for name, digest in rows:
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == digest, name


@pytest.mark.parametrize(
    ("difference", "written"), [(0.0312, "+3.1"), (-0.004, "−0.4"), (0.0, "+0.0"), (-1.0, "−100.0")]
)
def test_a_difference_is_written_in_points_with_its_sign(difference: float, written: str) -> None:
    assert words.points(difference) == written
