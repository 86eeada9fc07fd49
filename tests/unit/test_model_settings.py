"""Settings that contradict each other are named once each; what null means; and a document reads as what wrote it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from model.settings import BY_LOSS, SETTINGS
from model.spec import Refused, SiameseWorkload, TrainConfig, config

POINT: dict[str, Any] = {"eta": 0.01, "mu": 0.9, "lambda": 1e-4}
MINI: dict[str, Any] = {"net": "mini"}
PXK: dict[str, Any] = {"net": "mini", "batches": "pxk"}
WORKLOAD = SiameseWorkload()


def made(**given_settings: Any) -> TrainConfig:
    return config(POINT, {**MINI, **given_settings}, 0)


@pytest.mark.parametrize(
    ("given_settings", "at", "words"),
    [
        ({"distance": "l2"}, "distance", "must be l1 or squared with loss sigmoid"),
        ({"distance": "cosine"}, "distance", "must be l1 or squared with loss sigmoid"),
        ({"normalise": True}, "normalise", "not with loss sigmoid"),
        ({"loss": "softmax"}, "loss", "set batches to pxk"),
        ({"mining": "semi-hard"}, "mining", "goes with loss triplet only"),
        ({"loss": "contrastive", "mining": "semi-hard"}, "mining", "goes with loss triplet only"),
        ({"loss": "classes"}, "classes", "is missing"),
        ({"batches": "pxk", "fixed_pairs": 1000}, "fixed_pairs", "goes with batches pairs"),
        ({"loss": "triplet", "fixed_pairs": 1000}, "fixed_pairs", "(sigmoid, contrastive)"),
        ({"fixed_pairs": 14, "distort": False}, "batch_pairs", "larger than the training set, which has 14 pairs"),
        ({"fixed_pairs": 14}, "batch_pairs", "which has 126 pairs"),
        ({"fixed_pairs": 14, "distorted_copies": 2}, "batch_pairs", "which has 42 pairs"),
        ({"batches": "pxk", "characters": 5}, "characters", "must be a multiple of alphabets (2)"),
        ({"batches": "pxk", "characters": 4, "alphabets": 4}, "characters", "at least 2 for each of 4 alphabets"),
        ({"data": "folder"}, "folder", "is missing"),
        ({"folder": "mine"}, "folder", "goes with data folder only"),
        ({"data": "folder", "folder": "../mine"}, "folder", "must be a plain relative name"),
        ({"data": "folder", "folder": "/etc"}, "folder", "must be a plain relative name"),
        ({"data": "folder", "folder": "a\\..\\b"}, "folder", "must be a plain relative name"),
        ({"data": "folder", "folder": "C:mine"}, "folder", "must be a plain relative name"),
        ({"data": "folder", "folder": "./."}, "folder", "must be a plain relative name"),
        ({"data": "mnist", "way": 20}, "way", "MNIST has 10 digits"),
        ({"way": 47}, "way", "from 2 to 46"),
        ({"dropout": 0.5}, "dropout", "fc has one"),
        ({"optimizer": "adam", "mu": 1}, "mu", "must be below 1"),
        ({"optimizer": "adam", "mu": {"fc": 1}}, "mu", "must be below 1"),
        ({"optimizer": "adam", "momentum_start": 1}, "momentum_start", "must be below 1"),
        ({"channels": 2}, "channels", "must be 1 (grey) or 3 (colour)"),
        ({"kernel": 15}, "net", "runs out of pixels"),
    ],
)
def test_a_contradiction_is_named_once_with_its_place(given_settings: dict[str, Any], at: str, words: str) -> None:
    (fault,) = WORKLOAD.check({**MINI, **given_settings})
    assert fault.at == at
    assert words in fault.fault


def test_contradictions_are_named_all_at_once() -> None:
    faults = WORKLOAD.check(
        {**MINI, "loss": "softmax", "mining": "semi-hard", "fixed_pairs": 500, "folder": "mine", "way": 47}
    )
    assert sorted(fault.at for fault in faults) == ["fixed_pairs", "folder", "loss", "mining", "way"]


@pytest.mark.parametrize(
    "given_settings",
    [
        {"fixed_pairs": 128, "distort": False},
        {"fixed_pairs": 15},
        {"optimizer": "adam", "momentum_start": 1, "momentum_epochs": 0},
        {"mu": 1},
        {"loss": "triplet", "mining": "semi-hard"},
        {"loss": "triplet", "batches": "pxk", "mining": "semi-hard"},
        {"loss": "contrastive", "distance": "cosine", "normalise": True, "fixed_pairs": 500},
        {"dropout": 0.5, "fc": [64, 32]},
        {"data": "folder", "folder": "mine", "way": 100},
    ],
)
def test_what_goes_together_is_not_refused(given_settings: dict[str, Any]) -> None:
    assert WORKLOAD.check({**MINI, **given_settings}) == []


@pytest.mark.parametrize(
    ("given_settings", "at", "words"),
    [
        ({"loss": "tripet"}, "loss", "did you mean triplet?"),
        ({"loss": "hinge"}, "loss", "must be one of sigmoid, contrastive, triplet, softmax, classes"),
        ({"distance": "cosin"}, "distance", "did you mean cosine?"),
        ({"optimizer": "adm"}, "optimizer", "did you mean adam?"),
        ({"batches": "pkx"}, "batches", "did you mean pxk?"),
        ({"margine": 1}, "margine", "did you mean margin?"),
        ({"eta": {"cov1": 0.1}}, "eta.cov1", "did you mean conv1?"),
        ({"fc": [32, 16], "eta": {"fc": 0.1}}, "eta.fc", "did you mean fc"),
        ({"loss": "tripet", "eta": {"output": 0.1}}, "loss", "did you mean triplet?"),
    ],
)
def test_an_unknown_name_is_answered_with_a_near_one(given_settings: dict[str, Any], at: str, words: str) -> None:
    (fault,) = WORKLOAD.check({**MINI, **given_settings})
    assert fault.at == at
    assert words in fault.fault
    reason = WORKLOAD.feasible({**POINT, **given_settings}, MINI)
    assert reason is not None
    assert words in reason


@pytest.mark.parametrize("loss", BY_LOSS)
def test_null_takes_what_suits_the_loss_and_a_value_stands(loss: str) -> None:
    needs = {"softmax": {"batches": "pxk"}, "classes": {"classes": 9}}.get(loss, {})
    plain, null = made(loss=loss, **needs), made(loss=loss, **needs, **dict.fromkeys(BY_LOSS[loss]))
    assert plain == null
    assert {name: getattr(plain, name) for name in BY_LOSS[loss]} == BY_LOSS[loss]
    assert (plain.net.distance, plain.net.normalise, plain.net.activation) == (
        plain.distance,
        plain.normalise,
        plain.activation,
    )
    told = made(loss=loss, **needs, margin=0.625, activation="tanh")
    assert (told.margin, told.net.activation) == (0.625, "tanh")


def test_the_defaults_are_the_paper_s_head_and_loss() -> None:
    plain = made()
    assert (plain.loss, plain.distance, plain.activation, plain.net.head) == ("sigmoid", "l1", "sigmoid", "weighted")
    assert (plain.batches, plain.optimizer, plain.norm, plain.average, plain.rotations) == (
        "pairs",
        "sgd",
        "none",
        0.0,
        False,
    )


@pytest.mark.parametrize(
    ("given_settings", "labels"),
    [
        ({}, ("conv1", "conv2", "conv3", "conv4", "fc", "output")),
        ({"fc": [64]}, ("conv1", "conv2", "conv3", "conv4", "fc", "output")),
        ({"fc": [64, 32]}, ("conv1", "conv2", "conv3", "conv4", "fc1", "fc2", "output")),
        ({"loss": "contrastive"}, ("conv1", "conv2", "conv3", "conv4", "fc")),
        ({"loss": "triplet", "fc": [9, 8, 7]}, ("conv1", "conv2", "conv3", "conv4", "fc1", "fc2", "fc3")),
        ({"loss": "classes", "classes": 7}, ("conv1", "conv2", "conv3", "conv4", "fc", "output")),
    ],
)
def test_rates_are_given_by_the_layers_that_have_weights(
    given_settings: dict[str, Any], labels: tuple[str, ...]
) -> None:
    recipe = made(**given_settings)
    assert tuple(layer.label for layer in recipe.layers) == recipe.net.labels == labels
    each = {label: 0.1 + i for i, label in enumerate(labels)}
    assert [layer.eta for layer in config({**POINT, "eta": each}, {**MINI, **given_settings}, 0).layers] == list(
        each.values()
    )
    if "output" not in labels:
        with pytest.raises(Refused, match=r"eta\.output: is no layer of this network"):
            config({**POINT, "eta": {**each, "output": 0.1}}, {**MINI, **given_settings}, 0)


def test_the_temperature_follows_the_size_of_distances() -> None:
    assert made(loss="softmax", batches="pxk", distance="cosine").temperature == 0.1
    assert made(loss="softmax", batches="pxk", normalise=True).temperature == 0.1
    assert made(loss="softmax", batches="pxk", fc=[64, 40]).temperature == 2.0
    assert made(loss="softmax", batches="pxk", temperature=0.5, fc=40).temperature == 0.5


@pytest.mark.parametrize(
    ("value", "words"),
    [([], "1 to 8 entries"), ([1] * 9, "1 to 8 entries"), ([8, 0], "each entry must be"), ([8, "9"], "not text")],
)
def test_a_list_of_layers_that_is_none_is_refused(value: Any, words: str) -> None:
    for document, at in (({**MINI, "fc": value}, "fc"), ({"net": {"input": 8, "conv": CONV, "fc": value}}, "net.fc")):
        (fault,) = WORKLOAD.check(document)
        assert fault.at == at
        assert words in fault.fault


CONV = [{"filters": 4, "kernel": 3}]


@pytest.mark.parametrize("value", ["", "a\nb", "x" * 1025, 3, ["a"]])
def test_a_path_that_is_none_is_refused(value: Any) -> None:
    (fault,) = WORKLOAD.check({**MINI, "transfer": value})
    assert fault.at == "transfer"


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "loss": st.sampled_from(["sigmoid", "contrastive", "triplet", "softmax", "classes"]),
    "distance": st.sampled_from([None, "l1", "l2", "squared", "cosine"]),
    "normalise": st.sampled_from([None, True, False]),
    "activation": st.sampled_from([None, "sigmoid", "relu", "tanh", "none"]),
    "dropout": st.sampled_from([0.0, 0.5]),
    "norm": st.sampled_from(["none", "batch"]),
    "margin": st.none() | st.floats(1e-3, 10),
    "mining": st.sampled_from(["none", "semi-hard"]),
    "temperature": st.none() | st.floats(1e-3, 10),
    "classes": st.none() | st.integers(2, 1000),
    "batches": st.sampled_from(["pairs", "pxk"]),
    "fixed_pairs": st.none() | st.integers(2, 10**6),
    "distorted_copies": st.integers(1, 64),
    "characters": st.integers(2, 64),
    "alphabets": st.integers(1, 4),
    "distort": st.booleans(),
    "rotations": st.booleans(),
    "optimizer": st.sampled_from(["sgd", "adam"]),
    "init": st.sampled_from(["he", "paper", "keras2017"]),
    "transfer": st.sampled_from([None, "runs/1"]),
    "schedule": st.sampled_from(["exponential", "cosine"]),
    "average": st.floats(0, 0.99999),
    "momentum_start": st.sampled_from([0.0, 0.5, 1.0]),
    "data": st.sampled_from(["auto", "omniglot", "mnist", "folder"]),
    "folder": st.sampled_from([None, "mine"]),
    "way": st.integers(2, 60),
    "shot": st.integers(1, 5),
    "fc": st.integers(1, 64) | st.lists(st.integers(1, 64), min_size=1, max_size=4),
    "channels": st.sampled_from([1, 3]),
    "input": st.integers(20, 60),
    "mu": st.sampled_from([0.0, 0.5, 1.0]),
}


def test_the_values_below_are_settings() -> None:
    assert set(VALUES) <= set(SETTINGS) | {"fc", "channels", "input", "mu"}


some = st.lists(st.sampled_from(sorted(VALUES)), max_size=4, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: VALUES[name] for name in names})
)


@given(some)
@settings(max_examples=200)
def test_a_document_reads_as_the_recipe_that_wrote_it(document: dict[str, Any]) -> None:
    faults = WORKLOAD.check({**MINI, **document})
    assume(not faults)
    recipe = config({"eta": 0.1, "lambda": 0, "mu": document.get("mu", 0.5)}, {**MINI, **document}, 5)
    again = config(**json.loads(json.dumps(recipe.document())))
    assert again == recipe
    assert None not in (recipe.distance, recipe.normalise, recipe.activation, recipe.margin, recipe.temperature)


@given(st.fixed_dictionaries({}, optional=VALUES))
@settings(max_examples=200)
def test_whatever_contradicts_itself_no_fault_is_named_twice(document: dict[str, Any]) -> None:
    faults = WORKLOAD.check({**MINI, **document})
    assert len(set(faults)) == len(faults)
    if faults:
        with pytest.raises(Refused) as refused:
            config({"eta": 0.1, "lambda": 0, "mu": document.get("mu", 0.5)}, {**MINI, **document}, 5)
        assert refused.value.faults == tuple(faults)
