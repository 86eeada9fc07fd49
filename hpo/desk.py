"""What the coordinator has at hand: its engine, its storage, its terms, and what it knows of each study.

Knowledge of a study (`Known`) is what never changes after its launch (spec, space, sampler, pruner) and its history in
memory. State, budget and concurrency do change, so they are read from PostgreSQL each time. `Known.sampling` is held
while a suggestion is made and stored: within one process no two suggestions of a study are made from the same history.
Nothing that a tell or a report does ever takes that lock.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import sqlalchemy as sa
from optuna.distributions import distribution_to_json

from hpo import statements
from hpo.database import call, transaction
from hpo.errors import Fault, Invalid, NewerFormat, NotFound
from hpo.history import History
from hpo.protocol import Workload
from hpo.pruning import Pruning
from hpo.sampling import SamplingProcess
from hpo.spec import StudySpec, cannot_sample, load
from hpo.storage import PostgresStorage
from hpo.suggester import Suggester

log = logging.getLogger("whetstone")

HISTORY_FORMAT = 1
"""How trials are written and read here. Raised when an older Whetstone would read or write them wrongly."""
KEPT_LEASES = 100_000
Place = tuple[int, int, int]
"""Of a lease: study, trial id, trial number."""

SPEC = sa.text("SELECT spec, format FROM whetstone.studies WHERE study_id = :study")
FORMAT = sa.text("SELECT format FROM whetstone.studies WHERE study_id = :study")
RECALL = "SELECT json_build_array(spec, format) FROM whetstone.studies WHERE study_id = %(study)s"


READ_AHEAD = 8
"""So many running studies are read when a server starts."""
# The newest of those that run.
RUNNING = """
    SELECT coalesce(json_agg(study_id), '[]') FROM (
        SELECT study_id FROM whetstone.studies WHERE state = 'running' AND format <= %(format)s
        ORDER BY study_id DESC LIMIT %(most)s
    ) AS newest
