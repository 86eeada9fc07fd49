"""Spaces side by side: one lies within another only if each of its points does, and what they share can be tried."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpo.nesting import shared, shared_names, why_not_nested
from hpo.parameters import read_space
from hpo.space import SearchSpace

LABELS = ["a", "b", "c"]
FLOAT = {"name": "x", "type": "float", "low": 0.0, "high": 1.0}
WHOLE = {"name": "n", "type": "integer", "low": 0, "high": 8}
CHOICE = {"name": "k", "type": "categorical", "choices": ["one", "two", 3]}
VECTOR = FLOAT | {"labels": LABELS}


def space(*parameters: dict[str, Any]) -> SearchSpace:
    made, faults = read_space(list(parameters))
    assert made is not None, faults
    return made


@pytest.mark.parametrize(
    ("source", "target", "nested"),
    [
        (FLOAT, FLOAT, True),
        (FLOAT | {"low": 0.25}, FLOAT, True),
        (FLOAT, FLOAT | {"low": 0.25}, False),
        (FLOAT | {"low": 0.25, "log": True}, FLOAT, True),
        (FLOAT | {"step": 0.5}, FLOAT, True),
        (FLOAT, FLOAT | {"step": 0.5}, False),
        (FLOAT | {"step": 0.5}, FLOAT | {"step": 0.25}, True),
        (FLOAT | {"step": 0.25}, FLOAT | {"step": 0.5}, False),
        (FLOAT | {"low": 0.25, "high": 0.75, "step": 0.5}, FLOAT | {"step": 0.5}, False),
        (FLOAT | {"low": 0.5, "high": 0.5}, FLOAT | {"step": 0.5}, True),
        (WHOLE | {"low": 2, "high": 6}, WHOLE, True),
        (WHOLE, WHOLE | {"step": 2}, False),
        (WHOLE | {"step": 4}, WHOLE | {"step": 2}, True),
        (WHOLE | {"name": "x", "high": 1}, FLOAT, False),
        (CHOICE | {"choices": [3, "one"]}, CHOICE, True),
        (CHOICE, CHOICE | {"choices": [3, "one"]}, False),
        (CHOICE | {"choices": [True]}, CHOICE | {"choices": [1]}, False),
        (VECTOR | {"tied": True}, VECTOR, True),
        (VECTOR, VECTOR | {"tied": True}, False),
        (VECTOR | {"tied": {"g": ["a", "b"], "h": ["c"]}}, VECTOR | {"tied": {"i": ["a", "b"], "j": ["c"]}}, True),
        (VECTOR | {"tied": True}, VECTOR | {"tied": {"i": ["a", "b"], "j": ["c"]}}, True),
        (VECTOR | {"tied": {"i": ["a", "b"], "j": ["c"]}}, VECTOR | {"tied": True}, False),
        (VECTOR | {"labels": ["c", "b", "a"]}, VECTOR, True),
        (VECTOR | {"labels": ["a", "b"]}, VECTOR, False),
        (VECTOR, VECTOR | {"labels": ["a", "b"]}, False),
        (FLOAT, VECTOR, False),
    ],
)
def test_a_space_lies_within_another_where_each_of_its_points_does(
    source: dict[str, Any], target: dict[str, Any], nested: bool
) -> None:
    theirs, ours = space(source), space(target)
    assert (why_not_nested(theirs, ours) == "") is nested
    rng = np.random.default_rng(0)
    points = [theirs.nest(theirs.random(rng)) for _ in range(50)]
    fits = all(not ours.read(point)[1] for point in points)
    # A whole number can be read as a float, and one value as a vector's, but they are stored otherwise.
    otherwise = source["type"] != target["type"] or ("labels" in source) != ("labels" in target)
    assert fits is nested or otherwise


def test_a_parameter_more_or_less_is_no_nesting() -> None:
    assert why_not_nested(space(FLOAT), space(FLOAT, WHOLE)) == "n is not searched there"
    assert why_not_nested(space(FLOAT, WHOLE), space(FLOAT)) == "n is not searched here"


def test_what_is_shared_is_what_can_be_tried_here() -> None:
    ours = space(VECTOR, WHOLE, CHOICE)
    assert shared({"x": 0.5, "n": 4, "other": 1}, ours) == {"x[a]": 0.5, "x[b]": 0.5, "x[c]": 0.5, "n": 4}
    assert shared({"x": {"a": 0.5, "c": 7.0, "d": 0.1}, "k": "four"}, ours) == {"x[a]": 0.5}
    assert shared({"n": 4.5, "k": {"a": 3}}, ours) == {}
    tied = space(VECTOR | {"tied": {"g": ["a", "b"], "h": ["c"]}})
    assert shared({"x": {"a": 0.5, "b": 0.5}}, tied) == {"x[a]": 0.5, "x[b]": 0.5}
    assert shared({"x": {"a": 0.5, "b": 0.25, "c": 0.1}}, tied) == {"x[c]": 0.1}, "a tied group has one value"
    assert shared({"x": {"b": 0.5}}, tied) == {"x[a]": 0.5, "x[b]": 0.5}
    assert shared_names(space(FLOAT | {"labels": ["d"]}, CHOICE), space(VECTOR, CHOICE)) == ["k"]


@given(st.integers(0, 1000), st.sampled_from([FLOAT, VECTOR, VECTOR | {"tied": True}, FLOAT | {"high": 3.0}]))
def test_what_is_shared_is_a_partial_point(seed: int, source: dict[str, Any]) -> None:
    theirs, ours = space(source), space(VECTOR | {"tied": {"g": ["a", "b"], "h": ["c"]}})
    found = shared(theirs.nest(theirs.random(np.random.default_rng(seed))), ours)
    assert ours.read(ours.nest(found), partial=True) == (found, [])
