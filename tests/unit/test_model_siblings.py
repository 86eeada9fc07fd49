"""The paper's siblings, as settings of the one trainer: each learns, resumes bit for bit, and starts as it is told."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import model.step
from model import evaluate
from model.checkpoint import CheckpointError, Checkpoints
from model.drawings import DataError, Dataset
from model.episode import draw
from model.health import EVERY, Health
from model.init import initialise
from model.net import SiameseNet
from model.pairs import PairSampler
from model.spec import TrainConfig, config
from model.train import FitResult, fit
from tests.unit.siamese import POINT, SIDE, TINY, dataset

DATA = dataset()
SEEN = replace(DATA, validation=DATA.train)
"""Tasks on the very characters that are trained: whoever learns anything gets those right."""
PXK: dict[str, Any] = {"batches": "pxk", "characters": 6, "drawings": 3, "alphabets": 2, "negatives": 3}
SIBLINGS: dict[str, tuple[float, dict[str, Any]]] = {
    "sigmoid": (0.1, {}),
    "sigmoid squared": (0.01, {"distance": "squared", "optimizer": "adam"}),
    "sigmoid pxk": (0.1, PXK),
    "contrastive l1": (0.01, {"loss": "contrastive", "distance": "l1", "margin": 4.0}),
    "contrastive l2": (0.01, {"loss": "contrastive", "margin": 4.0}),
    "contrastive cosine": (0.1, {"loss": "contrastive", "distance": "cosine"}),
    "triplet": (0.1, {"loss": "triplet"}),
    "triplet cosine pxk": (0.1, {"loss": "triplet", "distance": "cosine", **PXK}),
    "semi-hard": (0.1, {"loss": "triplet", "mining": "semi-hard", **PXK}),
    "softmax": (0.005, {"loss": "softmax", **PXK}),
    "softmax cosine": (0.1, {"loss": "softmax", "distance": "cosine", **PXK}),
    "classes": (0.05, {"loss": "classes", "classes": 21}),
    "norm": (0.1, {"norm": "batch"}),
    "fixed pairs": (0.1, {"fixed_pairs": 300}),
    "two layers": (0.1, {"fc": [16, 8], "dropout": 0.1, "schedule": "cosine", "average": 0.9}),
}
RESUMED: dict[str, dict[str, Any]] = {
    "adam": {"optimizer": "adam"},
    "pxk": PXK,
    "triplets": {"loss": "triplet", "mining": "semi-hard"},
    "fixed pairs": {"fixed_pairs": 13, "distorted_copies": 2},
    "dropout": {"fc": [10, 8], "dropout": 0.5},
    "contrastive": {"loss": "contrastive", "precision": "bf16"},
    "norm": {"norm": "batch"},
    "average": {"average": 0.9, "norm": "batch", "schedule": "cosine"},
    "everything": {
        **PXK,
        "loss": "softmax",
        "optimizer": "adam",
        "fc": [10, 8],
        "dropout": 0.3,
        "norm": "batch",
        "average": 0.9,
        "rotations": True,
    },
}


def recipe(seed: int = 0, eta: float = 0.05, **settings: Any) -> TrainConfig:
    return config({**POINT, "eta": eta}, {**TINY, "epochs": 2, **settings}, seed)


def run(
    settings: TrainConfig,
    data: Dataset = DATA,
    store: Checkpoints | None = None,
    interrupt: Callable[[], bool] = evaluate.never,
) -> tuple[FitResult, list[dict[str, float]]]:
    heard: list[dict[str, float]] = []
    result = fit(settings, data, lambda _, metrics: heard.append(metrics), store=store, interrupt=interrupt)
    return result, [{name: m[name] for name in ("accuracy", "loss")} for m in heard]


def after(questions: int) -> Callable[[], bool]:
    left = questions

    def interrupt() -> bool:
        nonlocal left
        left -= 1
        return left < 0

    return interrupt


def tensors(store: Checkpoints) -> dict[str, Tensor]:
    best = {f"best.{name}": tensor for name, tensor in store.read_best().weights.items()}
    return {**store.read_last().tensors, **best}


def identical(one: Checkpoints, other: Checkpoints) -> bool:
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("sibling", SIBLINGS)
def test_it_learns_to_tell_the_characters_apart(sibling: str) -> None:
    """Chance is 20%, and an untrained network reaches 45% at most."""
    eta, settings = SIBLINGS[sibling]
    lasting = {"pairs_per_epoch": 640, "batch_pairs": 16, "momentum_epochs": 1, "distort": False, "epochs": 4}
    result, heard = run(recipe(eta=eta, **{**lasting, "validation_tasks": 300, **settings}), SEEN)
    assert result.outcome == "complete", result.reason
    assert heard[-1]["loss"] < 0.9 * heard[0]["loss"]
    assert result.value is not None
    assert result.value > 0.6, heard


@pytest.mark.parametrize("shape", RESUMED)
def test_interrupted_at_any_step_it_resumes_bit_for_bit(tmp_path: Path, shape: str) -> None:
    settings = recipe(**RESUMED[shape])
    steps = settings.steps_per_epoch
    whole = Checkpoints(tmp_path / "whole")
    expected, told = run(settings, store=whole)
    assert expected.epochs == 2
    assert run(settings)[1] == told, "the same again"
    for questions in {1, steps - 1, steps + 1, steps + 3, 2 * (steps + 2) - 1}:
        broken = Checkpoints(tmp_path / f"{questions}")
        stopped, before = run(settings, store=broken, interrupt=after(questions))
        assert stopped.outcome == "stopped"
        resumed, later = run(settings, store=broken)
        assert resumed.warnings == ()
        assert (resumed.value, resumed.best_epoch, resumed.answers) == (
            expected.value,
            expected.best_epoch,
            expected.answers,
        )
        assert before + later == told
        assert identical(broken, whole)


@pytest.mark.parametrize("shape", ["pxk", "norm", "everything"])
def test_an_interrupt_within_a_batch_in_pieces_resumes_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str
) -> None:
    settings = recipe(**{"epochs": 1, **RESUMED[shape]})
    monkeypatch.setitem(model.step._PIECE_FLOPS, "cpu", 6 * settings.net.flops * settings.pairs_per_batch / 3)
    whole = Checkpoints(tmp_path / "whole")
    _, told = run(settings, store=whole)
    stopped_at = set()
    for questions in range(1, 12, 2):
        broken = Checkpoints(tmp_path / f"{questions}")
        assert run(settings, store=broken, interrupt=after(questions))[0].outcome == "stopped"
        stopped_at.add(broken.read_last().step)
        assert run(settings, store=broken)[1] == told[-1:]
        assert identical(broken, whole)
    assert {0, 1} <= stopped_at


def test_batches_are_normalised_by_running_statistics_wherever_nobody_trains(tmp_path: Path) -> None:
    """An answer must not depend on what else is asked, and a probe must not move what training knows."""
    store = Checkpoints(tmp_path)
    result, _ = run(recipe(norm="batch"), store=store)
    net = evaluate.load(tmp_path / "best.json").net
    kept = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    assert "conv1_norm.running_mean" in kept
    assert kept["conv1_norm.running_mean"].any()
    tasks = draw(DATA.validation, 40, 5, 0)
    together = evaluate.answer(net, DATA.validation, tasks)
    assert together.double().mean().item() == result.value
    shown = torch.cat([tasks.query, tasks.support.flatten()]).unique()
    features = evaluate.embed(net, DATA.validation, shown)
    for i in (0, len(shown) - 1):
        torch.testing.assert_close(evaluate.embed(net, DATA.validation, shown[i : i + 1])[0], features[i])
    health = Health(DATA.train.flat[:8])
    assert health.check(net, torch.tensor(1.0), EVERY) is None
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, kept[name]), name


def test_dropout_takes_part_in_training_only() -> None:
    settings = recipe(fc=[10, 8], dropout=0.5)
    net = SiameseNet(settings.net)
    initialise(net, "he", torch.Generator().manual_seed(0))
    x = torch.rand(4, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    assert torch.equal(net.embed(x), net.embed(x))
    one, other = (net.embed(x, torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert not torch.equal(one, other)
    assert torch.equal(one, net.embed(x, torch.Generator().manual_seed(1)))


def probe(data: Dataset, count: int = 16) -> Health:
    first, second, _ = PairSampler(data.train, count).draw(torch.Generator().manual_seed(0))
    return Health(data.train.flat[torch.cat([first, second])])


@pytest.mark.parametrize("distance", ["l1", "l2", "squared", "cosine"])
def test_a_network_whose_distances_are_large_is_alive(distance: str) -> None:
    """Untrained, 2,048 units lie hundreds apart in L1: exp(-d) is 0 in fp32 there, and their distances still differ."""
    settings = recipe(loss="contrastive", distance=distance, fc=2048)
    net = SiameseNet(settings.net)
    initialise(net, "he", torch.Generator().manual_seed(0))
    with torch.no_grad():
        net.fc.weight.mul_(4)
    health = probe(DATA)
    for step in (EVERY, 2 * EVERY):
        assert health.check(net, torch.tensor(1.0), step) is None


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    run(recipe(loss="classes", classes=21, fc=12, epochs=1), store=Checkpoints(tmp_path / "classifier"))
    return tmp_path / "classifier"


@pytest.mark.parametrize("name", ["", "best.json", "last.json"])
def test_convolutions_are_transferred_and_nothing_else(classifier: Path, tmp_path: Path, name: str) -> None:
    store = Checkpoints(tmp_path / "net")
    settings = recipe(transfer=str(classifier / name), average=0.5)
    stopped, _ = run(settings, store=store, interrupt=after(0))
    assert stopped.outcome == "stopped"
    given = Checkpoints(classifier).read_best().weights
    got = store.read_last().tensors
    fresh = SiameseNet(settings.net)
    plain = Checkpoints(tmp_path / "plain")
    run(recipe(average=0.5), store=plain, interrupt=after(0))
    fresh.load_state_dict({k.removeprefix("net."): v for k, v in plain.read_last().tensors.items() if k[:4] == "net."})
    for label in ("conv1", "conv2"):
        for part in ("weight", "bias"):
            assert torch.equal(got[f"net.{label}.{part}"], given[f"{label}.{part}"])
            assert torch.equal(got[f"average.{label}.{part}"], given[f"{label}.{part}"])
    assert torch.equal(got["net.fc.weight"], fresh.fc.weight)
    assert torch.equal(got["net.output.weight"], fresh.output.weight)
    Path(classifier / "best.json").unlink()
    Path(classifier / "last.json").unlink()
    resumed, _ = run(settings, store=store)
    assert resumed.outcome == "complete", "what was taken over is not needed any more"


def test_what_cannot_be_transferred_is_refused_by_layer_and_file(classifier: Path, tmp_path: Path) -> None:
    convolutions = [{"filters": 4, "kernel": 3, "pool": True}, {"filters": 7, "kernel": 2, "pool": "ceil"}]
    other = {"input": SIDE, "conv": convolutions, "fc": 8}
    three = {"input": SIDE, "conv": [*TINY["net"]["conv"], {"filters": 2, "kernel": 1}], "fc": 8}
    for net, words in ((other, r"conv2\.weight is 6 x 4 x 2 x 2 there, .* 7 x 4 x 2 x 2"), (three, "conv3.*none")):
        with pytest.raises(CheckpointError, match=words) as fault:
            run(recipe(net=net, transfer=str(classifier)), store=Checkpoints(tmp_path / "refused"))
        assert str(classifier) in str(fault.value)
    assert not list((tmp_path / "refused").glob("*")), "nothing half-written"
    with pytest.raises(CheckpointError, match=r"nowhere does not exist"):
        run(recipe(transfer=str(tmp_path / "nowhere")))
    (classifier / "best.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match=r"best\.safetensors is damaged"):
        run(recipe(transfer=str(classifier)))


def test_a_network_of_another_architecture_is_never_filled(tmp_path: Path) -> None:
    run(recipe(epochs=1), store=Checkpoints(tmp_path))
    for other in (recipe(loss="contrastive"), recipe(norm="batch"), recipe(fc=[8, 8])):
        best = Checkpoints(tmp_path).read_best()
        Checkpoints(tmp_path / "other").save_best(replace(best, config=other))
        with pytest.raises(CheckpointError, match="not those of the network"):
            evaluate.load(tmp_path / "other")
        (warning,) = run(replace(other, epochs=1), store=copied(tmp_path))[0].warnings
        assert "starting over, for the checkpoint is of another run" in warning


def copied(folder: Path) -> Checkpoints:
    """A folder with the same last checkpoint."""
    store = Checkpoints(folder / "copy")
    store.save_last(Checkpoints(folder).read_last())
    return store


OLD = {
    *("init", "batch_pairs", "pairs_per_epoch", "epochs", "patience", "momentum_epochs", "momentum_start", "decay"),
    *("distort", "same_alphabet", "precision", "way", "validation_tasks", "validation_seed", "data", "max_seconds"),
    "checkpoint_every_s",
}
"""Every setting there was before the siblings."""


@pytest.mark.parametrize("questions", [2, 5, 9])
def test_a_checkpoint_from_before_the_siblings_goes_on_as_it_would_have(tmp_path: Path, questions: int) -> None:
    whole, store = Checkpoints(tmp_path / "whole"), Checkpoints(tmp_path / "old")
    _, told = run(recipe(), store=whole)
    _, before = run(recipe(), store=store, interrupt=after(questions))
    for name in ("last", "best"):
        path = store.folder / f"{name}.json"
        if not path.exists():
            continue
        document = json.loads(path.read_text())
        del document["answers"], document["config"]["settings"]["net"]["channels"]
        settings = document["config"]["settings"]
        document["config"]["settings"] = {name: settings[name] for name in {"net", *OLD}}
        path.write_text(json.dumps(document))
        loaded = evaluate.load(path)
        assert loaded.config == recipe()
    resumed, later = run(recipe(), store=store)
    assert resumed.warnings == ()
    assert before + later == told
    assert identical(store, whole)


def test_turned_characters_train_as_characters_of_their_own() -> None:
    result, _ = run(recipe(rotations=True, epochs=1))
    assert result.outcome == "complete"
    assert run(recipe(rotations=True, loss="classes", classes=4 * 21, epochs=1))[0].outcome == "complete"
    with pytest.raises(DataError, match="there are 84 training characters: set it to 84"):
        run(recipe(rotations=True, loss="classes", classes=21))
    with pytest.raises(DataError, match="classes is 20, and there are 21 training characters: set it to 21"):
        run(recipe(loss="classes", classes=20))


@pytest.mark.parametrize("settings", [{}, {"rotations": True, **PXK}, {"distort": False, "loss": "triplet"}])
def test_colour_trains(tmp_path: Path, settings: dict[str, Any]) -> None:
    store = Checkpoints(tmp_path)
    result, _ = run(recipe(channels=3, **settings), DATA.coloured(), store=store)
    assert result.outcome == "complete"
    net = evaluate.load(tmp_path).net
    assert net.layer("conv1").weight.shape == (4, 3, 3, 3)
    assert sum(parameter.numel() for parameter in net.parameters()) == net.config.parameters
    with pytest.raises(ValueError, match="sees 3 channels, the data set has 1"):
        run(recipe(channels=3))
    with pytest.raises(ValueError, match="sees 1 channels, the data set has 3"):
        run(recipe(), DATA.coloured())


def test_validation_with_more_shots_asks_other_tasks_and_needs_the_people(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    result, heard = run(recipe(shot=3), store=store)
    tasks = draw(DATA.validation, 40, 5, 0, shot=3)
    net = evaluate.load(tmp_path).net
    assert evaluate.one_shot(net, DATA.validation, tasks).accuracy == result.value
    assert heard != run(recipe())[1]
    with pytest.raises(DataError, match="4 shots need drawings by at least 5 people"):
        run(recipe(shot=4))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({**PXK, "drawings": 5}, "setting drawings"),
        ({**PXK, "characters": 16}, "set characters and alphabets"),
        ({**PXK, "alphabets": 6, "characters": 12}, "set characters and alphabets"),
    ],
)
def test_batches_that_the_drawings_cannot_give_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        run(recipe(**settings))


@pytest.mark.parametrize("call", [1, 3, 5])
def test_memory_that_runs_out_ends_the_run_with_its_reason_and_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """In the first step, in a later one, and in an evaluation; the allocator's own error."""
    store, nets, calls = Checkpoints(tmp_path), [], 0
    embed = SiameseNet.embed

    def greedy(self: SiameseNet, images: Tensor, training: torch.Generator | None = None) -> Tensor:
        nonlocal calls
        calls += 1
        nets.append(weakref.ref(self))
        if calls == call:
            return torch.empty(2**60, dtype=torch.uint8)
        return embed(self, images, training)

    settings = recipe(average=0.5)
    with monkeypatch.context() as patch:
        patch.setattr(SiameseNet, "embed", greedy)
        result, _ = run(settings, store=store)
    assert result.outcome == "infeasible"
    assert result.reason.startswith("out of memory on cpu")
    assert "allocate" in result.reason
    assert "\n" not in result.reason
    assert calls == call
    gc.collect()
    assert not any(net() for net in nets), "nobody holds the network any more"
    again, _ = run(settings, store=store)
    assert again.outcome == "complete", "the folder is free, and what stands in it is sound"
    assert again.warnings == ()


def test_a_fault_that_is_not_of_memory_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Tensor:
        return torch.zeros(2, 3) @ torch.zeros(2, 3)

    monkeypatch.setattr(SiameseNet, "embed", broken)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(recipe())
