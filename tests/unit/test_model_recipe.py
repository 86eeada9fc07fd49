"""A file of hyperparameters is read safely, and every fault in it is named at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.recipe import load_recipe
from model.spec import Refused, config

GOOD = """
params:
  eta: {conv1: 0.1, conv2: 0.1, conv3: 0.1, conv4: 0.1, fc: 0.1, output: 0.05}
  mu: 0.9
  lambda: 1.0e-4
settings: {net: mini, epochs: 20}
seed: 3
"""


def faults(path: Path) -> list[str]:
    with pytest.raises(Refused) as refused:
        load_recipe(path)
    return [str(fault) for fault in refused.value.faults]


def test_a_recipe_is_what_a_trial_is_made_of(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    params, settings, seed = load_recipe(path)
    recipe = config(params, settings, seed)
    assert (recipe.epochs, recipe.seed, recipe.layers[-1].eta) == (20, 3, 0.05)
    path.write_text("params: &p {eta: 1, mu: 0, lambda: 0}\nsettings: {net: paper}")
    assert load_recipe(path)[2] == 0


@pytest.mark.parametrize(("written", "number"), [("1e-4", 1e-4), ("1.E+0", 1.0), (".5e-1", 0.05), ("1.0e-4", 1e-4)])
def test_numbers_are_read_as_people_write_them(tmp_path: Path, written: str, number: float) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"params: {{eta: {written}, mu: 0, lambda: '1e-4'}}\nsettings: {{net: mini}}")
    (fault,) = faults(path)
    assert fault.startswith("lambda:"), "in quotes it is text"
    path.write_text(f"params: {{eta: {written}, mu: 0, lambda: 0}}\nsettings: {{net: mini}}")
    assert load_recipe(path)[0]["eta"] == number


def test_every_fault_is_named(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("params: {eta: a, mu: 2}\nsettings: {net: mini, epoch: 3}\nseeds: 4\nseed: -1")
    found = faults(path)
    assert len(found) == 6
    for words in ("seeds", "did you mean seed", "epoch: is not a setting", "mu: must be", "eta: must be", "lambda"):
        assert any(words in fault for fault in found), words
    assert any(fault.startswith("seed:") for fault in found)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must hold params"),
        ("- 1", "must hold params"),
        ("params: {eta: 1", "not readable as YAML"),
        ("params: {eta: 1, eta: 2}", "eta stands twice"),
        ("params: !!python/object/apply:os.system ['touch ran']", "not readable as YAML"),
        ("[" * 100_000, "not readable as YAML"),
        ("params: {? [1]: 2}", "not readable as YAML"),
        ("a: \x00", "not readable as YAML"),
        ("settings: {net: mini}", "params: is missing"),
        ("params: 3\nsettings: [1]", "must be an object"),
        ("#" * 2**21, "larger than 1 MB"),
    ],
)
def test_what_is_no_recipe_is_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert any(words in fault for fault in faults(path))
    assert not (tmp_path / "ran").exists()


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    (fault,) = faults(tmp_path / "nothing.yaml")
    assert "nothing.yaml: cannot be read: No such file" in fault
    assert "cannot be read" in faults(tmp_path)[0]
