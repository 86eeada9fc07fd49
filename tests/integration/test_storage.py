"""Our storage is Optuna's: it passes Optuna's own conformance suite, and stock Optuna reads and writes beside it."""

from __future__ import annotations

import math
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest import mock

import optuna
import pytest
import sqlalchemy as sa
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage
from optuna.study import StudyDirection
from optuna.testing.pytest_storages import StorageTestCase
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection, Engine

from hpo import database
from hpo.database import transaction
from hpo.rows import (
    finish_trial,
    insert_trial,
    lock_study,
    move_trial,
    set_attr,
    set_param,
    set_report,
)
from hpo.storage import PostgresStorage

PARAMS = {
    "eta[conv1]": (0.01, FloatDistribution(1e-4, 1e-1, log=True)),
    "batch_pairs": (64.0, IntDistribution(32, 256, step=32)),
    "init": (1.0, CategoricalDistribution(["he", "paper"])),
}


@pytest.fixture
def storage(engine: Engine) -> BaseStorage:
    return PostgresStorage(engine)


@pytest.fixture
def study(storage: BaseStorage) -> int:
    return storage.create_new_study([StudyDirection.MAXIMIZE], "ours")


@pytest.fixture
def stock(postgres_url: str) -> Iterator[RDBStorage]:
    made = RDBStorage(postgres_url)
    yield made
    made.engine.dispose()


class TestConformance(StorageTestCase):
    """Optuna's suite, each test on a database of its own."""


def noting(sent: list[str], call: Any) -> Any:
    """The same as `call`, which goes past SQLAlchemy's events."""

    def noted(engine: Engine, statement: str, values: Any) -> Any:
        sent.append(statement)
        return call(engine, statement, values)

    return noted


@contextmanager
def counted(engine: Engine) -> Iterator[list[str]]:
    """The statements that are sent while the block runs."""
    sent: list[str] = []

    def note(_conn: object, _cursor: object, statement: str, *_: object) -> None:
        sent.append(statement)

    sa.event.listen(engine, "before_cursor_execute", note)
    try:
        with mock.patch.object(database, "_committing", noting(sent, database._committing)):
            yield sent
    finally:
        sa.event.remove(engine, "before_cursor_execute", note)


def plain(trials: list[FrozenTrial]) -> list[dict[str, Any]]:
    """Trials as comparable data: a NaN equals a NaN, and order within a dictionary counts only for parameters."""
    return [
        {
            **{name: part for name, part in vars(trial).items() if name != "intermediate_values"},
            "order": list(trial.params),
            "reports": {step: repr(reported) for step, reported in trial.intermediate_values.items()},
        }
        for trial in trials
    ]


# With stock Optuna on the same database


def rich_trials(into: optuna.Study) -> None:
    """Trials in every state, with every kind of value that Optuna stores."""
    into.enqueue_trial({"eta[conv1]": 0.002}, user_attrs={"why": ["a", {"b": None}]})
    for index in range(4):
        trial = into.ask()
        trial.suggest_float("eta[conv1]", 1e-4, 1e-1, log=True)
        trial.suggest_int("batch_pairs", 32, 256, step=32)
        trial.suggest_categorical("init", ["he", "paper", 3, 0.5, True, None])
        trial.report(math.nan, 0)
        trial.report(math.inf, 2)
        trial.report(-0.25, 1)
        trial.set_constraint("infeasible", float(index))
        trial.set_user_attr("note", f'quote " and umlaut ü {index}')
        if index == 0:
            into.tell(trial, 0.5 + index)
        elif index == 1:
            into.tell(trial, -math.inf)
        elif index == 2:
            into.tell(trial, state=TrialState.PRUNED)
    into.tell(into.ask(), state=TrialState.FAIL)
    into.enqueue_trial({"eta[conv1]": 0.003})


