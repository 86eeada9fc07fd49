"""What a study of Siamese networks may ask for, and how what it may not is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.geometry import MINI, PAPER, Conv, NetConfig
from model.spec import FROZEN, HYPERPARAMETERS, SETTINGS, Refused, SiameseWorkload, config

WORKLOAD = SiameseWorkload()
POINT: dict[str, Any] = {"eta": 0.01, "mu": 0.9, "lambda": 1e-4}
MINI_STUDY: dict[str, Any] = {"net": "mini"}


def places(settings: Any) -> list[str]:
    return [fault.at for fault in WORKLOAD.check(settings)]


def test_the_paper_s_network_has_its_published_number_of_parameters() -> None:
    assert PAPER.parameters == 38_951_745
    assert PAPER.sides == (48, 21, 9, 6)
    assert PAPER.features == 9216
    assert MINI.parameters == 331_841
    assert MINI.labels == PAPER.labels == ("conv1", "conv2", "conv3", "conv4", "fc", "output")


def test_the_cost_of_an_image_is_the_measured_one() -> None:
    assert pytest.approx(1.82e9, rel=0.01) == PAPER.flops


def test_a_point_s_footprint_grows_with_what_takes_memory_and_with_nothing_else() -> None:
    study = {"net": "mini", "batch_pairs": 64}

    def footprint(point: dict[str, Any], **settings: Any) -> float:
        size = WORKLOAD.footprint({**POINT, **point}, {**study, **settings})
        assert size is not None
        return size

    plain = footprint({})
    for larger in (
        {"batch_pairs": 128},
        {"filters": {"conv1": 64}},
        {"fc": 1024},
        {"input": 35},
        {"optimizer": "adam"},
    ):
        assert footprint(larger) > plain, larger
    for smaller in ({"batch_pairs": 32}, {"precision": "bf16"}, {"filters": {"conv4": 64}}):
        assert footprint(smaller) < plain, smaller
    assert footprint({"eta": 0.1, "mu": 0.5}, epochs=3, pairs_per_epoch=1000) == plain
    assert WORKLOAD.footprint({**POINT, "kernel": {"conv1": 900}}, study) is None
    # The paper's network, 128 pairs: its weights three times, and what 256 images leave behind.
    paper = WORKLOAD.footprint(POINT, {"net": "paper"})
    assert paper == 4 * 3 * PAPER.parameters + 8 * 256 * PAPER.activations
    assert PAPER.activations == 105**2 + 64 * (96**2 + 48**2) + 128 * (42**2 + 21**2 + 18**2 + 9**2) + 256 * 36 + 4096


def test_a_plain_study_has_no_fault() -> None:
    for net in ("paper", "mini", MINI.document(), PAPER.document()):
        assert WORKLOAD.check({"net": net}) == []
        assert WORKLOAD.feasible(POINT, {"net": net}) is None


def test_a_spelled_out_network_is_the_named_one() -> None:
    assert config(POINT, {"net": MINI.document()}, 0).net == MINI
    assert config(POINT, {"net": "mini"}, 0).net == MINI


def test_every_fault_is_named_in_one_pass_with_its_place() -> None:
    settings = {
        "net": {"input": 28, "conv": [{"filters": 4, "kernal": 5}, 7, {"filters": True, "kernel": 2, "pool": "up"}]},
        "epoch": 3,
        "batch_pairs": True,
        "decay": float("nan"),
        "momentum_start": 1.5,
        "init": "hee",
        "epochs": 0,
        "patience": "20",
        "max_seconds": float("inf"),
        "distort": 1,
        "eta": -1,
        "mu": {"conv1": 2},
    }
    assert sorted(places(settings)) == sorted(
        [
            "net.conv[0].kernal",
            "net.conv[0].kernel",
            "net.conv[1]",
            "net.conv[2].filters",
            "net.conv[2].pool",
            "net.fc",
            "epoch",
            "batch_pairs",
            "decay",
            "momentum_start",
            "init",
            "epochs",
            "patience",
            "max_seconds",
            "distort",
            "eta",
            "mu.conv1",
        ]
    )


@pytest.mark.parametrize(
    ("settings", "at", "words"),
    [
        ({"net": "mini", "epoch": 3}, "epoch", "did you mean epochs?"),
        ({"net": "papr"}, "net", "did you mean paper?"),
        ({"net": "mini", "init": "hee"}, "init", "did you mean he?"),
        ({"net": "mini", "max_seconds": "1e-4"}, "max_seconds", "write 1.0e-4"),
        ({"net": "mini", "batch_pairs": 2.5}, "batch_pairs", "an integer from 2"),
        ({"net": "mini", "eta": {"conv9": 1}}, "eta.conv9", "no layer of this network"),
        ({"net": "mini", "kernel": {"fc": 3}}, "kernel.fc", "no layer"),
        ({}, "net", "is missing"),
        ({"net": "mini", "epochs": 10**5000}, "epochs", "it is larger"),
        ({"net": "mini", "decay": 10**5000}, "decay", "it is too large"),
        ({"net": {"input": 28, "conv": [], "fc": 1}}, "net.conv", "a list of 1 to 32 convolutions"),
    ],
)
def test_a_fault_says_what_is_right(settings: Any, at: str, words: str) -> None:
    (fault,) = WORKLOAD.check(settings)
    assert fault.at == at
    assert words in fault.fault


@pytest.mark.parametrize("settings", [None, [], "net", 3, True])
def test_settings_that_are_no_object_are_a_fault_not_a_crash(settings: Any) -> None:
    assert len(WORKLOAD.check(settings)) == 1
    assert WORKLOAD.feasible(POINT, settings) is not None
    assert WORKLOAD.feasible(settings, MINI_STUDY) is not None


def test_an_integer_written_as_a_real_is_an_integer() -> None:
    """JSON knows no difference, and a sampler may hand over 64.0."""
    recipe = config({**POINT, "batch_pairs": 64.0}, MINI_STUDY, 0)
    assert recipe.batch_pairs == 64
    assert type(recipe.batch_pairs) is int


def test_the_layer_that_runs_out_of_pixels_is_named() -> None:
    deep = {"input": 28, "conv": [{"filters": 4, "kernel": 9, "pool": True}] * 3, "fc": 8}
    (fault,) = WORKLOAD.check({"net": deep})
    assert fault.at == "net"
    assert "conv3 runs out of pixels: its 9 x 9 kernel does not fit the 1 x 1" in fault.fault
    pooled = NetConfig(8, (Conv(4, 8, "floor"),), (8,))
    assert "the pooling after conv1" in (pooled.fault() or "")
    assert NetConfig(8, (Conv(4, 8, "ceil"),), (8,)).fault() is None


def test_a_network_too_large_to_be_meant_is_refused() -> None:
    assert "parameters, more than" in WORKLOAD.check({"net": "paper", "fc": 1_000_000})[0].fault


def test_a_point_may_sweep_the_architecture_and_is_refused_where_no_pixels_are_left() -> None:
    assert WORKLOAD.feasible({**POINT, "kernel": {"conv2": 2}, "filters": 16, "fc": 64}, MINI_STUDY) is None
    recipe = config({**POINT, "kernel": {"conv2": 2}}, {"net": "mini", "kernel": {"conv1": 4}}, 0)
    assert [layer.kernel for layer in recipe.net.conv] == [4, 2, 2, 2]
    reason = WORKLOAD.feasible({**POINT, "kernel": {"conv4": 9}}, MINI_STUDY)
    assert reason is not None
    assert "conv4 runs out of pixels" in reason


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"etta": 1.0}, "etta: is not a hyperparameter or setting of this network; did you mean eta?"),
        ({"eta": {"conv1": 0.1, "conv7": 0.1}}, "eta.conv7"),
        (
            {"eta": {"conv1": 0.1}},
            "eta: has no value for conv2, conv3, conv4, fc, output: give it one in the space or in settings",
        ),
        ({"eta": 0}, "eta: must be a number, greater than 0"),
        ({"mu": {**dict.fromkeys(MINI.labels, 0.5), "fc": 1.01}}, "mu.fc: must be a number, at least 0 and at most 1"),
        ({"lambda": -1e-9}, "lambda: must be a number, at least 0"),
        ({"mu": True}, "mu: must be a number"),
        ({"mu": None}, "mu: must be a number"),
        ({"init": "xavier"}, "init: must be one of he, paper"),
    ],
)
def test_a_point_outside_the_domain_is_never_feasible(change: Any, words: str) -> None:
    assert words in (WORKLOAD.feasible({**POINT, **change}, MINI_STUDY) or "")


@pytest.mark.parametrize("name", sorted(HYPERPARAMETERS))
def test_a_hyperparameter_that_nobody_gives_is_missing(name: str) -> None:
    point = {key: value for key, value in POINT.items() if key != name}
    reason = f"{name}: has no value for conv1, conv2, conv3, conv4, fc, output: give it one in the space or in settings"
    assert WORKLOAD.feasible(point, MINI_STUDY) == reason
    assert WORKLOAD.feasible(point, {**MINI_STUDY, name: 0.5}) is None


def test_a_point_s_own_label_wins_over_what_the_settings_fix() -> None:
    recipe = config({"eta": {"fc": 0.2}, "mu": 0.9, "lambda": 0}, {**MINI_STUDY, "eta": 0.1}, 0)
    assert [layer.eta for layer in recipe.layers] == [0.1, 0.1, 0.1, 0.1, 0.2, 0.1]


@pytest.mark.parametrize("name", sorted(FROZEN))
def test_what_the_objective_measures_cannot_be_swept(name: str) -> None:
    point = {**POINT, name: SETTINGS[name][1]}
    assert "must not be swept" in (WORKLOAD.feasible(point, MINI_STUDY) or "")


def test_labels_are_those_of_the_network_that_the_point_chooses() -> None:
    two = {"input": 28, "conv": [{"filters": 4, "kernel": 5, "pool": True}, {"filters": 4, "kernel": 3}], "fc": 8}
    rates = dict.fromkeys(("conv1", "conv2", "fc", "output"), 0.1)
    assert WORKLOAD.feasible({"eta": rates, "mu": 0.9, "lambda": 0}, {"net": two}) is None
    assert "eta: has no value for conv3, conv4" in (
        WORKLOAD.feasible({"eta": rates, "mu": 0.9, "lambda": 0, "net": "mini"}, {"net": two}) or ""
    )


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, True, "0", None])
def test_a_seed_that_is_none_is_refused(seed: Any) -> None:
    with pytest.raises(Refused, match="seed"):
        config(POINT, MINI_STUDY, seed)


def test_l2_decays_a_weight_by_twice_lambda() -> None:
    assert config({**POINT, "lambda": 0.05}, MINI_STUDY, 0).layers[0].weight_decay == 0.1


def test_an_epoch_is_its_pairs_rounded_up_to_whole_batches() -> None:
    assert config(POINT, {**MINI_STUDY, "pairs_per_epoch": 256}, 0).steps_per_epoch == 2
    assert config(POINT, {**MINI_STUDY, "pairs_per_epoch": 257}, 0).steps_per_epoch == 3


def test_checking_a_study_needs_no_torch() -> None:
    code = "import sys, model.spec; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers()
    | st.sampled_from([0, 1]).map(lambda sign: (2 * sign - 1) * 10**400)
    | st.text(st.characters(exclude_categories=[]), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=5) | st.sampled_from(["conv1", "input", "conv", "fc", "filters"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)
names = st.sampled_from(["net", "filters", "kernel", "fc", *HYPERPARAMETERS, *SETTINGS]) | st.text(
    st.characters(exclude_categories=[]), max_size=6
)


@given(st.dictionaries(names, anything, max_size=5), st.dictionaries(names, anything, max_size=5), st.booleans())
def test_whatever_comes_in_is_answered_in_words_that_can_be_sent(settings: Any, point: Any, sane: bool) -> None:
    if sane:
        settings = {**settings, "net": "mini"}
    for fault in WORKLOAD.check(settings):
        str(fault).encode()
        assert len(str(fault)) < 600
    reason = WORKLOAD.feasible(point, settings)
    if reason is None:
        recipe = config(point, settings, 7)
        assert config(**json.loads(json.dumps(recipe.document()))) == recipe
    else:
        reason.encode()
        with pytest.raises(Refused):
            config(point, settings, 7)


rates = st.floats(1e-6, 1.0)


@given(
    st.fixed_dictionaries(
        {"eta": rates, "mu": rates, "lambda": rates},
        optional={
            "init": st.sampled_from(["he", "paper"]),
            "batch_pairs": st.integers(2, 512),
            "decay": st.floats(0.1, 1.0),
            "fc": st.integers(1, 512),
            "filters": st.dictionaries(st.sampled_from(MINI.labels[:4]), st.integers(1, 64)),
            "distort": st.booleans(),
            "patience": st.none() | st.integers(1, 9),
        },
    )
)
def test_a_checkpoint_s_recipe_is_the_trial_s(point: Any) -> None:
    recipe = config(point, {"net": "mini", "max_seconds": 12.5}, 3)
    assert config(**json.loads(json.dumps(recipe.document()))) == recipe
