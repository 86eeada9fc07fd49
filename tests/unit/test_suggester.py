"""A suggester gives what `choose` gives, whichever process computes it and when; a sampler's fault stays its own."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytest
from optuna.trial import TrialState

from hpo.history import Snapshot, copy_of, entry_of
from hpo.sampling import Elsewhere, SamplerFailed, SamplingProcess
from hpo.sampling_child import LENGTH, receive
from hpo.space import SearchSpace
from hpo.spec import Choice
from hpo.suggest import choose
from hpo.suggester import Suggester, Worth
from tests.unit.test_samplers import Study, needs_torch, spec_of
from tests.unit.test_tpe import played

LABOUR = {"name": "tpe", "n_ei_candidates": 200_000}
"""A sampler whose asks take ten seconds."""
GP = {"name": "gp", "n_startup_trials": 4}


class Held:
    """A history in memory: what a test says has been read."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.refreshed = 0

    def refresh(self) -> None:
        self.refreshed += 1

    def snapshot(self, space: SearchSpace) -> Snapshot:
        assert space is self.study.spec.space
        return self.study.snapshot


def suggester(study: Study, process: SamplingProcess) -> Suggester:
    return Suggester(study.spec, Held(study), None, process)  # type: ignore[arg-type]


@pytest.fixture
def process() -> Iterator[SamplingProcess]:
    made = SamplingProcess()
    yield made
    made.close()