"""


@dataclass
class Known:
    """One study, as this process knows it."""

    study: int
    spec: StudySpec
    history: History
    suggester: Suggester
    pruning: Pruning
    sampling: threading.Lock = field(default_factory=threading.Lock)
    unusable: str = ""
    """Why this server cannot sample for the study although it could be launched once; empty where it can."""
    failures: int = 0
    """Failures of the sampler in a row; touched under `sampling` only."""

    @cached_property
    def spelled(self) -> dict[str, str]:
        """The space's distributions as Optuna stores them, by flat name."""
        return {name: distribution_to_json(one) for name, one in self.spec.space.distributions.items()}

    def trial_seed(self, number: int) -> int:
        """The seed of one trial: a function of the study's seed and the number, below 2^31."""
        digest = hashlib.blake2b(f"{self.spec.seed}/{number}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % 2**31


class Desk:
    """Shared by all calls of one coordinator; safe to use from many threads."""

    def __init__(
        self,
        engine: sa.Engine,
        workloads: Mapping[str, Workload],
        *,
        term_s: float,
        heartbeat_s: float,
        stall_s: float,
    ) -> None:
        self.engine = engine
        self.workloads = dict(workloads)
        self.term_s = term_s
        self.heartbeat_s = heartbeat_s
        self.stall_s = stall_s
        self.storage = PostgresStorage(engine)
        self.guess: Known | None = None
        """The study that was claimed from last."""
        self._sampling = SamplingProcess()
        self._known: dict[int, Known] = {}
        self._leases: OrderedDict[int, Place] = OrderedDict()
        self._guard = threading.Lock()

    def transaction(self) -> AbstractContextManager[sa.Connection]:
        return transaction(self.engine)

    def known(self, conn: sa.Connection, study: int) -> Known:
        """Return what is known of a study; another process may have deleted it, so its row is looked for each time.

        Raises:
            NotFound: there is no such study of ours.
            NewerFormat: a newer Whetstone has written its history.
        """
        found = self._known.get(study)
        stored = conn.execute(SPEC if found is None else FORMAT, {"study": study}).one_or_none()
        if stored is None:
            self.forget(study)
            raise missing(study)
        check_format(study, stored.format)
        return found or self._learn(study, stored.spec)

    def of_row(self, row: sa.Row[Any]) -> Known:
        """Return what is known of the study of a row of `statements.STUDY`, which was just read.

        Raises:
            NewerFormat: a newer Whetstone has written its history.
        """
        check_format(row.study_id, row.format)
        return self._known.get(row.study_id) or self._learn(row.study_id, row.spec)

    def recall(self, study: int) -> Known:
        """Return what is known of a study, without looking for its row where it is known already: for callers whose
        next statement finds out that it was deleted.

        Raises:
            NotFound: there is no such study of ours.
            NewerFormat: a newer Whetstone has written its history.
        """
        found = self._known.get(study)
        if found is not None:
            return found
        stored = call(self.engine, RECALL, {"study": study})
        if stored is None:
            raise missing(study)
        spec, format = stored
        check_format(study, format)
        return self._learn(study, spec)

    def _learn(self, study: int, stored: Any) -> Known:
        # It could be sampled where it was launched (a GP needs torch); it can be read, told and stopped here.
        try:
            spec = load(stored)
            faults = cannot_sample(spec)
        except Invalid as error:  # launched by a release that knows other samplers
            spec = load(stored | {"sampler": "random", "pruner": "none"})
            faults = list(error.faults)
        unusable = "; ".join(str(fault) for fault in faults)
        if unusable:
            log.error("study %d cannot be sampled on this server: %s", study, unusable)
        with self._guard:
            return self._known.setdefault(study, self.fresh(study, spec, unusable))

    def fresh(self, study: int, spec: StudySpec, unusable: str = "") -> Known:
        """Return knowledge of a study without remembering it: its launch may yet be rolled back."""
        history = History(self.engine, study)
        suggester = Suggester(spec, history, self.workloads.get(spec.workload), self._sampling)
        return Known(study, spec, history, suggester, Pruning(self.engine, study), unusable=unusable)

    def read_ahead(self) -> None:
        """Read the histories of the newest running studies, so that their first asks find them in memory.

        Raises:
            DatabaseUnavailable: PostgreSQL does not answer.
        """
        for study in call(self.engine, RUNNING, {"format": HISTORY_FORMAT, "most": READ_AHEAD}):
            try:
                known = self.recall(study)
                if not known.unusable:
                    known.suggester.warm()
            except (NotFound, NewerFormat) as error:
                log.info("study %d was not read ahead: %s", study, error)

    def foresee(self, study: int) -> None:
        """A study has learnt something: its next point may be prepared, if this process suggests for it."""
        known = self._known.get(study)
        if known is not None:
            known.suggester.foresee()

    def forget(self, study: int) -> None:
        """Drop what is known of a study that was deleted."""
        with self._guard:
            known = self._known.pop(study, None)
            if known is not None:
                known.suggester.close()
            if self.guess is not None and self.guess.study == study:
                self.guess = None

    def leased(self, lease: int, study: int, trial_id: int, number: int) -> None:
        """Remember whose lease it is: that never changes."""
        with self._guard:
            self._leases[lease] = (study, trial_id, number)
            while len(self._leases) > KEPT_LEASES:
                self._leases.popitem(last=False)

    def place_of(self, lease: int) -> Place | None:
        """Return study, trial id and trial number of a lease, if they are remembered."""
        return self._leases.get(lease)


def check_format(study: int, format: int) -> None:
    """Raise `NewerFormat` where a study's history has a format that is not known here."""
    if format > HISTORY_FORMAT:
        raise NewerFormat(f"study {study} cannot be read here: {too_new(format)}")


def too_new(format: int) -> str:
    """Say what a history of a newer format asks for."""
    return (
        f"its history has format {format}, and this server knows formats up to {HISTORY_FORMAT}; upgrade Whetstone "
        "on this server to the release that wrote it"
    )


def missing(study: int) -> NotFound:
    return NotFound(f"there is no study {study}")


def lock(conn: sa.Connection, study: int) -> sa.Row[Any]:
    """Lock a study's row, then read in a new statement what may have changed before the lock was had.

    Raises:
        NotFound: there is no such study of ours.
    """
    conn.execute(statements.LOCK_STUDY, {"study": study})
    row = conn.execute(statements.STUDY, {"study": study}).one_or_none()
    if row is None:
        raise missing(study)
    return row


def storable(text: str) -> str:
    """Return text as PostgreSQL can hold it: without NUL and lone surrogates, which a traceback may well contain."""
    return text.replace("\x00", "\ufffd").encode("utf-8", "replace").decode("utf-8")


def one_fault(at: str, fault: str, what: str = "the request") -> Invalid:
    return Invalid([Fault(at, fault)], what=what)