@pytest.mark.parametrize("writer", ["stock", "ours"])
def test_what_either_writes_both_read_the_same(storage: BaseStorage, stock: RDBStorage, writer: str) -> None:
    first, second = (stock, storage) if writer == "stock" else (storage, stock)
    study = optuna.create_study(storage=first, study_name="shared", direction="maximize")
    study.set_user_attr("dataset", "omniglot")
    rich_trials(study)
    other = optuna.load_study(storage=second, study_name="shared")
    assert plain(other.get_trials()) == plain(study.get_trials())
    assert {trial.state for trial in other.trials} == set(TrialState)
    assert other.user_attrs == study.user_attrs == {"dataset": "omniglot"}
    study_id = stock.get_study_id_from_name("shared")
    assert storage.get_study_system_attrs(study_id) == stock.get_study_system_attrs(study_id)
    assert other.directions == study.directions
    assert plain([other.best_trial]) == plain([study.best_trial])
    # And the other one goes on with it.
    rich_trials(other)
    assert [trial.number for trial in study.get_trials()] == list(range(11))
    assert plain(other.get_trials()) == plain(study.get_trials())


def test_both_number_one_studys_trials_at_once_without_gap_or_double(
    storage: PostgresStorage, stock: RDBStorage, study: int
) -> None:
    faults: list[BaseException] = []

    def create(by: BaseStorage) -> None:
        try:
            for _ in range(15):
                by.create_new_trial(study)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=create, args=(by,)) for by in (storage, stock) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert [trial.number for trial in storage.get_all_trials(study)] == list(range(120))


def test_deleting_a_study_takes_our_rows_along_and_leaves_the_others(
    engine: Engine, storage: PostgresStorage, stock: RDBStorage
) -> None:
    for name in ("kept", "gone"):
        rich_trials(optuna.create_study(storage=stock, study_name=name, direction="maximize"))
    kept, gone = (stock.get_study_id_from_name(name) for name in ("kept", "gone"))
    before = plain(stock.get_all_trials(kept))
    with transaction(engine) as conn:
        for study in (kept, gone):
            trial = storage.get_all_trials(study)[0]._trial_id
            for statement in (
                "INSERT INTO whetstone.studies (study_id, spec, workload, seed) VALUES (:study, '{}', 'x', 1)",
                "INSERT INTO whetstone.attempts (study_id, trial_id, trial_number, attempt, token, bearer, expires_at)"
                " VALUES (:study, :trial, 0, 1, nextval('whetstone.fencing'), 'token:1', clock_timestamp())",
                "INSERT INTO whetstone.metrics (attempt_id, epoch, metrics)"
                " SELECT attempt_id, 0, '{}' FROM whetstone.attempts WHERE study_id = :study",
                "INSERT INTO whetstone.revisions (study_id, trial_id, what) VALUES (:study, :trial, 'x')",
            ):
                conn.execute(sa.text(statement), {"study": study, "trial": trial})
    storage.delete_study(gone)
    assert [row._study_id for row in stock.get_all_studies()] == [kept]
    assert plain(stock.get_all_trials(kept)) == before
    with engine.connect() as connection:
        for table in ("studies", "attempts", "metrics", "revisions"):
            assert connection.execute(sa.text(f"SELECT count(*) FROM whetstone.{table}")).scalar() == 1, table


# One transaction


def test_optunas_rows_and_ours_commit_together_or_not_at_all(engine: Engine, storage: PostgresStorage) -> None:
    def launch(*, fail: bool) -> None:
        with transaction(engine) as conn:
            study = storage.create_new_study([StudyDirection.MAXIMIZE], "together")
            storage.set_study_user_attr(study, "key", 1)
            trial = storage.create_new_trial(study)
            storage.set_trial_param(trial, "x", 0.5, FloatDistribution(0, 1))
            storage.set_trial_state_values(trial, TrialState.COMPLETE, [1.0])
            assert storage.get_trial(trial).params == {"x": 0.5}
            values = {"study": study}
            statement = "INSERT INTO whetstone.studies (study_id, spec, workload, seed) VALUES (:study, '{}', 'x', 1)"
            conn.execute(sa.text(statement), values)
            if fail:
                raise LookupError

    with pytest.raises(LookupError):
        launch(fail=True)
    assert storage.get_all_studies() == []
    launch(fail=False)
    assert [study.study_name for study in storage.get_all_studies()] == ["together"]
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM whetstone.studies")).scalar() == 1