@pytest.fixture
def sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every TPE counts as slow."""
    monkeypatch.setattr("hpo.suggester.SLOW_S", 0.0)


def until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] == "Z"
    except OSError:
        return True


def follows_choose(study: Study, process: SamplingProcess) -> None:
    asked = suggester(study, process)
    for trial in range(4):
        number = len(study.entries)
        fixed = {"init": "paper"} if trial == 2 else {}
        made = asked.next(number, fixed)
        assert made == choose(study.spec, study.snapshot, number, fixed=fixed)
        study.add(made, TrialState.RUNNING)
        corrected = copy_of(study.entries[trial].trial, state=TrialState.COMPLETE, value=5.0 + trial)
        study.entries[trial] = entry_of(corrected).checked_by(study.spec.space)


def test_quick_samplers_stay_and_follow_choose(process: SamplingProcess) -> None:
    follows_choose(played(spec_of("tpe"), 40), process)
    assert process.pid is None


@pytest.mark.usefixtures("sent_away")
def test_what_the_sampling_process_gives_is_what_choose_gives(process: SamplingProcess) -> None:
    follows_choose(played(spec_of("tpe"), 40), process)
    assert process.pid is not None


@needs_torch
def test_a_gaussian_process_begins_here_and_goes_on_in_the_sampling_process(process: SamplingProcess) -> None:
    space = [{"name": "x", "type": "float", "low": 0, "high": 1, "labels": ["a", "b"]}]
    start, study = played(spec_of(GP, space), 2), played(spec_of(GP, space), 8)
    suggester(start, process).next(2)
    assert process.pid is None
    assert suggester(study, process).next(8) == choose(study.spec, study.snapshot, 8)
    assert process.pid is not None


@pytest.mark.usefixtures("sent_away")
def test_two_studies_share_one_process_and_do_not_mix(process: SamplingProcess) -> None:
    first, second = played(spec_of("tpe"), 40), played(spec_of("tpe", seed=9), 50)
    one, two = suggester(first, process), suggester(second, process)
    for study, asked in [(first, one), (second, two)] * 3:
        made = asked.next(len(study.entries))
        assert made == choose(study.spec, study.snapshot, len(study.entries))
        study.add(made, TrialState.COMPLETE, 0.5)
    pid = process.pid
    one.close()
    assert two.next(60) == choose(second.spec, second.snapshot, 60)
    assert process.pid == pid


@pytest.mark.usefixtures("sent_away")
def test_a_process_that_died_is_begun_again_unnoticed(process: SamplingProcess) -> None:
    study = played(spec_of("tpe"), 40)
    asked = suggester(study, process)
    before = asked.next(40)
    first = process.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    assert asked.next(40) == before
    assert process.pid != first


@pytest.mark.usefixtures("sent_away")
def test_a_sampler_that_hangs_fails_its_own_ask_alone(process: SamplingProcess) -> None:
    study, other = played(spec_of("tpe"), 40), played(spec_of("tpe", seed=9), 40)
    hanging = suggester(study, process)
    hanging.next(40)
    assert process.pid is not None
    assert process._child is not None
    os.kill(process.pid, signal.SIGSTOP)
    process._child._end.settimeout(0.5)
    with pytest.raises(SamplerFailed, match="no answer within"):
        hanging.next(41)
    assert process.pid is None
    assert suggester(other, process).next(40) == choose(other.spec, other.snapshot, 40)
    assert hanging.next(41) == choose(study.spec, study.snapshot, 41)


@pytest.mark.usefixtures("sent_away")
def test_a_sampler_that_takes_its_process_with_it_fails_its_own_ask_alone(process: SamplingProcess) -> None:
    study, other = played(spec_of(LABOUR), 40), played(spec_of("tpe"), 40)
    calm, asked = suggester(other, process), suggester(study, process)
    calm.next(40)

    def kill() -> None:
        until(lambda: process._child is not None and process._child.working)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(SamplerFailed, match="was killed"):
        asked.next(41)
    killer.join()
    assert calm.next(41) == choose(other.spec, other.snapshot, 41)


@pytest.mark.usefixtures("sent_away")
@pytest.mark.parametrize("place", [1, 2], ids=["before it begins", "before its answer"])
@pytest.mark.parametrize(
    ("error", "raised"),
    [(MemoryError(), SamplerFailed), (UnpicklingError("odd"), SamplerFailed), (KeyboardInterrupt(), KeyboardInterrupt)],
    ids=["no memory", "unreadable", "interrupted"],
)
def test_an_answer_that_could_not_be_read_is_nobody_elses(
    place: int,
    error: BaseException,
    raised: type[BaseException],
    process: SamplingProcess,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    study = played(spec_of("tpe"), 40)
    asked = suggester(study, process)
    asked.next(40)
    reads = itertools.count(1)

    def receives(end: socket.socket) -> Any:
        if next(reads) == place:
            raise error
        return receive(end)

    with monkeypatch.context() as patch:
        patch.setattr("hpo.sampling.receive", receives)
        with pytest.raises(raised):
            asked.next(41)
    assert asked.next(42) == choose(study.spec, study.snapshot, 42)


@pytest.mark.usefixtures("sent_away")
def test_a_question_that_was_half_sent_spoils_no_other(
    process: SamplingProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = played(spec_of("tpe"), 40)
    asked = suggester(study, process)
    asked.next(40)
    assert process._child is not None
    process._child._end.settimeout(5.0)

    def sends(end: socket.socket, message: object) -> None:
        end.sendall(LENGTH.pack(1 << 30))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hpo.sampling.send", sends)
        with pytest.raises(KeyboardInterrupt):
            asked.next(41)
    assert asked.next(42) == choose(study.spec, study.snapshot, 42)


@pytest.mark.usefixtures("sent_away")
def test_a_sampler_that_raises_is_quoted_and_its_process_lives_on(process: SamplingProcess) -> None:
    study = played(spec_of("tpe"), 40)
    asked = suggester(study, process)
    asked.next(40)
    pid = process.pid
    asked._chooser.spec = replace(study.spec, sampler=Choice("tpe", {**study.spec.sampler.options, "odd": 1}))
    with pytest.raises(SamplerFailed, match="TypeError: "):
        asked.next(41)
    asked._chooser.spec = study.spec
    assert asked.next(41) == choose(study.spec, study.snapshot, 41)
    assert process.pid == pid


SCRIPT = """
import sys, time
from hpo.sampling import SamplingProcess
process = SamplingProcess()
with process.turn() as child:
    print(child.pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_process_ends_with_its_coordinator_however_that_ends(how: signal.Signals) -> None:
    parent = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert not gone(pid)
    parent.send_signal(how)
    parent.wait()
    until(lambda: gone(pid))


@pytest.mark.usefixtures("sent_away")
def test_what_is_prepared_is_what_would_have_been_chosen_and_is_used_once(process: SamplingProcess) -> None:
    study = played(spec_of("tpe"), 40)
    asked = suggester(study, process)
    study.add(asked.next(40), TrialState.RUNNING)
    foresee(asked, 41)
    expected = choose(study.spec, study.snapshot, 41)
    process.close()
    assert asked.next(41) == expected
    assert process.pid is None, "it was there"
    study.add(expected, TrialState.COMPLETE, 1.0)
    foresee(asked)
    expected = choose(study.spec, study.snapshot, 42)
    process.close()
    assert asked.next(42) == expected
    assert process.pid is None, "it was there after a tell, too"
    study.add(expected, TrialState.RUNNING)
    assert asked.next(43) == choose(study.spec, study.snapshot, 43)


@pytest.mark.usefixtures("sent_away")
@pytest.mark.parametrize("what", ["a tell", "another number", "something given"])
def test_what_is_prepared_is_dropped_when_the_study_is_another(what: str, process: SamplingProcess) -> None:
    study = played(spec_of("tpe"), 40)
    asked = suggester(study, process)
    asked.next(40)
    foresee(asked, 40)
    number = 40
    fixed: dict[str, Any] = {}
    if what == "a tell":
        running = next(entry for entry in study.entries if entry.trial.state == TrialState.RUNNING)
        running.trial.state, running.trial.values = TrialState.COMPLETE, [9.0]
        study.entries[running.trial.number] = entry_of(running.trial).checked_by(study.spec.space)
    elif what == "another number":
        number = 41
    else:
        fixed = {"init": "paper"}
    assert asked.next(number, fixed) == choose(study.spec, study.snapshot, number, fixed=fixed)


def foresee(asked: Suggester, number: int | None = None) -> None:
    asked.foresee(number)
    assert asked._preparing is not None
    asked._preparing.join()
    assert asked._prepared is not None


def test_nothing_is_prepared_for_a_quick_sampler(process: SamplingProcess) -> None:
    study = played(spec_of("tpe"), 40)
    asked = suggester(study, process)
    asked.next(40)
    asked.foresee(41)
    assert asked._preparing is None


def test_what_is_prepared_in_vain_is_prepared_ever_less_often() -> None:
    worth, prepared = Worth(), 0
    for _ in range(200):
        if worth.due():
            prepared += 1
            worth.proved(used=False)
    assert prepared < 15
    while not worth.due():
        pass
    worth.proved(used=True)
    assert all(worth.due() for _ in range(3))


def test_to_forget_a_study_that_never_needed_the_process_does_not_begin_one() -> None:
    process = SamplingProcess()
    Elsewhere(process).close()
    assert process.pid is None
