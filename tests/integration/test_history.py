"""The history in memory is what PostgreSQL holds, whoever wrote it, and costs a few statements to keep so."""

from __future__ import annotations

import copy
import math
import threading
import time
from collections.abc import Iterator
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution, distribution_to_json
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import Engine

from hpo import database, rows, snapshot
from hpo import history as history_module
from hpo.errors import NotFound
from hpo.history import CHANGES, History
from hpo.spec import StudySpec, parse
from hpo.storage import PostgresStorage
from hpo.suggest import Suggestion, choose
from tests.integration.test_storage import counted

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


def in_short(trial: FrozenTrial) -> FrozenTrial:
    """What a history keeps of a trial: of its reports the last, once it has finished."""
    short = copy.deepcopy(trial)
    reports = trial.intermediate_values if trial.state.is_finished() else {}
    short.intermediate_values = {step: reports[step] for step in reports if step == trial.last_step}
    return short


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
    assert [repr(trial) for trial in held.values()] == [repr(in_short(trial)) for trial in stock.trials]
    assert held[0].params["c"] is True
    running.report(0.4, 1)
    stock.tell(running, 0.6)
    assert by_number(history, spec)[5] == in_short(stock.trials[5])
    assert by_number(history, spec)[5].intermediate_values == {1: 0.4}
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


def test_a_parameter_is_read_back_whatever_distribution_stock_optuna_gave_it(
    engine: Engine, stock: optuna.Study
) -> None:
    """Many forms among many trials: more than travel as places in a common list."""
    history, spec = History(engine, stock._study_id), spec_of()
    for number in range(50):
        trial = stock.ask()
        if number % 3:
            trial.suggest_float("x", 1e-3, 1, log=True)
        trial.suggest_int("n", 0, 8, step=2 if number % 5 else 4)
        trial.suggest_float(f"own {number % 7}", -number - 1, number + 1)
        trial.suggest_categorical("c", ["a", True, 2.5])
        if number % 2:
            stock.tell(trial, 0.5)
    held = by_number(history, spec)
    assert list(held.values()) == [in_short(trial) for trial in stock.trials]
    assert [list(trial.params) for trial in held.values()] == [list(trial.params) for trial in stock.trials]
    for entry in history.snapshot(spec.space).entries:
        assert entry.key == spec.space.key(entry.trial.params)
        assert (entry.key is None) == (entry.number % 3 == 0)


def test_a_point_outside_of_the_space_is_none_of_its_points(engine: Engine, stock: optuna.Study) -> None:
    history, spec = History(engine, stock._study_id), spec_of()
    wide = {
        "x": FloatDistribution(1e-4, 10, log=True),
        "n": IntDistribution(0, 9),
        "c": CategoricalDistribution(["b", "a", True, 2.5]),
    }
    inside = {"x": 0.5, "n": 4, "c": True}
    for point in ({}, {"x": 5.0}, {"n": 3}, {"c": "b"}, {"n": 8}):
        stock.add_trial(create_trial(value=0.5, params=inside | point, distributions=wide))
    by_number(history, spec)
    keys = [entry.key for entry in history.snapshot(spec.space).entries]
    assert keys == [(0.5, 4, True), None, None, None, (0.5, 8, True)]


def test_a_correction_under_the_studys_lock_is_never_missed(engine: Engine, stock: optuna.Study) -> None:
    history, spec = History(engine, stock._study_id), spec_of()
    for _ in range(2):
        stock.add_trial(trial_of(TrialState.COMPLETE, 0.5))
    held = by_number(history, spec)
    insert = sa.text("INSERT INTO whetstone.revisions (study_id, trial_id, what) VALUES (:study, :trial, 'x')")
    change = sa.text("UPDATE trial_values SET value = :value WHERE trial_id = :trial")

    def correct(number: int) -> None:
        with database.transaction(engine) as connection:
            rows.lock_study(connection, stock._study_id)
            connection.execute(insert, {"study": stock._study_id, "trial": held[number]._trial_id})
            time.sleep(0.05)
            connection.execute(change, {"value": 0.9, "trial": held[number]._trial_id})

    both = [threading.Thread(target=correct, args=(number,)) for number in held]
    for each in both:
        each.start()
    while any(each.is_alive() for each in both):
        by_number(history, spec)
    assert [trial.value for trial in by_number(history, spec).values()] == [0.9, 0.9]


