"""Our storage and stock Optuna's work on one study from several processes, and each reads what all the others wrote."""

from __future__ import annotations

import math
import multiprocessing
import random
from multiprocessing.connection import Connection
from typing import Any

import optuna
import pytest
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import TrialState, create_trial
from sqlalchemy import Engine

from hpo import database
from hpo.storage import PostgresStorage
from tests.integration.test_storage import plain

KINDS = ("ours", "stock", "ours", "stock")
ROUNDS = 4
STEPS = 6


def worker(url: str, kind: str, seed: int, pipe: Connection) -> None:
    """Open the study for good, then play and read in turn, as told."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage: BaseStorage = PostgresStorage(database.connect(url)) if kind == "ours" else RDBStorage(url)
    study = optuna.load_study(storage=storage, study_name="shared", sampler=optuna.samplers.TPESampler(seed=seed))
    rng = random.Random(seed)
    open_: list[optuna.Trial] = []
    while (told := pipe.recv()) != "end":
        if told == "play":
            for _ in range(STEPS):
                play(study, rng, open_)
            pipe.send("played")
        else:
            studies = {each.study_name: (each.user_attrs, each.system_attrs) for each in storage.get_all_studies()}
            best = study.best_trial.number if any(t.state == TrialState.COMPLETE for t in study.trials) else None
            pipe.send((plain(study.get_trials(deepcopy=rng.random() < 0.5)), studies, best))


def play(study: optuna.Study, rng: random.Random, open_: list[optuna.Trial]) -> None:
    """Do one of the things that people do to a study."""
    what = rng.choice(["ask", "ask", "report", "tell", "tell", "enqueue", "add", "note"])
    if what == "ask":
        trial = study.ask()
        trial.suggest_float("x", 0, rng.choice([1, 2]))
        if rng.random() < 0.7:
            trial.suggest_categorical("c", ["a", None, 3])
        open_.append(trial)
    elif what == "enqueue":
        study.enqueue_trial({"x": rng.random()}, user_attrs={"who": rng.random()})
    elif what == "add":
        value = rng.choice([1.0 + rng.random(), -math.inf])  # of equals stock Optuna calls any the best
        study.add_trial(create_trial(value=value, intermediate_values={0: math.nan, 9: 1.0}))
    elif what == "note":
        study.set_user_attr(f"note {rng.randrange(3)}", rng.random())
    elif open_:
        trial = rng.choice(open_)
        if what == "report":
            trial.report(rng.choice([rng.random(), math.nan, math.inf]), rng.randrange(100))
            trial.set_user_attr("seen", rng.random())
            return
        open_.remove(trial)
        if rng.random() < 0.3:
            study.tell(trial, state=rng.choice([TrialState.FAIL, TrialState.PRUNED]))
        else:
            study.tell(trial, rng.random())


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_processes_of_both_kinds_read_the_same_at_every_pause(engine: Engine, postgres_url: str) -> None:
    study = optuna.create_study(storage=PostgresStorage(engine), study_name="shared", direction="maximize")
    url = database.normalise(postgres_url).render_as_string(hide_password=False)
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for seed, kind in enumerate(KINDS):
        here, there = context.Pipe()
        process = context.Process(target=worker, args=(url, kind, seed, there), daemon=True)
        process.start()
        pipes.append(here)
        processes.append(process)
    try:
        for _ in range(ROUNDS):
            assert said(pipes, "play") == ["played"] * len(KINDS)
            read = said(pipes, "read")
            assert [view == read[0] for view in read] == [True] * len(KINDS), KINDS
            numbers = [trial["_number"] for trial in read[0][0]]
            assert numbers == list(range(len(numbers)))
        assert len(numbers) > 20
        assert {trial.state for trial in study.trials} >= {TrialState.COMPLETE, TrialState.RUNNING}
    finally:
        for pipe, process in zip(pipes, processes, strict=True):
            pipe.send("end")
            process.join(30)


def said(pipes: list[Any], what: str) -> list[Any]:
    """What they answer when all of them are told at once."""
    for pipe in pipes:
        pipe.send(what)
    answers = []
    for pipe in pipes:
        assert pipe.poll(240), "a process gives no answer"
        answers.append(pipe.recv())
    return answers
