"""From a lease to an outcome, with the real network on the built-in stroke characters, as small as it goes."""

from __future__ import annotations

import gc
import logging
import resource
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hpo.protocol import EpochReport, Lease, TaskAnswers, Verdict
from model.checkpoint import Checkpoints
from model.drawings import DataError, Dataset
from model.memory import out_of_memory
from model.net import SiameseNet
from model.strokes import SMALL, generate
from tests.unit.worker_server import a_lease
from workers.artifacts import Artifacts, Place
from workers.device import cpu
from workers.siamese import KEPT_DATASETS, Ended, MachineUnfit, Siamese

NET = {
    "input": 28,
    "conv": [{"filters": 4, "kernel": 5, "pool": True}, {"filters": 4, "kernel": 3, "pool": True}],
    "fc": 8,
}
SETTINGS: dict[str, Any] = {
    "net": NET,
    "data": "strokes",
    "batch_pairs": 16,
    "pairs_per_epoch": 32,
    "epochs": 3,
    "validation_tasks": 20,
    "way": 5,
    "precision": "fp32",
    "checkpoint_every_s": 0,
}
PARAMS = {"eta": 0.01, "mu": 0.5, "lambda": 0.0}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def siamese(tmp_path_factory: pytest.TempPathFactory) -> Siamese:
    """One for all tests, as one worker has it for all trials: the data is made once."""
    return Siamese(cpu(), data_root=None, home=tmp_path_factory.mktemp("home"))


class Heard:
    """What a trial said, and what it is answered."""

    def __init__(self, verdict: Verdict = Verdict.GO_ON, after: int = 10**6) -> None:
        self.reports: list[EpochReport] = []
        self.kept: list[int] = []
        self._verdict, self._after = verdict, after

    def report(self, report: EpochReport) -> Verdict:
        self.reports.append(report)
        return self._verdict if len(self.reports) >= self._after else Verdict.GO_ON

    def place(self, root: Path, attempt: int = 1) -> Place:
        return Artifacts(root, root / "scratch").open(f"studies/1/trials/3/attempts/{attempt}", self.kept.append)


def lease(attempt: int = 1, resume: int | None = None, **settings: Any) -> Lease:
    before = None if resume is None else f"studies/1/trials/3/attempts/{resume}"
    here = f"studies/1/trials/3/attempts/{attempt}"
    return a_lease(params=PARAMS, settings=SETTINGS | settings, attempt=attempt, resume=before, artifacts=here)


def never() -> bool:
    return False


def train(siamese: Siamese, root: Path, heard: Heard, lease: Lease) -> Ended:
    return siamese.train(lease, heard.place(root, lease.attempt), heard.report, never)


def test_a_lease_becomes_a_value_with_every_epoch_reported_and_kept(siamese: Siamese, tmp_path: Path) -> None:
    heard = Heard()
    ended = train(siamese, tmp_path, heard, lease())
    assert ended.outcome == "complete"
    assert [report.epoch for report in heard.reports] == [0, 1, 2]
    values = [report.value for report in heard.reports]
    assert ended.value == max(value for value in values if value is not None)
    assert ended.best_epoch == values.index(ended.value)
    assert {"accuracy", "accuracy_320", "loss", "pairs_per_s", "seconds"} <= set(heard.reports[0].metrics)
    assert heard.kept[-1] == 3, "the last checkpoint holds all three epochs"
    folder = tmp_path / "studies/1/trials/3/attempts/1"
    assert Checkpoints(folder).read_best().epoch == ended.best_epoch
    assert ended.answers is not None
    told = TaskAnswers.of(ended.tasks, ended.answers)
    assert int.from_bytes(told.bits, "big").bit_count() / told.tasks == ended.value


