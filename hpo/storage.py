"""Optuna's storage over its own stock tables: a call is one statement, and what has finished is read once.

Every call is part of the transaction that this thread has open on the engine (`database.transaction`), and then reads
what that transaction sees; or it is a transaction of its own, of one statement (two where a parameter's distribution
has to be held against an older one). Then trials come from memory (`hpo/archive.py`). Invariant: either way what is
read is what stock Optuna would read at that moment. Statements for whole trials stand in `hpo/rows.py`.
"""

from __future__ import annotations

import contextlib
import json
import threading
import uuid
from collections.abc import Container, Iterator, Sequence
from typing import Any, Literal, NoReturn

import sqlalchemy as sa
from optuna.distributions import (
    BaseDistribution,
    check_distribution_compatibility,
    json_to_distribution,
)
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Engine

from hpo import rows
from hpo.archive import Archive, read_study, read_whole
from hpo.database import alone, connect, in_transaction, transaction
from hpo.errors import NotFound

_INSERT_STUDY = sa.text("""
    WITH study AS (
        INSERT INTO public.studies (study_name) VALUES (:name) ON CONFLICT (study_name) DO NOTHING RETURNING study_id
    ),
    directions AS (
        INSERT INTO public.study_directions (study_id, objective, direction)
        SELECT study_id, d.place - 1, CAST(d.direction AS public.studydirection)
        FROM study, unnest(CAST(:directions AS text[])) WITH ORDINALITY AS d (direction, place)
    )
    SELECT study_id FROM study
""")

# Children first: Optuna's foreign keys do not cascade; ours, from the schema whetstone, do.
_OF_TRIALS = (
    "trial_heartbeats",
    "trial_intermediate_values",
    "trial_params",
    "trial_system_attributes",
    "trial_user_attributes",
    "trial_values",
)
_OF_STUDY = ("trials", "study_directions", "study_system_attributes", "study_user_attributes", "studies")
_DELETE_STUDY = [
    sa.text(f"DELETE FROM public.{table} x USING public.trials t WHERE x.trial_id = t.trial_id AND t.study_id = :study")  # noqa: S608
    for table in _OF_TRIALS
] + [sa.text(f"DELETE FROM public.{table} WHERE study_id = :study") for table in _OF_STUDY]  # noqa: S608

# Stock Optuna takes this lock too, before it numbers a trial of the study.
_LOCK_STUDY_TO_DELETE = sa.text("SELECT study_id FROM public.studies WHERE study_id = :study FOR UPDATE")

_STUDIES = sa.text("""
    SELECT s.study_id, s.study_name,
        (SELECT array_agg(direction::text ORDER BY objective) FROM public.study_directions d
         WHERE d.study_id = s.study_id) AS directions
    FROM public.studies s ORDER BY s.study_id
""")

_STUDY_HELD = "WITH study AS (SELECT study_id FROM public.studies WHERE study_id = :study FOR KEY SHARE)"
_SET_STUDY_ATTRIBUTE = {kind: rows.set_attribute(_STUDY_HELD, "study", kind) for kind in ("user", "system")}

_STATE = sa.text("SELECT number, state::text AS state FROM public.trials WHERE trial_id = :trial")

_BEST = """
    SELECT t.trial_id FROM public.trials t JOIN public.trial_values v ON v.trial_id = t.trial_id AND v.objective = 0
    WHERE t.study_id = :study AND t.state = 'COMPLETE'
    ORDER BY CASE v.value_type WHEN 'INF_NEG' THEN '-Infinity' WHEN 'INF_POS' THEN 'Infinity' ELSE v.value END {},
        t.number LIMIT 1
"""
_BEST_OF = {
    StudyDirection.MAXIMIZE: sa.text(_BEST.format("DESC")),
    StudyDirection.MINIMIZE: sa.text(_BEST.format("ASC")),
}

_COUNT = sa.text("""
    SELECT count(*) FROM public.trials WHERE study_id = :study
      AND (CAST(:states AS text[]) IS NULL OR state::text = ANY(CAST(:states AS text[])))
""")


