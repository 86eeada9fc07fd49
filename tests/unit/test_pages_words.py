"""How pages write numbers and times, how they read documents, and that the vendored scripts are what they claim."""

from __future__ import annotations

import hashlib
import math
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

import api
from api.pages import document, words
from hpo.errors import Invalid

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


def test_a_document_is_read_as_people_write_it() -> None:
    text = "a: 1e-4\nb: [.5, 3, 1E3, -2.5e-3]\nc: {on: 2024-01-01}\n"
    assert document.read(text) == {"a": 1e-4, "b": [0.5, 3, 1000.0, -2.5e-3], "c": {True: "2024-01-01"}}
    assert document.read('{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a: &x [1]\nb: *x", "uses an alias"),
        ("[" * 100_000, "nested more than 32 deep"),
        ("name: a\nname: b", "stands here twice"),
        ("a: " + "x" * 300_000, "longer than"),
        ("- a", "must be a mapping"),
        ("", "is empty"),
        ("a: !!python/object/apply:os.system ['true']", "neither YAML nor JSON"),
    ],
)
def test_a_dangerous_or_doubtful_document_is_refused_for_what_it_is(text: str, fault: str) -> None:
    with pytest.raises(Invalid) as refused:
        document.read(text)
    assert fault in str(refused.value.faults[0])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abcxyz_", min_size=1), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@example({"a": "1e3", "b": "2024-01-01", "c": "no", "d": "null", "e": "0x10", "f": ".5", "g": "1_0.0"})
@given(st.dictionaries(st.text("abcxyz_", min_size=1), json_values, min_size=1, max_size=5))
def test_what_is_written_is_read_back_the_same(value: dict[str, object]) -> None:
    text = document.write(value)
    assert document.read(text) == value
    assert yaml.safe_load(text) == value, "and by any other reader of YAML"


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200) | st.text("[]{}:,&*!|>-?# \n\t'\"a1.e%@`~", max_size=200))
def test_whatever_is_typed_the_answer_is_a_mapping_or_a_fault(text: str) -> None:
    try:
        answer: object = document.read(text)
    except Invalid as error:
        answer = dict.fromkeys(error.faults)
    assert isinstance(answer, dict)
    assert answer or text.strip()


def test_the_vendored_scripts_are_the_ones_that_are_listed() -> None:
    rows = re.findall(r"^\| (\S+\.js) \|.*\| ([0-9a-f]{64}) \|$", (VENDOR / "README.md").read_text(), re.M)
    assert {name for name, _ in rows} == {path.name for path in VENDOR.glob("*.js")}
    for name, digest in rows:
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == digest, name