def test_the_next_attempt_goes_on_from_the_checkpoint(siamese: Siamese, tmp_path: Path) -> None:
    first, second, whole = Heard(Verdict.STOP, after=2), Heard(), Heard()
    assert train(siamese, tmp_path, first, lease(1)).outcome == "stopped"
    ended = train(siamese, tmp_path, second, lease(2, resume=1).model_copy(update={"last_epoch": 1}))
    assert ended.outcome == "complete"
    assert [report.epoch for report in first.reports] == [0, 1]
    assert [report.epoch for report in second.reports] == [2]
    assert second.kept[0] == 2, "what was adopted is this attempt's own from the start"
    unbroken = train(siamese, tmp_path / "other", whole, lease(1))
    assert (ended.value, ended.tasks, ended.answers) == (unbroken.value, unbroken.tasks, unbroken.answers)
    assert second.reports[0].metrics["loss"] == whole.reports[2].metrics["loss"]


@pytest.mark.parametrize(("heard_of", "reported"), [(0, [1, 2]), (None, [0, 1, 2])])
def test_epochs_that_a_checkpoint_holds_and_nobody_heard_of_are_reported_by_the_next_attempt(
    siamese: Siamese, tmp_path: Path, heard_of: int | None, reported: list[int]
) -> None:
    first, second = Heard(Verdict.STOP, after=2), Heard()
    train(siamese, tmp_path, first, lease(1))
    train(siamese, tmp_path, second, lease(2, resume=1).model_copy(update={"last_epoch": heard_of}))
    assert [report.epoch for report in second.reports] == reported
    unheard = [report for report in second.reports if report.epoch < 2]
    assert unheard == first.reports[reported[0] :], "what was measured, not measured again"


@pytest.mark.parametrize("fault", ["missing", "damaged", "climbing"])
def test_a_checkpoint_that_cannot_be_used_means_a_new_beginning_and_is_said(
    siamese: Siamese, tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    train(siamese, tmp_path, Heard(Verdict.STOP, after=2), lease(1))
    again = lease(2, resume=1)
    if fault == "missing":
        again = lease(2, resume=7)
    elif fault == "climbing":
        again = again.model_copy(update={"resume": "../../etc"})
    else:
        weights = tmp_path / "studies/1/trials/3/attempts/1/last.safetensors"
        weights.write_bytes(weights.read_bytes()[:-7])
    heard = Heard()
    with caplog.at_level(logging.WARNING):
        ended = train(siamese, tmp_path, heard, again)
    assert ended.outcome == "complete"
    assert [report.epoch for report in heard.reports] == [0, 1, 2]
    assert "begins anew" in caplog.text


@pytest.mark.parametrize(
    ("verdict", "outcome"), [(Verdict.PRUNE, "pruned"), (Verdict.STOP, "stopped"), (Verdict.LOST, "stopped")]
)
def test_training_ends_when_the_coordinator_says_so(
    siamese: Siamese, tmp_path: Path, verdict: Verdict, outcome: str
) -> None:
    heard = Heard(verdict, after=1)
    assert train(siamese, tmp_path, heard, lease()).outcome == outcome
    assert len(heard.reports) == 1
    assert heard.kept


def test_an_interrupt_is_heard_at_the_next_step_and_leaves_a_checkpoint(siamese: Siamese, tmp_path: Path) -> None:
    heard = Heard()
    steps = iter([False, True])
    ended = siamese.train(
        lease(checkpoint_every_s=1000), heard.place(tmp_path), heard.report, lambda: next(steps, True)
    )
    assert ended.outcome == "stopped"
    assert not heard.reports
    assert heard.kept == [0]


def test_a_diverged_trial_is_infeasible_at_the_level_of_chance(siamese: Siamese, tmp_path: Path) -> None:
    wild = lease(pairs_per_epoch=3200).model_copy(update={"params": {"eta": 1e30, "mu": 0.9, "lambda": 0.0}})
    ended = train(siamese, tmp_path, Heard(), wild)
    assert ended.outcome == "infeasible"
    assert ended.value == 1 / 5
    assert ended.reason


def test_memory_that_runs_out_is_infeasible_with_the_reason(siamese: Siamese, tmp_path: Path) -> None:
    """A network of 2 GB where the process may take 0.5 GB more than it has."""
    vast = NET | {"fc": 1_048_576, "conv": [{"filters": 1, "kernel": 6, "pool": False}]}
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 500_000_000, before[1]))
    try:
        ended = train(siamese, tmp_path, Heard(), lease(net=vast))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert ended.outcome == "infeasible", ended
    assert ended.value == 1 / 5
    assert "out of memory on cpu" in ended.reason


