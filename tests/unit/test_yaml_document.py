"""Documents that people type are read as they were meant, or refused for what is wrong with them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hpo import yaml_document as document
from hpo.errors import Invalid


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


@settings(max_examples=150)
@example({"a": "1e3", "b": "2024-01-01", "c": "no", "d": "null", "e": "0x10", "f": ".5", "g": "1_0.0"})
@given(st.dictionaries(st.text("abcxyz_", min_size=1), json_values, min_size=1, max_size=5))
def test_what_is_written_is_read_back_the_same(value: dict[str, object]) -> None:
    text = document.write(value)
    assert document.read(text) == value
    assert yaml.safe_load(text) == value, "and by any other reader of YAML"


@settings(max_examples=300)
@given(st.text(max_size=200) | st.text("[]{}:,&*!|>-?# \n\t'\"a1.e%@`~", max_size=200))
def test_whatever_is_typed_the_answer_is_a_mapping_or_a_fault(text: str) -> None:
    try:
        answer: object = document.read(text)
    except Invalid as error:
        answer = dict.fromkeys(error.faults)
    assert isinstance(answer, dict)
    assert answer or text.strip()


def test_a_fault_says_whose_it_is_and_where() -> None:
    with pytest.raises(Invalid, match=r"study\.yaml has 1 fault") as refused:
        document.read("name: a\nspace: [", at="", what="study.yaml")
    assert refused.value.faults[0].at == "line 2, column 9"
    with pytest.raises(Invalid) as refused:
        document.parse("{a: 1, a: 2}", "settings.net", "--set")
    assert refused.value.faults[0].at == "settings.net, line 1, column 8"
    assert document.parse("1e-6") == 1e-6
    with pytest.raises(Invalid):
        document.parse("x" * 11, most=10)


def test_a_client_reads_documents_without_the_server() -> None:
    program = "import sys, hpo.yaml_document; print({'sqlalchemy', 'optuna', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
