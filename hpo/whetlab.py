"""Whetlab's verbs on this coordinator: experiments, settings, suggestions and results, as its clients call them.

Answers are the plain documents that the protocol has; bodies come in as parsed JSON and are believed in nothing.
Whatever is written takes the study's lock first, then the trial's. A trial that a worker holds is the worker's: its
outcome is not written here, and to delete it is to ask its worker to stop.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from optuna.trial import TrialState

from hpo import (
    corrections,
    events,
    experiment_form,
    experiments,
    pending,
    points,
    results,
    rows,
    statements,
    studies,
    trials,
    writing,
)
from hpo.desk import Desk, Known, lock
from hpo.errors import Conflict, Fault, Invalid, NotFound
from hpo.experiments import Experiment
from hpo.results import DESCRIPTION, Sent
from hpo.space import show

INT4 = 2**31 - 1
Listed = tuple[int, list[dict[str, Any]]]
"""How many there are, and those of one page."""


class Whetlab:
    """The protocol's calls; safe to use from many threads. Errors are those of `hpo.errors`."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    # Experiments

    def experiments(self, *, offset: int, limit: int, experiment: int | None = None) -> Listed:
        """Return experiments, the oldest first; with `experiment` only that one."""
        with self._desk.transaction() as conn:
            return experiments.listing(conn, study=experiment, offset=offset, limit=limit)

    def experiment(self, experiment: int) -> dict[str, Any]:
        found = self.experiments(offset=0, limit=1, experiment=experiment)[1]
        if not found:
            raise _missing(experiment)
        return found[0]

    def create_experiment(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Create an experiment. Raises `Invalid` with every fault, `NameTaken` where there is one of that name."""
        return self.experiment(experiments.create(self._desk, experiment_form.read(body)))

    def delete_experiment(self, experiment: int) -> None:
        """Delete an experiment with all its results. Raises `Conflict` while workers hold trials of it."""
        with _named(experiment):
            studies.delete(self._desk, experiment)

    def settings(self, experiment: int) -> list[dict[str, Any]]:
        with _named(experiment), self._desk.transaction() as conn:
            return [setting.document() for setting in experiments.of(self._desk.known(conn, experiment)).settings]

    def add_setting(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the setting that is declared so. Raises `Invalid` for any other: an experiment keeps its settings."""
        faults: list[Fault] = []
        experiment = _id(body.get("experiment"), "experiment", faults)
        wanted = experiment_form.read_setting(body, "", faults)
        if faults:
            raise Invalid(faults, "the setting")
        with _named(experiment), self._desk.transaction() as conn:
            known = self._desk.known(conn, experiment)
        return experiments.same_setting(known, wanted)

    # Results

    def suggest(self, experiment: int) -> dict[str, Any]:
        """Suggest a point; return it as a result without an outcome."""
        with _named(experiment):
            made = pending.suggest(self._desk, experiment)
        return self.result(made)

    def results(self, experiment: int, *, offset: int, limit: int | None) -> Listed:
        """Return results of an experiment, the oldest first; without a `limit` all of them."""
        with _named(experiment), self._desk.transaction() as conn:
            known = self._desk.known(conn, experiment)
            seen = experiments.of(known)
            count = results.count(conn, experiment)
            return count, results.listing(conn, known, seen, offset=offset, limit=count if limit is None else limit)

    def result(self, result: int) -> dict[str, Any]:
        with self._desk.transaction() as conn:
            row = results.find(conn, result)
            known = self._desk.known(conn, row.study_id)
            return results.view(row, known, experiments.of(known))

    def add_result(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Record a point of the client's own, with or without its outcome.

        Raises:
            Invalid: names every fault.
            NotFound: there is no such experiment.
        """
        faults: list[Fault] = []
        experiment = _id(body.get("experiment"), "experiment", faults)
        description = _description(body, faults)
        if faults:
            raise Invalid(faults, "the result")
        with _named(experiment), self._desk.transaction() as conn:
            known = self._desk.known(conn, experiment)
        seen = experiments.of(known)
        sent = results.read(seen, body, faults)
        if seen.hidden:
            faults.append(Fault("", f"this experiment has vectors of more than 24 values ({show(seen.hidden[0])})"))
        missing = [setting.name for setting in seen.settings[:-1] if setting not in sent.named]
        faults += [Fault("variables", f"{show(name)} is missing") for name in missing]
        if not faults:
            faults += seen.space.read(seen.space.nest(sent.flat), at="variables")[1]  # what is tied has one value
        if faults:
            raise Invalid(faults, "the result")
        with _named(experiment), self._desk.transaction() as conn:
            lock(conn, experiment)
            trial_id = self._store(conn, known, seen, sent)
            if description:
                rows.set_system_attrs(conn, trial_id, {DESCRIPTION: description})
            events.notify(conn, "trial", experiment)
        return self.result(trial_id)

    def _store(self, conn: sa.Connection, known: Known, seen: Experiment, sent: Sent) -> int:
        if sent.outcome is None:
            return pending.add(conn, known, sent.flat, {writing.ORIGIN: "recorded"})
        value = _value(seen, sent.outcome)
        state = "infeasible" if value is None else "complete"
        trial_id = writing.record(conn, known, sent.flat, state, value, "")
        studies.settle(conn, known)
        return trial_id

    def write_result(self, result: int, body: Mapping[str, Any]) -> dict[str, Any]:
        """Write a result's outcome, whether it has one or not. Its point stays what it is; a null changes nothing.

        Raises:
            NotFound: there is no such result.
            Invalid: names every fault; another point is one.
            Conflict: a worker holds the trial, or its point is not complete.
        """
        with self._desk.transaction() as conn:
            known = self._desk.known(conn, results.find(conn, result).study_id)
            row = self._held(conn, known, result)
            seen = experiments.of(known)
            faults: list[Fault] = []
            sent = results.read(seen, body, faults)
            description = _description(body, faults)
            values = results.shown(row, known, seen)
            if not faults and values is not None:
                changed = results.differ(seen, values, sent)
                faults += [Fault("variables", f"{show(name)}: {_OTHER_POINT}") for name in changed]
            if faults:
                raise Invalid(faults, "the result")
            if sent.outcome is not None:
                self._write(conn, known, row, _value(seen, sent.outcome), whole=values is not None)
            if description:
                rows.set_system_attrs(conn, result, {DESCRIPTION: description})
            events.notify(conn, "trial", known.study)
            return results.view(results.find(conn, result), known, seen)

    def _write(self, conn: sa.Connection, known: Known, row: Any, value: float | None, *, whole: bool) -> None:
        if not whole:
            raise Conflict("the point of this result is not complete: it has no outcome to be written yet")
        trial_id = row.trial_id
        if row.state not in ("queued", "leased"):
            corrections.overwrite(conn, known, trial_id, value, WRITTEN_AGAIN)
        else:
            if conn.execute(points.LIVE_ATTEMPT, {"trial_id": trial_id}).scalar() is not None:
                raise Conflict("a worker holds this trial, and its outcome is the worker's to tell")
            if row.state == "queued":
                rows.add_params(conn, trial_id, writing.internal(known, trials.flat_params(known, row)))
            stored = writing.worst_value(conn, known) if value is None else value
            marks = {writing.INFEASIBLE: 1.0 if value is None else 0.0}
            finished = rows.finish_trial(conn, trial_id, TrialState.COMPLETE, stored, marks)
            assert finished, "the trial is locked and was not finished"
            if row.state == "queued":
                corrections.note(conn, known.study, trial_id, "begun")
        studies.settle(conn, known)

    def delete_result(self, result: int) -> None:
        """Take a result out of every list, and out of what later suggestions learn from. Raises `NotFound`."""
        why = "deleted through Whetlab's protocol"
        with self._desk.transaction() as conn:
            known = self._desk.known(conn, results.find(conn, result).study_id)
            row = self._held(conn, known, result)
            if row.state not in ("queued", "leased"):
                corrections.take_back(conn, result, why)
            elif (lease := conn.execute(points.LIVE_ATTEMPT, {"trial_id": result}).scalar()) is not None:
                conn.execute(points.ASK_TO_STOP, {"lease": lease, "why": why})
            else:
                writing.cancel(conn, result, why)
            studies.settle(conn, known)
            events.notify(conn, "trial", known.study)
            events.notify(conn, "work", known.study)

    def variables(self, experiment: int | None = None, result: int | None = None) -> list[dict[str, Any]]:
        """Return the variables of one result, of one experiment, or of all."""
        if result is not None:
            found = [self.result(result)]
        else:
            listed = [experiment] if experiment is not None else self._all()
            found = [each for study in listed for each in self.results(study, offset=0, limit=None)[1]]
        return [variable for each in found for variable in each["variables"]]

    def _all(self) -> list[int]:
        return [each["id"] for each in self.experiments(offset=0, limit=INT4)[1]]

    def _held(self, conn: sa.Connection, known: Known, result: int) -> Any:
        """Lock study and trial; return the result as it is then."""
        lock(conn, known.study)
        conn.execute(statements.LOCK_TRIAL, {"trial_id": result})
        return results.find(conn, result)


@contextmanager
def _named(experiment: int) -> Iterator[None]:
    """Where its study is not found in the block, it is an experiment that there is not."""
    try:
        yield
    except NotFound:
        raise _missing(experiment) from None


def _missing(experiment: int) -> NotFound:
    return NotFound(f"there is no experiment {experiment}")


WRITTEN_AGAIN = "its outcome was written again through Whetlab's protocol"
_OTHER_POINT = "the point of a result cannot be changed: delete it, and add another"


def _value(seen: Experiment, outcome: float) -> float | None:
    """An outcome as the study has it, where smaller may be better; None where it is infeasible."""
    return None if outcome != outcome else seen.sign * outcome


def _id(value: object, at: str, faults: list[Fault]) -> int:
    if isinstance(value, str) and value.isdecimal() and value.isascii() and len(value) <= 10:
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= INT4:
        faults.append(Fault(at, "is missing" if value is None else f"must be an id, not {show(value)}"))
        return -1
    return value


def _description(body: Mapping[str, Any], faults: list[Fault]) -> str:
    return experiment_form.text(body, "description", faults, most=experiment_form.MAX_DESCRIPTION)