def test_a_name_that_is_taken_does_not_spoil_the_open_transaction(engine: Engine, storage: PostgresStorage) -> None:
    with transaction(engine):
        storage.create_new_study([StudyDirection.MAXIMIZE], "taken")
        with pytest.raises(optuna.exceptions.DuplicatedStudyError):
            storage.create_new_study([StudyDirection.MAXIMIZE], "taken")
        with pytest.raises(KeyError):
            storage.get_study_id_from_name("missing")
        storage.create_new_study([StudyDirection.MAXIMIZE], "free")
    assert {study.study_name for study in storage.get_all_studies()} == {"taken", "free"}


# Calls outside of a transaction


@contextmanager
def round_trips(engine: Engine) -> Iterator[list[str]]:
    """What is sent to the server while the block runs; a statement in a transaction costs at least two more."""
    sent: list[str] = []

    def note(_conn: object, cursor: Any, statement: str, *_: object) -> None:
        sent.extend([statement] if cursor.connection.autocommit else ["BEGIN", statement, "COMMIT"])

    sa.event.listen(engine, "before_cursor_execute", note)
    try:
        with mock.patch.object(database, "_committing", noting(sent, database._committing)):
            yield sent
    finally:
        sa.event.remove(engine, "before_cursor_execute", note)


def test_a_write_is_one_round_trip_and_commits_by_itself(
    engine: Engine, storage: PostgresStorage, study: int, stock: RDBStorage
) -> None:
    trial, waiting = storage.create_new_trial(study), storage.create_new_trial(study)
    x = FloatDistribution(0, 1)
    writes: list[Any] = [
        lambda: storage.create_new_trial(study),
        lambda: storage.set_trial_param(trial, "x", 0.5, x),
        lambda: storage.set_trial_param(waiting, "x", 0.25, x),
        lambda: storage.set_trial_intermediate_value(trial, 0, 0.5),
        lambda: storage.set_trial_user_attr(trial, "u", 1),
        lambda: storage.set_trial_system_attr(trial, "s", 1),
        lambda: storage.set_study_user_attr(study, "u", 1),
        lambda: storage.set_trial_state_values(waiting, TrialState.WAITING),
        lambda: storage.set_trial_state_values(trial, TrialState.COMPLETE, [1.0]),
    ]
    for write in writes:
        with round_trips(engine) as sent:
            write()
        assert len(sent) == 1, sent
    # A distribution that reads otherwise is held against the study's, which costs a second one.
    with round_trips(engine) as sent:
        storage.set_trial_param(storage.create_new_trial(study), "x", 0.5, FloatDistribution(0, 2))
    assert len(sent) == 3
    with round_trips(engine) as sent:
        storage.create_new_trial(study, storage.get_trial(trial))
    assert len(sent) == 3
    assert stock.get_trial(trial) == storage.get_trial(trial)


def test_what_has_finished_is_read_once_unless_a_revision_names_it(
    engine: Engine, storage: PostgresStorage, stock: RDBStorage, study: int
) -> None:
    rich_trials(optuna.load_study(storage=stock, study_name="ours"))
    assert plain(storage.get_all_trials(study)) == plain(stock.get_all_trials(study))
    finished = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    with round_trips(engine) as sent:
        first = storage.get_all_trials(study, states=finished, deepcopy=False)
    assert len(sent) == 1, "nothing has changed"
    change = sa.text("UPDATE trial_values SET value = 0.75 WHERE trial_id = :trial")
    with engine.begin() as connection:
        connection.execute(change, {"trial": first[0]._trial_id})
    again = storage.get_all_trials(study, states=finished, deepcopy=False)
    assert all(one is other for one, other in zip(again, first, strict=True))
    assert storage.get_trial(first[0]._trial_id).value == 0.5
    with engine.begin() as connection:
        connection.execute(
            sa.text("INSERT INTO whetstone.revisions (study_id, trial_id, what) VALUES (:study, :trial, 'x')"),
            {"study": study, "trial": first[0]._trial_id},
        )
    assert storage.get_trial(first[0]._trial_id).value == 0.75
    assert storage.get_all_trials(study, states=finished)[0].value == 0.75
    assert first[0].value == 0.5
    own = storage.get_all_trials(study)
    own[0].params["x"] = 1
    own[0].user_attrs["x"] = 1
    assert plain(storage.get_all_trials(study)) == plain(RDBStorage(stock.url).get_all_trials(study))