def test_a_queued_trial_is_read_again_when_it_is_taken_and_when_a_revision_names_it(
    engine: Engine, stock: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    history, spec = History(engine, stock._study_id), spec_of()
    for x in (0.25, 0.75):
        stock.enqueue_trial({"x": x})
    held = by_number(history, spec)
    assert {trial.state for trial in held.values()} == {TrialState.WAITING}
    read = spy(monkeypatch)
    by_number(history, spec)
    assert read == [[]], "a long queue is not read again at every ask"
    execute(
        engine,
        "INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json) VALUES (:id, 'n', 4, :text)",
        id=held[1]._trial_id,
        text=distribution_to_json(DISTRIBUTIONS["n"]),
    )
    revise(engine, stock._study_id, held[1])
    assert by_number(history, spec)[1].params == {"n": 4}
    assert stock.ask(DISTRIBUTIONS).number == 0
    assert by_number(history, spec)[0].state == TrialState.RUNNING
    assert read[1:] == [[1], [0]]


def test_a_trial_that_stock_optuna_gives_its_parameters_is_read_until_it_has_them_all(
    engine: Engine, stock: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    history, spec = History(engine, stock._study_id), spec_of()
    trial = stock.ask()
    assert by_number(history, spec)[0].params == {}
    version = history.version
    by_number(history, spec)
    assert history.version == version, "nothing has changed"
    x = trial.suggest_float("x", 1e-3, 1, log=True)
    assert by_number(history, spec)[0].params == {"x": x}
    n, c = trial.suggest_int("n", 0, 8, step=2), trial.suggest_categorical("c", ["a", True, 2.5])
    assert by_number(history, spec)[0].params == {"x": x, "n": n, "c": c}
    [entry] = history.snapshot(spec.space).entries
    assert entry.key == (x, n, c)
    assert history.version > version
    read = spy(monkeypatch)
    by_number(history, spec)
    assert read == [[]]


def spy(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The numbers of the trials that each refresh has read, from now on."""
    read: list[list[int]] = []
    apply = History.apply

    def noting(history: History, changes: Any) -> None:
        read.append([] if changes["columns"] is None else changes["columns"]["trials"]["numbers"])
        apply(history, changes)

    monkeypatch.setattr(History, "apply", noting)
    return read


def test_a_refresh_is_one_statement_outside_of_any_transaction(engine: Engine, stock: optuna.Study) -> None:
    history = History(engine, stock._study_id)
    for _ in range(3):
        stock.add_trial(trial_of(TrialState.COMPLETE, 0.5, intermediate_values={0: 0.1}))
        stock.ask(DISTRIBUTIONS).report(0.1, 0)
        with counted(engine) as sent:
            history.refresh()
        assert len(sent) == 1


def test_an_answer_that_comes_late_takes_back_nothing_that_has_finished(engine: Engine, stock: optuna.Study) -> None:
    history, spec = History(engine, stock._study_id), spec_of()
    trial = stock.ask(DISTRIBUTIONS)
    early = database.call(engine, CHANGES, {"study": stock._study_id, **history.cursor().arguments()})
    stock.tell(trial, 0.5)
    assert by_number(history, spec)[0].value == 0.5
    execute(engine, "UPDATE trial_values SET value = 0.7 WHERE trial_id = :id", id=trial._trial_id)
    revise(engine, stock._study_id, stock.trials[0])
    middle = database.call(engine, CHANGES, {"study": stock._study_id, **history.cursor().arguments()})
    execute(engine, "UPDATE trial_values SET value = 0.9 WHERE trial_id = :id", id=trial._trial_id)
    revise(engine, stock._study_id, stock.trials[0])
    assert by_number(history, spec)[0].value == 0.9
    for late in (early, middle):
        history.apply(late)
        assert history.snapshot(spec.space).entries[0].trial.value == 0.9
    assert by_number(history, spec)[0].value == 0.9


def test_a_snapshot_that_nothing_has_changed_is_the_same_one(engine: Engine, stock: optuna.Study) -> None:
    history, spec = History(engine, stock._study_id), spec_of()
    stock.add_trial(trial_of(TrialState.COMPLETE, 0.5))
    history.refresh()
    earlier = history.snapshot(spec.space)
    history.refresh()
    assert history.snapshot(spec.space) is earlier
    stock.add_trial(trial_of(TrialState.COMPLETE, 0.6))
    history.refresh()
    later = history.snapshot(spec.space)
    assert later.entries[0] is earlier.entries[0], "a trial is made once"
    assert (len(earlier.entries), len(later.entries)) == (1, 2)
    stock.set_user_attr("note", 1)
    stock._storage.set_study_system_attr(stock._study_id, "place", 7)
    history.refresh()
    assert history.snapshot(spec.space).attributes["place"] == 7
    assert "place" not in later.attributes


def test_a_snapshot_has_each_change_wherever_it_stands_and_earlier_ones_have_none(
    engine: Engine, stock: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (history_module, snapshot):
        monkeypatch.setattr(module, "STRETCH", 4)
    history, spec = History(engine, stock._study_id), spec_of()
    given = []
    for turn in range(11):
        stock.add_trial(trial_of(TrialState.WAITING) if turn % 3 else trial_of(TrialState.COMPLETE, 0.5))
        if turn % 3 == 2:
            stock.ask()  # takes the first that waits
        history.refresh()
        made = history.snapshot(spec.space)
        assert list(made.entries) == history.entries()
        given.append((made.entries, [entry.state for entry in made.entries]))
    for entries, states in given:
        assert [entry.state for entry in entries] == states


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


def fresh(spec: StudySpec, history: History, number: int) -> Suggestion:
    history.refresh()
    return choose(spec, history.snapshot(spec.space), number)


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
        made = fresh(spec, lasting, number)
        assert fresh(spec, History(engine, study), number) == made
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
            made = fresh(spec, history, number)
            store(engine, study, made, float(made.params["x"]))
    assert len(by_number(history, spec)) == 24
    assert stock.best_value > 0.5
