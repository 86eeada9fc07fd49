"""Optuna's storage over its own stock tables, by statements of ours that join the thread's open transaction.

Invariant: every call is part of the transaction this thread has open on the engine (`database.transaction`), or one of
its own: so Optuna's rows, ours and the lease commit together. Nothing is cached: what is read is what is stored. The
statements for whole trials, which the hot paths call directly, stand in `hpo/rows.py`.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Container, Sequence
from typing import Any, NoReturn

import sqlalchemy as sa
from optuna.distributions import (
    BaseDistribution,
    check_distribution_compatibility,
    distribution_to_json,
    json_to_distribution,
)
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection, Engine

from hpo.database import connect, transaction
from hpo.rows import (
    finish_trial,
    insert_trial,
    move_trial,
    read_trials,
    read_trials_by_id,
    set_reports,
    set_system_attrs,
)

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

# A trial's row is held while a part of it is written: no tell slips in between the look at its state and the write.
_LOCK_TRIAL = sa.text("""
    SELECT trial_id, study_id, number, state::text AS state FROM public.trials WHERE trial_id = :trial FOR NO KEY UPDATE
""")

_A_DISTRIBUTION = sa.text("""
    SELECT p.distribution_json FROM public.trial_params p JOIN public.trials t ON t.trial_id = p.trial_id
    WHERE t.study_id = :study AND p.param_name = :name LIMIT 1
""")
_SET_PARAM = sa.text("""
    INSERT INTO public.trial_params (trial_id, param_name, param_value, distribution_json)
    VALUES (:trial, :name, :value, :distribution)
    ON CONFLICT (trial_id, param_name)
    DO UPDATE SET param_value = excluded.param_value, distribution_json = excluded.distribution_json
""")

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

    Differs from Optuna's own `RDBStorage` in that it joins the thread's transaction, reads many trials in six
    statements, and never leaves part of a trial behind. The tables must be there: `database.upgrade` makes them.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __getstate__(self) -> dict[str, str]:
        """For another process: the address, password and all, as Optuna's own storage does it."""
        return {"url": self.engine.url.render_as_string(hide_password=False)}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.engine = connect(state["url"])

    # Studies

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        name = f"no-name-{uuid.uuid4()}" if study_name is None else study_name
        with transaction(self.engine) as conn:
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
        with transaction(self.engine) as conn:
            if template_trial is None:
                return insert_trial(conn, study_id, TrialState.RUNNING)[0]
            template = template_trial
            params = {
                name: (template.distributions[name].to_internal_repr(value), template.distributions[name])
                for name, value in template.params.items()
            }
            for name, (_, distribution) in params.items():
                self._check_compatible(conn, study_id, name, distribution)
            trial_id, _ = insert_trial(
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
        with transaction(self.engine) as conn:
            study_id = self._updatable(conn, trial_id).study_id
            self._check_compatible(conn, study_id, param_name, distribution)
            text = distribution_to_json(distribution)
            conn.execute(
                _SET_PARAM,
                {"trial": trial_id, "name": param_name, "value": param_value_internal, "distribution": text},
            )

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
        with transaction(self.engine) as conn:
            self._updatable(conn, trial_id)
            if state.is_finished():
                return finish_trial(conn, trial_id, state, values)
            return move_trial(conn, trial_id, state)

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        with transaction(self.engine) as conn:
            self._updatable(conn, trial_id)
            set_reports(conn, trial_id, {step: intermediate_value})

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        with transaction(self.engine) as conn:
            self._updatable(conn, trial_id)
            conn.execute(_upsert("trial", "user"), {"id": trial_id, "key": key, "text": json.dumps(value)})

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        with transaction(self.engine) as conn:
            self._updatable(conn, trial_id)
            set_system_attrs(conn, trial_id, {key: value})

    def get_trial(self, trial_id: int) -> FrozenTrial:
        with transaction(self.engine) as conn:
            found = read_trials_by_id(conn, [trial_id])
        return found[0] if found else _no_trial(trial_id)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """Every call reads afresh, so the list is the caller's own whatever `deepcopy` says."""
        with transaction(self.engine) as conn:
            trials = read_trials(conn, study_id, states=_listed(states))
        if not trials:
            self.get_study_name_from_id(study_id)
        return trials

    def get_n_trials(self, study_id: int, state: tuple[TrialState, ...] | TrialState | None = None) -> int:
        states = (state,) if isinstance(state, TrialState) else state
        names = None if states is None else [each.name for each in states]
        with transaction(self.engine) as conn:
            count: int = conn.execute(_COUNT, {"study": study_id, "states": names}).scalar_one()
        if count == 0:
            self.get_study_name_from_id(study_id)
        return count

    def get_best_trial(self, study_id: int) -> FrozenTrial:
        directions = self.get_study_directions(study_id)
        if len(directions) > 1:
            raise RuntimeError("Best trial can be obtained only for single-objective optimization.")
        with transaction(self.engine) as conn:
            trial_id = conn.execute(_BEST_OF[directions[0]], {"study": study_id}).scalar()
        if trial_id is None:
            raise ValueError("No trials are completed yet.")
        return self.get_trial(trial_id)

    # Parts

    def _one(self, statement: str, **values: Any) -> Any:
        with transaction(self.engine) as conn:
            return conn.execute(sa.text(statement), values).scalar()

    def _updatable(self, conn: Connection, trial_id: int) -> sa.Row[Any]:
        row = conn.execute(_LOCK_TRIAL, {"trial": trial_id}).one_or_none()
        if row is None:
            _no_trial(trial_id)
        if TrialState[row.state].is_finished():
            raise UpdateFinishedTrialError(f"Trial#{row.number} has already finished and can not be updated.")
        return row

    def _check_compatible(self, conn: Connection, study_id: int, name: str, distribution: BaseDistribution) -> None:
        text = conn.execute(_A_DISTRIBUTION, {"study": study_id, "name": name}).scalar()
        if text is not None:
            check_distribution_compatibility(json_to_distribution(text), distribution)

    def _set_study_attr(self, kind: str, study_id: int, key: str, value: Any) -> None:
        text = json.dumps(value)
        with transaction(self.engine) as conn:
            found = conn.execute(
                sa.text("SELECT 1 FROM public.studies WHERE study_id = :study FOR KEY SHARE"), {"study": study_id}
            ).scalar()
            if found is not None:
                conn.execute(_upsert("study", kind), {"id": study_id, "key": key, "text": text})
        if found is None:
            _no_study(study_id)

    def _study_attrs(self, kind: str, study_id: int) -> dict[str, Any]:
        with transaction(self.engine) as conn:
            rows = conn.execute(
                sa.text(f"SELECT key, value_json FROM public.study_{kind}_attributes WHERE study_id = :study"),  # noqa: S608
                {"study": study_id},
            ).all()
        if not rows:
            self.get_study_name_from_id(study_id)
        return {key: json.loads(text) for key, text in rows}


def _upsert(of: str, kind: str) -> sa.TextClause:
    """Set one attribute of a study or a trial."""
    return sa.text(f"""
        INSERT INTO public.{of}_{kind}_attributes ({of}_id, key, value_json) VALUES (:id, :key, :text)
        ON CONFLICT ({of}_id, key) DO UPDATE SET value_json = excluded.value_json
    """)  # noqa: S608


def _listed(states: Container[TrialState] | None) -> list[TrialState] | None:
    return None if states is None else [state for state in TrialState if state in states]


def _no_study(study_id: int) -> NoReturn:
    raise KeyError(f"there is no study {study_id}")


def _no_trial(trial_id: int) -> NoReturn:
    raise KeyError(f"there is no trial {trial_id}")