class PostgresStorage(BaseStorage):
    """A stock Optuna database behind one engine; safe to share between threads.

    Differs from Optuna's own `RDBStorage` in that it joins the thread's transaction, reads what has changed in a
    statement or two, and never leaves part of a trial behind. The tables must be there: `schema.upgrade` makes them.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._archives: dict[int, Archive] = {}
        self._guard = threading.Lock()

    def __getstate__(self) -> dict[str, str]:
        """For another process: the address, password and all, as Optuna's own storage does it."""
        return {"url": self.engine.url.render_as_string(hide_password=False)}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__init__(connect(state["url"]))  # type: ignore[misc]  # as if made there

    # Studies

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        name = f"no-name-{uuid.uuid4()}" if study_name is None else study_name
        with alone(self.engine) as conn:
            study_id: int | None = conn.execute(
                _INSERT_STUDY, {"name": name, "directions": [direction.name for direction in directions]}
            ).scalar()
        if study_id is None:
            raise DuplicatedStudyError(f"a study named {name!r} exists already")
        return study_id

    def delete_study(self, study_id: int) -> None:
        with transaction(self.engine) as conn:
            found = conn.execute(_LOCK_STUDY_TO_DELETE, {"study": study_id}).one_or_none() is not None
            if found:
                for statement in _DELETE_STUDY:
                    conn.execute(statement, {"study": study_id})
        self._archives.pop(study_id, None)
        if not found:
            _no_study(study_id)

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        self._set_study_attr("user", study_id, key, value)

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        self._set_study_attr("system", study_id, key, value)

    def get_study_id_from_name(self, study_name: str) -> int:
        study_id: int | None = self._one(
            "SELECT study_id FROM public.studies WHERE study_name = :name", name=study_name
        )
        if study_id is None:
            raise KeyError(f"there is no study named {study_name!r}")
        return study_id

    def get_study_name_from_id(self, study_id: int) -> str:
        name: str | None = self._one("SELECT study_name FROM public.studies WHERE study_id = :study", study=study_id)
        return _no_study(study_id) if name is None else name

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        names: list[str] | None = self._one(
            "SELECT array_agg(direction::text ORDER BY objective) FROM public.study_directions WHERE study_id = :study",
            study=study_id,
        )
        return _no_study(study_id) if names is None else [StudyDirection[name] for name in names]

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        return self._study_attrs("user", study_id)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return self._study_attrs("system", study_id)

    def get_all_studies(self) -> list[FrozenStudy]:
        with transaction(self.engine) as conn:
            studies = conn.execute(_STUDIES).all()
            attrs: dict[str, dict[int, dict[str, Any]]] = {"user": {}, "system": {}}
            for kind, found in attrs.items():
                for study_id, key, text in conn.execute(
                    sa.text(f"SELECT study_id, key, value_json FROM public.study_{kind}_attributes")  # noqa: S608
                ):
                    found.setdefault(study_id, {})[key] = json.loads(text)
        return [
            FrozenStudy(
                study_name=row.study_name,
                direction=None,
                directions=[StudyDirection[name] for name in row.directions or ()],
                user_attrs=attrs["user"].get(row.study_id, {}),
                system_attrs=attrs["system"].get(row.study_id, {}),
                study_id=row.study_id,
            )
            for row in studies
        ]

    # Trials

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        template = template_trial
        if template is None:
            with alone(self.engine) as conn:
                return rows.insert_trial(conn, study_id, TrialState.RUNNING)[0]
        params = {
            name: (template.distributions[name].to_internal_repr(value), template.distributions[name])
            for name, value in template.params.items()
        }
        if params:
            with alone(self.engine) as conn:
                older = rows.distributions(conn, study_id, list(params))
            for name, text in older.items():
                check_distribution_compatibility(json_to_distribution(text), params[name][1])
        with alone(self.engine) as conn:
            trial_id, _ = rows.insert_trial(
                conn,
                study_id,
                template.state,
                params,
                template.system_attrs,
                user_attrs=template.user_attrs,
                values=template.values,
                reports=template.intermediate_values,
                began=template.datetime_start,
                ended=template.datetime_complete,
            )
        return trial_id

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        fitting: list[str] = []
        while True:
            with alone(self.engine) as conn:
                done = rows.set_param(conn, trial_id, param_name, (param_value_internal, distribution), fitting)
            if done is None:
                self._refuse(trial_id)
            written, older = done
            if written or older is None:
                return
            check_distribution_compatibility(json_to_distribution(older), distribution)
            fitting.append(older)

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:
        trial_id: int | None = self._one(
            "SELECT trial_id FROM public.trials WHERE study_id = :study AND number = :number",
            study=study_id,
            number=trial_number,
        )
        if trial_id is None:
            raise KeyError(f"there is no trial {trial_number} in study {study_id}")
        return trial_id

    def get_trial_number_from_id(self, trial_id: int) -> int:
        number: int | None = self._one("SELECT number FROM public.trials WHERE trial_id = :trial", trial=trial_id)
        return _no_trial(trial_id) if number is None else number

    def get_trial_param(self, trial_id: int, param_name: str) -> float:
        value: float | None = self._one(
            "SELECT param_value FROM public.trial_params WHERE trial_id = :trial AND param_name = :name",
            trial=trial_id,
            name=param_name,
        )
        if value is None:
            raise KeyError(f"trial {trial_id} has no parameter {param_name!r}")
        return value

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        with alone(self.engine) as conn:
            if state.is_finished():
                done = rows.finish_trial(conn, trial_id, state, values)
            else:
                done = rows.move_trial(conn, trial_id, state)
        if not done and (state.is_finished() or self._open(trial_id) != state):
            self._refuse(trial_id)
        return done

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        with alone(self.engine) as conn:
            done = rows.set_report(conn, trial_id, step, intermediate_value)
        if not done:
            self._refuse(trial_id)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._set_trial_attr("user", trial_id, key, value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._set_trial_attr("system", trial_id, key, value)

    def get_trial(self, trial_id: int) -> FrozenTrial:
        if not in_transaction(self.engine):
            for study_id, archive in list(self._archives.items()):
                if archive.has_finished(trial_id):
                    with self._existing(study_id):
                        return archive.trial(trial_id)
        found = read_whole(self.engine, [trial_id])
        return found[0].frozen() if found else _no_trial(trial_id)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """With `deepcopy` the trials are the caller's own; without, finished ones are shared with other callers."""
        if in_transaction(self.engine):
            found = read_study(self.engine, study_id, states)
            if not found:
                self.get_study_name_from_id(study_id)
            return [record.frozen() for record in found]
        with self._existing(study_id):
            return self._archive(study_id).trials(states, own=deepcopy)

    def get_n_trials(self, study_id: int, state: tuple[TrialState, ...] | TrialState | None = None) -> int:
        states = (state,) if isinstance(state, TrialState) else state
        names = None if states is None else [each.name for each in states]
        with alone(self.engine) as conn:
            count: int = conn.execute(_COUNT, {"study": study_id, "states": names}).scalar_one()
        if count == 0:
            self.get_study_name_from_id(study_id)
        return count

    def get_best_trial(self, study_id: int) -> FrozenTrial:
        directions = self.get_study_directions(study_id)
        if len(directions) > 1:
            raise RuntimeError("Best trial can be obtained only for single-objective optimization.")
        with alone(self.engine) as conn:
            trial_id = conn.execute(_BEST_OF[directions[0]], {"study": study_id}).scalar()
        if trial_id is None:
            raise ValueError("No trials are completed yet.")
        return self.get_trial(trial_id)

    # Parts

    def _archive(self, study_id: int) -> Archive:
        with self._guard:
            return self._archives.setdefault(study_id, Archive(self.engine, study_id))

    @contextlib.contextmanager
    def _existing(self, study_id: int) -> Iterator[None]:
        try:
            yield
        except NotFound:
            self._archives.pop(study_id, None)
            _no_study(study_id)

    def _one(self, statement: str, **values: Any) -> Any:
        with alone(self.engine) as conn:
            return conn.execute(sa.text(statement), values).scalar()

    def _set_trial_attr(self, kind: Literal["user", "system"], trial_id: int, key: str, value: Any) -> None:
        with alone(self.engine) as conn:
            done = rows.set_attr(conn, trial_id, kind, key, value)
        if not done:
            self._refuse(trial_id)

    def _open(self, trial_id: int) -> TrialState | None:
        """The state of a trial that has not finished, None of one that has."""
        with alone(self.engine) as conn:
            row = conn.execute(_STATE, {"trial": trial_id}).one_or_none()
        if row is None:
            _no_trial(trial_id)
        state = TrialState[row.state]
        return None if state.is_finished() else state

    def _refuse(self, trial_id: int) -> NoReturn:
        """Say why a trial could not be written to."""
        with alone(self.engine) as conn:
            row = conn.execute(_STATE, {"trial": trial_id}).one_or_none()
        if row is None:
            _no_trial(trial_id)
        raise UpdateFinishedTrialError(f"Trial#{row.number} has already finished and can not be updated.")

    def _set_study_attr(self, kind: str, study_id: int, key: str, value: Any) -> None:
        values = {"study": study_id, "key": key, "text": json.dumps(value)}
        with alone(self.engine) as conn:
            found = conn.execute(_SET_STUDY_ATTRIBUTE[kind], values).one_or_none()
        if found is None:
            _no_study(study_id)

    def _study_attrs(self, kind: str, study_id: int) -> dict[str, Any]:
        with alone(self.engine) as conn:
            attributes = conn.execute(
                sa.text(f"SELECT key, value_json FROM public.study_{kind}_attributes WHERE study_id = :study"),  # noqa: S608
                {"study": study_id},
            ).all()
        if not attributes:
            self.get_study_name_from_id(study_id)
        return {key: json.loads(text) for key, text in attributes}


def _no_study(study_id: int) -> NoReturn:
    raise KeyError(f"there is no study {study_id}")


def _no_trial(trial_id: int) -> NoReturn:
    raise KeyError(f"there is no trial {trial_id}")
