"""The history in memory is what PostgreSQL holds, whoever wrote it, and costs a few statements to keep so."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import Engine

from hpo import database, rows
from hpo.errors import NotFound
from hpo.history import History
from hpo.pruners import should_prune
from hpo.spec import StudySpec, parse
from hpo.storage import PostgresStorage
from hpo.suggest import Suggestion, suggest

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
DISTRIBUTIONS = {
    "x": FloatDistribution(1e-3, 1, log=True),
    "n": IntDistribution(0, 8, step=2),
    "c": CategoricalDistribution(["a", True, 2.5]),
}
SPACE = [
    {"name": "x", "type": "float", "low": 1e-3, "high": 1, "log": True},
    {"name": "n", "type": "integer", "low": 0, "high": 8, "step": 2},
    {"name": "c", "type": "categorical", "choices": ["a", True, 2.5]},
]


def spec_of(**changes: Any) -> StudySpec:
    return parse({"name": "s", "workload": "external", "seed": 5, "space": SPACE, **changes}, {})


@pytest.fixture
def stock(postgres_url: str) -> Iterator[optuna.Study]:
    """A study opened by stock Optuna, as a person with a notebook would."""
    storage = optuna.storages.RDBStorage(database.normalise(postgres_url).render_as_string(hide_password=False))
    yield optuna.create_study(storage=storage, study_name="s", direction="maximize")
    storage.remove_session()
    storage.engine.dispose()


def trial_of(state: TrialState, value: float | None = None, **more: Any) -> FrozenTrial:
    params = {"x": 0.5, "n": 4, "c": True}
    return create_trial(state=state, value=value, params=params, distributions=DISTRIBUTIONS, **more)


def by_number(history: History, spec: StudySpec) -> dict[int, FrozenTrial]:
    history.refresh()
    return {entry.trial.number: entry.trial for entry in history.snapshot(spec.space).entries}


def execute(engine: Engine, statement: str, **values: Any) -> None:
    with engine.begin() as connection:
        connection.execute(sa.text(statement), values)


def test_it_holds_what_stock_optuna_stored_to_the_last_field(engine: Engine, stock: optuna.Study) -> None:
    history, spec = History(engine, stock._study_id), spec_of()
    assert by_number(history, spec) == {}
    stock.add_trial(trial_of(TrialState.COMPLETE, 0.5, intermediate_values={0: 0.1, 7: math.inf}))
    stock.add_trial(trial_of(TrialState.COMPLETE, math.inf, system_attrs={"a": {"b": [1, None]}}))
    stock.add_trial(trial_of(TrialState.COMPLETE, -math.inf, constraints={"memory": 2.0}))
    stock.add_trial(trial_of(TrialState.PRUNED, intermediate_values={3: math.nan, 4: -math.inf}))
    stock.add_trial(trial_of(TrialState.FAIL))
    stock.enqueue_trial({"x": 0.25})
    running = stock.ask(DISTRIBUTIONS)
    running.report(0.3, 0)
    held = by_number(history, spec)
    assert [repr(trial) for trial in held.values()] == [repr(trial) for trial in stock.trials]
    assert held[0].params["c"] is True
    running.report(0.4, 1)
    running.report(0.5, 2)
    assert by_number(history, spec)[5].intermediate_values == {0: 0.3, 1: 0.4, 2: 0.5}
    stock.tell(running, 0.6)
    assert by_number(history, spec)[5] == stock.trials[5]
    infeasible = [entry.infeasible for entry in history.snapshot(spec.space).entries]
    assert infeasible == [False, False, True, False, False, False]


def test_finished_trials_are_read_again_only_when_a_revision_names_them(engine: Engine, stock: optuna.Study) -> None:
    history, spec = History(engine, stock._study_id), spec_of()
    for _ in range(3):
        stock.add_trial(trial_of(TrialState.COMPLETE, 0.5))
    held = by_number(history, spec)
    earlier = history.snapshot(spec.space)
    execute(
        engine,
        "UPDATE trial_values SET value = 0.7 WHERE trial_id = ANY(:ids)",
        ids=[t._trial_id for t in held.values()],
    )
    assert {trial.value for trial in by_number(history, spec).values()} == {0.5}, "finished trials cost nothing"
    revise(engine, stock._study_id, held[1])
    execute(engine, "UPDATE trials SET state = 'FAIL' WHERE trial_id = :id", id=held[2]._trial_id)
    revise(engine, stock._study_id, held[2])
    again = by_number(history, spec)
    assert [again[number].value for number in (0, 1)] == [0.5, 0.7]
    assert again[2].state == TrialState.FAIL
    assert [entry.trial.value for entry in earlier.entries] == [0.5] * 3, "a snapshot stays what it was"


def revise(engine: Engine, study: int, trial: FrozenTrial) -> None:
    execute(
        engine,
        "INSERT INTO whetstone.revisions (study_id, trial_id, what) VALUES (:study, :trial, 'overwritten')",
        study=study,
        trial=trial._trial_id,
    )


def test_a_revision_that_commits_after_a_later_one_is_not_missed(engine: Engine, stock: optuna.Study) -> None:
    history, spec = History(engine, stock._study_id), spec_of()
    for _ in range(2):
        stock.add_trial(trial_of(TrialState.COMPLETE, 0.5))
    held = by_number(history, spec)
    insert = sa.text("INSERT INTO whetstone.revisions (study_id, trial_id, what) VALUES (:study, :trial, 'slow')")
    with engine.connect() as slow:
        slow.execute(insert, {"study": stock._study_id, "trial": held[0]._trial_id})
        slow.execute(sa.text("UPDATE trial_values SET value = 0.9 WHERE trial_id = :id"), {"id": held[0]._trial_id})
        revise(engine, stock._study_id, held[1])
        assert by_number(history, spec)[0].value == 0.5
        slow.commit()
    assert by_number(history, spec)[0].value == 0.9


def test_a_failed_trial_that_is_queued_again_is_noticed(engine: Engine, stock: optuna.Study) -> None:
    history, spec = History(engine, stock._study_id), spec_of()
    stock.add_trial(trial_of(TrialState.FAIL))
    key = by_number(history, spec)[0]._trial_id
    execute(engine, "UPDATE trials SET state = 'WAITING' WHERE trial_id = :id", id=key)
    assert by_number(history, spec)[0].state == TrialState.WAITING


def test_a_trial_that_only_waits_is_read_once_and_again_after_each_attempt(
    engine: Engine, stock: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    history, spec = History(engine, stock._study_id), spec_of()
    for x in (0.25, 0.75):
        stock.enqueue_trial({"x": x})
    assert {trial.state for trial in by_number(history, spec).values()} == {TrialState.WAITING}
    asked: list[list[int]] = []
    read = rows.read_trials

    def spy(*args: Any, also_ids: Any, **more: Any) -> Any:
        asked.append(list(also_ids))
        return read(*args, also_ids=also_ids, **more)

    monkeypatch.setattr(rows, "read_trials", spy)
    by_number(history, spec)
    assert asked.pop() == [], "a long queue is not read again at every ask and report"
    for steps in (1, 2):
        running = stock.ask(DISTRIBUTIONS)
        assert running.number == 0
        running.report(0.5, steps)
        execute(engine, "UPDATE trials SET state = 'WAITING' WHERE trial_id = :id", id=running._trial_id)
        held = by_number(history, spec)
        assert (held[0].state, len(held[0].intermediate_values)) == (TrialState.WAITING, steps)
        assert asked.pop() == [held[0]._trial_id]
    stock.ask(DISTRIBUTIONS)
    assert by_number(history, spec)[0].state == TrialState.RUNNING


def test_a_refresh_costs_as_many_statements_for_many_trials_as_for_few(engine: Engine, stock: optuna.Study) -> None:
    def statements() -> int:
        counted: list[str] = []

        def count(*args: Any) -> None:
            counted.append(args[2])

        sa.event.listen(engine, "before_cursor_execute", count)
        history.refresh()
        sa.event.remove(engine, "before_cursor_execute", count)
        return len(counted)

    history = History(engine, stock._study_id)
    history.refresh()
    costs = []
    for batch in (1, 20):
        for _ in range(batch):
            stock.add_trial(trial_of(TrialState.COMPLETE, 0.5, intermediate_values={0: 0.1}))
            stock.ask(DISTRIBUTIONS).report(0.1, 0)
        costs.append(statements())
    assert costs[0] == costs[1] <= 12


def test_threads_may_refresh_while_others_write(engine: Engine, stock: optuna.Study) -> None:
    history, spec, storage = History(engine, stock._study_id), spec_of(), PostgresStorage(engine)
    errors: list[BaseException] = []
    done = threading.Event()

    def read() -> None:
        try:
            most = 0
            while not done.is_set():
                history.refresh()
                held = history.snapshot(spec.space).entries
                assert [entry.trial.number for entry in held] == list(range(len(held)))
                assert len(held) >= most
                most = len(held)
        except BaseException as error:
            errors.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for number in range(40):
        storage.create_new_trial(stock._study_id, trial_of(TrialState.COMPLETE, float(number)))
    done.set()
    for reader in readers:
        reader.join()
    assert errors == []
    assert [trial.value for trial in by_number(history, spec).values()] == [float(number) for number in range(40)]


def test_it_refuses_to_read_what_may_be_rolled_back(engine: Engine, stock: optuna.Study) -> None:
    history = History(engine, stock._study_id)
    with database.transaction(engine), pytest.raises(RuntimeError, match="outside of a transaction"):
        history.refresh()


def test_a_study_that_is_gone_is_said_to_be(engine: Engine, stock: optuna.Study) -> None:
    with pytest.raises(NotFound):
        History(engine, stock._study_id + 1000).refresh()


def store(engine: Engine, study: int, made: Suggestion, value: float | None) -> int:
    """What a coordinator does with a suggestion, in one transaction."""
    parameters = {name: (made.internal[name], made.distributions[name]) for name in made.params}
    with database.transaction(engine) as connection:
        for key, attribute in made.study_system_attrs.items():
            PostgresStorage(engine).set_study_system_attr(study, key, attribute)
        state = TrialState.RUNNING if value is None else TrialState.COMPLETE
        values = None if value is None else [value]
        marks = {**made.trial_system_attrs, **({} if value is None else {"constraints:infeasible": 0})}
        return rows.insert_trial(connection, study, state, parameters, marks, values=values)[1]


@pytest.mark.parametrize("sampler", ["tpe", "cmaes", "qmc", "random"])
def test_another_process_suggests_the_same_from_what_is_stored(
    engine: Engine, stock: optuna.Study, sampler: str
) -> None:
    spec, study = spec_of(sampler=sampler), stock._study_id
    lasting = History(engine, study)
    for number in range(25):
        made = suggest(spec, lasting, number)
        assert suggest(spec, History(engine, study), number) == made
        value = None if number % 8 == 7 else -((math.log10(made.params["x"]) + 1) ** 2)
        assert store(engine, study, made, value) == number
    assert [trial.params for trial in stock.trials] == [t.params for t in by_number(lasting, spec).values()]
    assert lasting.snapshot(spec.space).attributes == stock._storage.get_study_system_attrs(study)
    if sampler == "cmaes":
        generations = [trial.system_attrs.get("cma:generation", 0) for trial in stock.trials]
        assert max(generations) >= 2


def test_stock_optuna_goes_on_with_our_study_and_we_with_its(engine: Engine, stock: optuna.Study) -> None:
    spec, study = spec_of(), stock._study_id
    history = History(engine, study)
    stock.sampler = optuna.samplers.TPESampler(seed=1)
    for number in range(24):
        if number % 2:
            trial = stock.ask(DISTRIBUTIONS)
            stock.tell(trial, trial.params["x"])
        else:
            made = suggest(spec, history, number)
            store(engine, study, made, float(made.params["x"]))
    assert len(by_number(history, spec)) == 24
    assert stock.best_value > 0.5


def test_a_pruner_judges_by_stored_reports(engine: Engine, stock: optuna.Study) -> None:
    spec = spec_of(pruner={"name": "median", "n_startup_trials": 2})
    history = History(engine, stock._study_id)
    for top in (0.5, 0.6, 0.7):
        stock.add_trial(trial_of(TrialState.COMPLETE, top, intermediate_values={0: top}))
    good, bad = stock.ask(DISTRIBUTIONS), stock.ask(DISTRIBUTIONS)
    good.report(0.9, 0)
    bad.report(0.1, 0)
    assert not should_prune(spec, history, good.number).prune
    assert should_prune(spec, history, bad.number).prune