def test_a_study_that_another_has_deleted_is_gone_here_too(storage: PostgresStorage, stock: RDBStorage) -> None:
    rich_trials(optuna.create_study(storage=stock, study_name="gone", direction="maximize"))
    study = stock.get_study_id_from_name("gone")
    trial = storage.get_all_trials(study)[0]._trial_id
    stock.delete_study(study)
    for call in (lambda: storage.get_all_trials(study), lambda: storage.get_trial(trial)):
        with pytest.raises(KeyError):
            call()


def test_it_goes_to_another_process_by_its_address(storage: PostgresStorage, study: int) -> None:
    trial = storage.create_new_trial(study)
    other = pickle.loads(pickle.dumps(storage))
    assert other.get_all_trials(study) == [storage.get_trial(trial)]
    other.engine.dispose()


# Whole trials in one statement


def test_a_trial_is_added_with_all_it_has_in_one_round_trip(engine: Engine, study: int) -> None:
    with transaction(engine) as conn, counted(engine) as sent:
        trial_id, number = insert_trial(
            conn,
            study,
            TrialState.RUNNING,
            PARAMS,
            {"whetstone:origin": "queued"},
            user_attrs={"u": 1},
            reports={0: 0.1},
        )
    assert len(sent) == 1
    assert number == 0
    [trial] = PostgresStorage(engine).get_all_trials(study)
    assert trial._trial_id == trial_id
    assert trial.params == {"eta[conv1]": 0.01, "batch_pairs": 64, "init": "paper"}
    assert list(trial.params) == list(PARAMS)
    assert trial.distributions == {name: distribution for name, (_, distribution) in PARAMS.items()}
    assert (trial.system_attrs, trial.user_attrs) == ({"whetstone:origin": "queued"}, {"u": 1})
    assert trial.intermediate_values == {0: 0.1}
    assert trial.datetime_start is not None
    assert abs(trial.datetime_start - datetime.now()) < timedelta(minutes=1)
    assert trial.datetime_complete is None


def test_a_recorded_trial_keeps_its_own_times(engine: Engine, study: int) -> None:
    began = datetime(2015, 7, 10, 12, 0, tzinfo=UTC)
    with transaction(engine) as conn:
        insert_trial(
            conn, study, TrialState.COMPLETE, PARAMS, values=[0.92], began=began, ended=began + timedelta(hours=1)
        )
        [trial] = PostgresStorage(engine).get_all_trials(study)
    assert trial.value == 0.92
    assert trial.duration == timedelta(hours=1)
    assert trial.datetime_start is not None
    assert trial.datetime_start.astimezone(UTC) == began


def test_a_trial_ends_once_with_its_value_and_attributes(engine: Engine, study: int) -> None:
    with transaction(engine) as conn:
        trial, _ = insert_trial(conn, study, TrialState.RUNNING, PARAMS, {"a": 1})
        with counted(engine) as sent:
            assert finish_trial(conn, trial, TrialState.COMPLETE, 0.5, {"constraints:infeasible": 0, "a": 2})
        assert len(sent) == 1
        assert not finish_trial(conn, trial, TrialState.FAIL, 0.9, {"a": 3})
        assert not move_trial(conn, trial, TrialState.WAITING)
        [ended] = PostgresStorage(engine).get_all_trials(study)
    assert (ended.state, ended.value) == (TrialState.COMPLETE, 0.5)
    assert ended.system_attrs == {"a": 2, "constraints:infeasible": 0}
    assert ended.datetime_complete is not None
    with pytest.raises(UpdateFinishedTrialError):
        PostgresStorage(engine).set_trial_state_values(trial, TrialState.FAIL)


