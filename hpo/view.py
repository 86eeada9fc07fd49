"""The window through which an Optuna sampler or pruner looks at a study: an Optuna storage with one trial more.

What is written to it is captured for the caller's transaction, not stored. Invariant: nothing reaches PostgreSQL, and
no trial but the pending one can be written to.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState

from hpo.snapshot import Snapshot


class View(BaseStorage):
    """What a sampler or pruner sees of a study: some trials of its history, and the pending trial.

    Attributes written to the pending trial or to the study are kept in `trial_attributes` and `study_attributes`; any
    other write raises `RuntimeError`.
    """

    def __init__(self, snapshot: Snapshot, trials: Iterable[FrozenTrial], pending: FrozenTrial) -> None:
        self._snapshot = snapshot
        others = (trial for trial in trials if trial.number != pending.number)
        self._trials = sorted([*others, pending], key=lambda trial: trial.number)
        self._by_id = {trial._trial_id: trial for trial in self._trials}
        self._pending = pending
        self.trial_attributes: dict[str, Any] = {}
        self.study_attributes: dict[str, Any] = {}

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        return [trial for trial in self._trials if states is None or trial.state in states]

    def get_trial(self, trial_id: int) -> FrozenTrial:
        return self._by_id[trial_id]

    def get_study_id_from_name(self, study_name: str) -> int:
        return 0

    def get_study_name_from_id(self, study_id: int) -> str:
        return self._snapshot.name

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        return [self._snapshot.direction]

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        return {}

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return {**self._snapshot.attributes, **self.study_attributes}

    def get_all_studies(self) -> list[FrozenStudy]:
        return [FrozenStudy(self._snapshot.name, self._snapshot.direction, {}, self.get_study_system_attrs(0), 0)]

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        if trial_id != self._pending._trial_id:
            raise RuntimeError("a sampler or pruner wrote to a trial that is not its own")
        self.trial_attributes[key] = value

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        self.study_attributes[key] = value

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("this is a view of a study: samplers and pruners only read it")

    create_new_study = _refuse
    delete_study = _refuse
    set_study_user_attr = _refuse
    create_new_trial = _refuse
    set_trial_param = _refuse
    set_trial_state_values = _refuse
    set_trial_intermediate_value = _refuse
    set_trial_user_attr = _refuse