@pytest.mark.parametrize("eta", [1e30, 0.01])
def test_nothing_of_a_trial_stays_in_memory(
    siamese: Siamese, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eta: float
) -> None:
    """However it ended, also where memory ran out in mid-training, and without waiting for the garbage collector."""
    nets: list[weakref.ref[SiameseNet]] = []

    def make(*given: Any) -> SiameseNet:
        net = SiameseNet(*given)
        nets.append(weakref.ref(net))
        return net

    def exhausted(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("model.train.SiameseNet", make)
    if eta < 1:
        monkeypatch.setattr("model.evaluate.answer", exhausted)
    given = lease(pairs_per_epoch=1600).model_copy(update={"params": {"eta": eta, "mu": 0.9, "lambda": 0.0}})
    gc.disable()
    try:
        ended = train(siamese, tmp_path, Heard(), given)
        alive = [net() is not None for net in nets]
    finally:
        gc.enable()
    assert ended.outcome == "infeasible"
    assert alive == [False]


def test_an_exception_comes_back_with_its_traceback(siamese: Siamese, tmp_path: Path) -> None:
    impossible = lease().model_copy(update={"params": {"eta": "much"}})
    ended = train(siamese, tmp_path, Heard(), impossible)
    assert ended.outcome == "failed"
    assert "eta" in ended.reason
    assert "Traceback" in ended.traceback
    assert "siamese.py" in ended.traceback


def test_missing_data_is_the_machines_fault_and_not_the_trials(siamese: Siamese, tmp_path: Path) -> None:
    with pytest.raises(MachineUnfit, match="whetstone data fetch"):
        train(siamese, tmp_path, Heard(), lease(data="omniglot"))


def test_a_study_that_asks_more_than_whole_data_can_give_fails_its_trial_and_spares_the_worker(
    siamese: Siamese, tmp_path: Path
) -> None:
    """A way that no alphabet has: another machine would meet it too, so no worker must end of it."""
    ended = train(siamese, tmp_path, Heard(), lease(way=46))
    assert ended.outcome == "failed"
    assert "no alphabet has 46 characters" in ended.reason


def test_a_point_that_asks_more_of_a_batch_than_the_data_has_is_infeasible(siamese: Siamese, tmp_path: Path) -> None:
    """The sampler learns to stay away from it; the same number in the settings is the study's own fault."""
    asked: dict[str, Any] = {"batches": "pxk", "characters": 500, "drawings": 2, "alphabets": 1, "pairs_per_epoch": 500}
    fixed = lease(**asked)
    swept = fixed.model_copy(
        update={
            "params": {**fixed.params, "characters": 500},
            "settings": {name: value for name, value in fixed.settings.items() if name != "characters"},
        }
    )
    ended = train(siamese, tmp_path, Heard(), swept)
    assert (ended.outcome, ended.value) == ("infeasible", 1 / 5)
    assert "batches of 500 characters" in ended.reason
    assert train(siamese, tmp_path / "b", Heard(), fixed).outcome == "failed"


def test_a_folder_that_cannot_be_trained_on_fails_its_trial_and_spares_the_worker(tmp_path: Path) -> None:
    """Where it is not at all, this machine lacks it, and another may have it."""
    worker = Siamese(cpu(), data_root=tmp_path / "data", home=tmp_path)
    (tmp_path / "data/letters/greek/alpha").mkdir(parents=True)
    (tmp_path / "data/letters/greek/alpha/1.png").write_bytes(b"no image")
    ended = train(worker, tmp_path, Heard(), lease(data="folder", folder="letters"))
    assert ended.outcome == "failed"
    assert "alpha has 1 drawing" in ended.reason
    with pytest.raises(MachineUnfit, match="numbers is not a folder"):
        train(worker, tmp_path / "b", Heard(), lease(data="folder", folder="numbers"))


@pytest.mark.parametrize("first", ["strokes", "omniglot"])
def test_a_study_is_trained_on_the_data_its_first_trial_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """With `data: auto` a worker that has Omniglot follows one that had not; the other way round it leaves."""
    strokes_only = generate(28, shape=SMALL)
    has: list[str] = [first]

    def load(size: int, *, source: str, **_: Any) -> Dataset:
        if source == "omniglot" and "omniglot" not in has:
            raise DataError("no Omniglot here: run `whetstone data fetch`")
        asked.append(source)
        return replace(strokes_only, name=has[0] if source == "auto" else source)

    asked: list[str] = []
    monkeypatch.setattr("workers.siamese.load", load)
    one, other = (Siamese(cpu(), data_root=None, home=tmp_path) for _ in range(2))
    assert train(one, tmp_path, Heard(), lease(data="auto")).outcome == "complete"
    has[0] = "omniglot" if first == "strokes" else "strokes"
    again = lease(2, data="auto")
    if first == "strokes":
        assert train(other, tmp_path, Heard(), again).outcome == "complete"
        assert asked == ["auto", "auto", "strokes"]
        assert Checkpoints(tmp_path / again.artifacts).read_best().data == "strokes"
    else:
        with pytest.raises(MachineUnfit, match="whetstone data fetch"):
            train(other, tmp_path, Heard(), again)
    elsewhere = again.model_copy(update={"study": 2})
    assert train(other, tmp_path, Heard(), elsewhere).outcome == "complete", "another study chooses anew"


def test_a_disk_that_takes_no_checkpoint_is_the_machines_fault(siamese: Siamese, tmp_path: Path) -> None:
    heard = Heard()
    place = heard.place(tmp_path)

    class Full(type(place)):  # type: ignore[misc]
        def saved(self, kind: str, epoch: int) -> None:
            raise OSError(28, "No space left on device")

    place.__class__ = Full
    with pytest.raises(MachineUnfit, match="No space left"):
        siamese.train(lease(), place, heard.report, never)


def test_data_is_loaded_once_for_all_trials(siamese: Siamese, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(siamese, tmp_path / "a", Heard(), lease())

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded again")

    monkeypatch.setattr("workers.siamese.load", load)
    assert train(siamese, tmp_path / "b", Heard(), lease()).outcome == "complete"


def test_a_trial_gets_the_data_its_own_settings_ask_for(siamese: Siamese, tmp_path: Path) -> None:
    """Colour after grey, and grey again: what is kept loaded is told apart by all that the settings say of data."""
    for channels in (1, 3, 1):
        ended = train(siamese, tmp_path / str(channels), Heard(), lease(channels=channels))
        assert ended.outcome == "complete", ended.reason


def test_data_of_earlier_trials_makes_room_for_data_that_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never more than `KEPT_DATASETS` at once; alone where memory runs out; infeasible where that does not help."""
    made = generate(28, shape=SMALL)
    held: list[weakref.ref[Dataset]] = []
    room = [KEPT_DATASETS]

    def load(*_: Any, **__: Any) -> Dataset:
        there = [kept for kept in held if kept() is not None]
        most.append(len(there) + 1)
        if len(there) >= room[0]:
            raise MemoryError("no room for the images")
        found = replace(made)
        held.append(weakref.ref(found))
        return found

    most: list[int] = []
    monkeypatch.setattr("workers.siamese.load", load)
    monkeypatch.setattr(Dataset, "to", lambda self, device: self)
    worker = Siamese(cpu(), data_root=None, home=tmp_path)
    for ink, outcome in (("dark", "complete"), ("light", "complete")):
        assert train(worker, tmp_path / ink, Heard(), lease(ink=ink)).outcome == outcome
    assert train(worker, tmp_path / "mnist", Heard(), lease(data="mnist")).outcome == "complete"
    assert max(most) == KEPT_DATASETS, "the eldest goes before the next is loaded"
    room[0] = 1
    assert train(worker, tmp_path / "alone", Heard(), lease()).outcome == "complete"
    room[0] = 0
    ended = train(worker, tmp_path / "none", Heard(), lease(data="omniglot"))
    assert (ended.outcome, ended.value) == ("infeasible", 1 / 5)
    assert "out of memory on cpu: no room for the images" in ended.reason


def test_every_way_in_which_memory_runs_out_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert out_of_memory(caught.value)
    assert out_of_memory(MemoryError())
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not out_of_memory(ValueError("can't allocate memory"))
