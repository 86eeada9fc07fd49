"""A judgement reads once, knows what stock Optuna knows, and forgets nothing but what was corrected."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.pruners import HyperbandPruner, MedianPruner, SuccessiveHalvingPruner
from optuna.trial import Trial, TrialState, create_trial
from sqlalchemy import Engine

from hpo import database
from hpo.errors import NotFound
from hpo.pruners import Verdict, judge_now
from hpo.pruning import RESOURCE, Pruning
from hpo.snapshot import CANCELLED, CONSTRAINT
from hpo.spec import StudySpec
from tests.integration.test_storage import counted
from tests.unit.test_pruners import NAME, spec_of

MEDIAN = {"name": "median", "n_startup_trials": 2}
HALVING = {"name": "successive_halving", "min_resource": 1, "reduction_factor": 2}
HYPERBAND = {"name": "hyperband", "max_resource": 27}


@pytest.fixture
def stock(postgres_url: str) -> Iterator[optuna.Study]:
    """A study opened by stock Optuna, as a person with a notebook would."""
    storage = optuna.storages.RDBStorage(database.normalise(postgres_url).render_as_string(hide_password=False))
    yield optuna.create_study(storage=storage, study_name=NAME, direction="maximize")
    storage.remove_session()
    storage.engine.dispose()


def judged(spec: StudySpec, pruning: Pruning, trial: Trial, reports: dict[int, float]) -> Verdict:
    return judge_now(spec, pruning, trial._trial_id, trial.number, reports)


def add(stock: optuna.Study, value: float | None, reports: dict[int, float], **marks: Any) -> int:
    state = TrialState.FAIL if value is None else TrialState.COMPLETE
    marks = {{"cancelled": CANCELLED, "infeasible": CONSTRAINT}.get(key, key): mark for key, mark in marks.items()}
    stock.add_trial(create_trial(state=state, value=value, intermediate_values=reports, system_attrs=marks))
    return stock.get_trials(deepcopy=False)[-1]._trial_id


def revise(engine: Engine, stock: optuna.Study, trial: int, change: str) -> None:
    with engine.begin() as connection:
        connection.execute(sa.text(change), {"trial": trial})
        connection.execute(
            sa.text("INSERT INTO whetstone.revisions (study_id, trial_id, what) VALUES (:study, :trial, 'x')"),
            {"study": stock._study_id, "trial": trial},
        )


@pytest.mark.parametrize(
    ("pruner", "theirs"),
    [
        (MEDIAN, MedianPruner(n_startup_trials=2)),
        (HALVING, SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)),
        (HYPERBAND, HyperbandPruner(max_resource=27)),
    ],
    ids=["median", "halving", "hyperband"],
)
def test_it_says_what_stock_optuna_says_of_the_same_rows(
    engine: Engine, stock: optuna.Study, pruner: Any, theirs: optuna.pruners.BasePruner
) -> None:
    """Two processes of ours and stock Optuna, each asked about every report; what stock writes all of them read."""
    rng, spec = random.Random(3), spec_of(pruner)
    stock.pruner = theirs
    memories = [Pruning(engine, stock._study_id) for _ in range(2)]
    running: list[tuple[Trial, float]] = []
    said = []
    for _ in range(90):
        if len(running) < 3:
            running.append((stock.ask(), rng.random()))
        place = rng.randrange(len(running))
        trial, quality = running[place]
        step = len(stock._storage.get_trial(trial._trial_id).intermediate_values)
        value = quality * (step + 1) + rng.gauss(0, 0.05)
        ours = [judged(spec, memory, trial, {step: value}) for memory in rng.sample(memories, rng.choice([1, 2]))]
        trial.report(value, step)
        assert {each.prune for each in ours} == {trial.should_prune()}
        stored = stock._storage.get_trial(trial._trial_id).system_attrs
        assert all(each.trial_system_attrs.items() <= stored.items() for each in ours)
        said.append(ours[0].prune)
        if ours[0].prune or step == 8:
            running.pop(place)
            stock.tell(trial, **({"state": TrialState.PRUNED} if ours[0].prune else {"values": quality}))
    assert 3 < sum(said) < 87


@pytest.mark.parametrize("pruner", [MEDIAN, HALVING, HYPERBAND], ids=lambda pruner: pruner["name"])
def test_a_judgement_is_one_statement_outside_of_any_transaction(
    engine: Engine, stock: optuna.Study, pruner: Any
) -> None:
    pruning = Pruning(engine, stock._study_id)
    for value in (0.1, 0.2, 0.3):
        add(stock, value, {0: value, 1: value})
        trial = stock.ask()
        with counted(engine) as sent:
            judged(spec_of(pruner), pruning, trial, {0: 0.5, 1: 0.5})
        assert len(sent) == 1
    with counted(engine) as sent:
        judged(spec_of("none"), pruning, trial, {0: 0.5})
        judged(spec_of(pruner), pruning, trial, {})
    assert sent == []


def test_only_what_has_ended_since_is_read(engine: Engine, stock: optuna.Study) -> None:
    spec, pruning = spec_of(MEDIAN), Pruning(engine, stock._study_id)
    for value in (0.5, 0.6, 0.7):
        add(stock, value, {0: value, 1: value})
    trial = stock.ask()
    assert judged(spec, pruning, trial, {0: 0.1}).prune
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE trial_intermediate_values SET intermediate_value = 0 WHERE step = 0"))
    assert judged(spec, pruning, trial, {0: 0.1}).prune, "what has ended is not read again"
    assert not judged(spec, Pruning(engine, stock._study_id), trial, {0: 0.1}).prune
    for _ in range(4):
        add(stock, 0.05, {0: 0.05, 1: 0.05})
    assert not judged(spec, pruning, trial, {0: 0.1}).prune, "what has ended since is"
    assert not judged(spec, pruning, trial, {1: 0.1}).prune


def test_stored_and_new_reports_are_judged_together(engine: Engine, stock: optuna.Study) -> None:
    spec, pruning = spec_of(MEDIAN), Pruning(engine, stock._study_id)
    for value in (0.5, 0.6):
        add(stock, value, {0: value, 1: value, 2: value})
    good, late = stock.ask(), stock.ask()
    good.report(0.9, 0)
    assert not judged(spec, pruning, good, {1: 0.01}).prune, "its best so far is above the median"
    assert judged(spec, pruning, late, {1: 0.01}).prune
    late.report(0.9, 2)
    assert not judged(spec, pruning, late, {1: 0.01}).prune, "a later step is stored already: that one counts"


def test_diverged_and_cancelled_trials_are_no_rivals(engine: Engine, stock: optuna.Study) -> None:
    for value in (0.5, 0.6):
        add(stock, value, {0: value}, completed_rung_0=value)
    for _ in range(5):
        add(stock, 0.05, {0: 0.05}, infeasible=1.0)
        add(stock, None, {0: 0.95}, cancelled=True, completed_rung_0=0.95)
    trial = stock.ask()
    assert judged(spec_of(MEDIAN), Pruning(engine, stock._study_id), trial, {0: 0.06}).prune
    assert not judged(spec_of(HALVING), Pruning(engine, stock._study_id), trial, {1: 0.7}).prune


def test_a_correction_is_judged_by_at_once(engine: Engine, stock: optuna.Study) -> None:
    spec, pruning = spec_of(MEDIAN), Pruning(engine, stock._study_id)
    ids = [add(stock, value, {0: value}) for value in (0.5, 0.6, 0.7)]
    trial = stock.ask()
    assert judged(spec, pruning, trial, {0: 0.55}).prune
    revise(engine, stock, ids[2], "UPDATE trials SET state = 'FAIL' WHERE trial_id = :trial")
    assert not judged(spec, pruning, trial, {0: 0.55}).prune
    revise(engine, stock, ids[0], "UPDATE trial_intermediate_values SET intermediate_value = 1 WHERE trial_id = :trial")
    assert judged(spec, pruning, trial, {0: 0.55}).prune


def test_what_auto_stood_for_is_kept_with_the_study(engine: Engine, stock: optuna.Study) -> None:
    spec, pruning = spec_of("hyperband"), Pruning(engine, stock._study_id)
    trial = stock.ask()
    assert judged(spec, pruning, trial, {0: 0.5}) == Verdict(prune=False)
    add(stock, 0.9, dict.fromkeys(range(30), 0.9))
    add(stock, 0.0, dict.fromkeys(range(99), 0.0), infeasible=1.0)
    news = judged(spec, pruning, trial, {0: 0.5}).study_system_attrs
    assert news == {RESOURCE: 30}
    stock._storage.set_study_system_attr(stock._study_id, RESOURCE, 30)
    add(stock, 0.9, dict.fromkeys(range(60), 0.9))
    assert judged(spec, pruning, trial, {0: 0.5}).study_system_attrs == {}


def test_threads_that_judge_at_once_count_every_trial_once(engine: Engine, stock: optuna.Study) -> None:
    spec, pruning = spec_of(MEDIAN), Pruning(engine, stock._study_id)
    trials = [stock.ask() for _ in range(4)]
    faults: list[BaseException] = []
    stop = threading.Event()

    def judge_on(trial: Trial) -> None:
        try:
            while not stop.is_set():
                for step in range(3):
                    judged(spec, pruning, trial, {step: 0.5})
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=judge_on, args=(trial,)) for trial in trials]
    for thread in threads:
        thread.start()
    for number in range(30):
        add(stock, number / 30, dict.fromkeys(range(3), number / 30))
    stop.set()
    for thread in threads:
        thread.join()
    assert faults == []
    for step in range(3):
        found = pruning.look(trials[0]._trial_id, {step: 0.5}, rungs=False, longest=False)
        assert sorted(found.at_step) == [number / 30 for number in range(30)]
        assert found.complete == 30


def test_a_study_that_is_gone_is_said_to_be(engine: Engine, stock: optuna.Study) -> None:
    with pytest.raises(NotFound):
        judge_now(spec_of(MEDIAN), Pruning(engine, stock._study_id + 1000), 1, 0, {0: 0.5})