def test_of_many_ends_at_once_exactly_one_counts(engine: Engine, study: int) -> None:
    with transaction(engine) as conn:
        trial, _ = insert_trial(conn, study, TrialState.RUNNING)
    won: list[float] = []

    def tell(value: float) -> None:
        with transaction(engine) as conn:
            if finish_trial(conn, trial, TrialState.COMPLETE, value):
                won.append(value)

    threads = [threading.Thread(target=tell, args=(float(value),)) for value in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [PostgresStorage(engine).get_trial(trial).value] == won


def test_what_is_no_value_or_no_end_is_refused(engine: Engine, study: int) -> None:
    def attempt(*arguments: Any) -> None:
        with transaction(engine) as conn:
            finish_trial(conn, trial, *arguments)

    with transaction(engine) as conn:
        trial, _ = insert_trial(conn, study, TrialState.RUNNING)
    with pytest.raises(ValueError, match="not a number"):
        attempt(TrialState.COMPLETE, math.nan)
    with pytest.raises(ValueError, match="does not end"):
        attempt(TrialState.WAITING)
    assert PostgresStorage(engine).get_trial(trial).state == TrialState.RUNNING


def test_a_queued_trial_is_leased_completed_by_the_sampler_and_queued_again(engine: Engine, study: int) -> None:
    with transaction(engine) as conn:
        trial, _ = insert_trial(conn, study, TrialState.WAITING, {"init": PARAMS["init"]})
        [waiting] = PostgresStorage(engine).get_all_trials(study)
        assert waiting.datetime_start is None
        assert move_trial(conn, trial, TrialState.RUNNING)
        assert not move_trial(conn, trial, TrialState.RUNNING)
        for name in ("eta[conv1]", "batch_pairs"):
            assert set_param(conn, trial, name, PARAMS[name]) == (True, None)
        for step, value in ((3, 0.5), (4, math.nan), (3, 0.6)):
            assert set_report(conn, trial, step, value)
        assert set_attr(conn, trial, "system", "k", [1])
        [running] = PostgresStorage(engine).get_all_trials(study)
        assert running.state == TrialState.RUNNING
        assert running.datetime_start is not None
        assert running.params == {"init": "paper", "eta[conv1]": 0.01, "batch_pairs": 64}
        assert running.intermediate_values[3] == 0.6
        assert math.isnan(running.intermediate_values[4])
        assert running.system_attrs == {"k": [1]}
        assert move_trial(conn, trial, TrialState.WAITING)
    assert PostgresStorage(engine).get_trial(trial).state == TrialState.WAITING


def test_a_missing_study_or_trial_is_a_key_error(engine: Engine, storage: PostgresStorage) -> None:
    def insert() -> None:
        with transaction(engine) as conn:
            insert_trial(conn, 99, TrialState.RUNNING)

    for call in (
        insert,
        lambda: storage.get_all_trials(99),
        lambda: storage.get_n_trials(99),
        lambda: storage.get_best_trial(99),
        lambda: storage.get_trial(99),
        lambda: storage.delete_study(99),
        lambda: storage.set_trial_param(99, "x", 0.0, FloatDistribution(0, 1)),
        lambda: storage.get_study_user_attrs(99),
    ):
        with pytest.raises(KeyError, match="99"):
            call()


# Many trials in few statements


def fill(conn: Connection, study: int, count: int) -> list[int]:
    return [insert_trial(conn, study, TrialState.RUNNING, PARAMS, {"a": 1}, reports={0: 1.0})[0] for _ in range(count)]


def test_trials_are_read_in_one_statement_however_many_they_are(
    engine: Engine, storage: PostgresStorage, study: int
) -> None:
    with transaction(engine) as conn:
        for count in (1, 50):
            fill(conn, study, count)
            with counted(engine) as sent:
                assert len(storage.get_all_trials(study)) >= count
            assert len(sent) == 1


def test_the_study_lock_holds_back_numbering_but_no_report(engine: Engine, study: int) -> None:
    with transaction(engine) as conn:
        trial, _ = insert_trial(conn, study, TrialState.RUNNING)
    second = database.connect(engine.url.render_as_string(hide_password=False))

    def impatient(work: Any) -> None:
        with transaction(second) as conn:
            conn.execute(sa.text("SET LOCAL lock_timeout = '200ms'"))
            work(conn)

    with transaction(engine) as conn:
        lock_study(conn, study)
        impatient(lambda other: set_report(other, trial, 0, 1.0))
        impatient(
            lambda other: other.execute(
                sa.text("INSERT INTO whetstone.revisions (study_id, trial_id, what) VALUES (:study, :trial, 'x')"),
                {"study": study, "trial": trial},
            )
        )
        with pytest.raises(sa.exc.OperationalError, match="lock timeout"):
            impatient(lambda other: insert_trial(other, study, TrialState.RUNNING))
    second.dispose()
