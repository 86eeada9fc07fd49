"""What comes back from a worker: reports, the outcome, or the trial itself unfinished.

A message is heard only with the live token of the lease and from the bearer that claimed it; any other changes
nothing. Each is one call of PostgreSQL that writes Optuna's rows, ours, the counters and, where it is the last, the
study's end in one transaction (`hpo/functions/tell.sql` and `report.sql`); what it was is kept in short, so that the
same message again gets the same answer. A report with values asks the pruner first, which reads once.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, NoReturn

from hpo import database, pruners
from hpo.desk import HISTORY_FORMAT, Desk, check_format, log, one_fault, storable
from hpo.errors import DatabaseUnavailable, LeaseLost, NotFound, Told
from hpo.protocol import (
    ReleaseRequest,
    ReportReply,
    ReportRequest,
    TellReply,
    TellRequest,
    Verdict,
)
from hpo.tokens import Principal

REPORT = """
    SELECT whetstone.report(
        %(lease)s, %(token)s, %(bearer)s, %(term_s)s, %(checkpoint)s,
        %(epochs)s::bigint[], %(values)s::double precision[], %(texts)s::text[],
        %(keys)s::text[], %(marks)s::text[], %(study_keys)s::text[], %(study_marks)s::text[], %(format)s)
"""
TELL = """
    SELECT whetstone.tell(
        %(lease)s, %(token)s, %(bearer)s, %(digest)s, %(outcome)s, %(value)s,
        %(reason)s, %(traceback)s, %(checkpoint)s, %(tasks)s, %(bits)s, %(format)s)
"""
GIVE_BACK = """
    SELECT whetstone.give_back(%(lease)s, %(token)s, %(bearer)s, %(digest)s, %(how)s, %(why)s, %(checkpoint)s,
                               %(format)s)
"""
OF_LEASE = """
    SELECT json_build_array(study_id, trial_id, trial_number) FROM whetstone.attempts WHERE attempt_id = %(lease)s
"""
_WHY = {
    "shutdown": "its worker was shut down",
    "stopped": "its worker was asked to stop",
    "drained": "its worker was drained",
    "stalled": "it made no step for too long",
    "broken": "its worker's device stopped working",
}


def report(desk: Desk, lease: int, request: ReportRequest, principal: Principal) -> ReportReply:
    """Take down progress, renew the lease, and say how to go on. A lease that is over is answered "lost"."""
    epochs = {item.epoch: item for item in request.reports}  # the later of two reports on an epoch speaks
    finite = {epoch: item.value for epoch, item in epochs.items() if item.value is not None}
    verdict, pruner = _judged(desk, lease, finite) if finite else (pruners.GOES_ON, "none")
    texts = [json.dumps({storable(name): value for name, value in item.metrics.items()}) for item in epochs.values()]
    said: dict[str, Any] = database.call(
        desk.engine,
        REPORT,
        {
            "lease": _known_id(lease),
            "format": HISTORY_FORMAT,
            "token": request.token,
            "bearer": principal.id,
            "term_s": desk.term_s,
            "checkpoint": request.checkpoint_epoch,
            "epochs": list(epochs),
            "values": [item.value for item in epochs.values()],
            "texts": texts,
            "keys": list(verdict.trial_system_attrs),
            "marks": [json.dumps(value) for value in verdict.trial_system_attrs.values()],
            "study_keys": list(verdict.study_system_attrs),
            "study_marks": [json.dumps(value) for value in verdict.study_system_attrs.values()],
        },
    )
    if "newer" in said:
        check_format(said["study"], said["newer"])
    if "lost" in said:
        return ReportReply(verdict=Verdict.LOST, reason=said["lost"])
    desk.leased(lease, said["study"], said["trial_id"], said["number"])
    if said["stop"]:
        return ReportReply(verdict=Verdict.STOP, reason=said["stop"])
    if epochs and said["state"] != "RUNNING":
        return ReportReply(verdict=Verdict.STOP, reason="another program has ended this trial through Optuna")
    if verdict.prune:
        return ReportReply(verdict=Verdict.PRUNE, reason=f"the {pruner} pruner judged it not worth more")
    return ReportReply(verdict=Verdict.GO_ON)


def _judged(desk: Desk, lease: int, values: dict[int, float]) -> tuple[pruners.Verdict, str]:
    """Ask the study's pruner about the trial with these values added, and name it. One that fails prunes nothing."""
    going_on = pruners.GOES_ON, "none"
    place = desk.place_of(lease)
    if place is None:  # another process leased it, or this one before it was started anew
        place = database.call(desk.engine, OF_LEASE, {"lease": _known_id(lease)})
        if place is None:
            return going_on
    study, trial, number = place
    try:
        known = desk.recall(study)
        return pruners.judge_now(known.spec, known.pruning, trial, number, values), known.spec.pruner.name
    except DatabaseUnavailable:
        raise
    except NotFound:
        return going_on  # deleted: the report itself finds out
    except Exception:
        log.exception("study %d: the pruner failed on trial %d; it goes on", study, number)
        return going_on


def tell(desk: Desk, lease: int, request: TellRequest, principal: Principal) -> TellReply:
    """Store the outcome of a trial, once. The same tell again gets the same answer.

    Raises:
        NotFound: there is no such lease.
        Invalid: a complete trial without a value, a failed one with one, or answers of a trial that has none.
        LeaseLost: the lease is over, or was never this bearer's. Nothing was changed.
        NewerFormat: a newer Whetstone has written the study's history. Nothing was changed.
        Told: another outcome was told before, or another program ended the trial. Nothing was changed.
    """
    if request.outcome == "complete" and request.value is None:
        raise one_fault("value", "is missing: a complete trial has one", "the tell")
    if request.outcome == "failed" and request.value is not None:
        raise one_fault("value", "a failed trial has none", "the tell")
    if request.answers is not None and request.outcome not in ("complete", "pruned"):
        raise one_fault("answers", "only a complete or a pruned trial has them", "the tell")
    said: dict[str, Any] = {
        "tell": request.outcome,
        "value": request.value,
        "reason": request.reason,
        "traceback": request.traceback,
    }
    if request.answers is not None:
        said["answers"] = [request.answers.tasks, request.answers.bits.hex()]
    answer: dict[str, Any] = database.call(
        desk.engine,
        TELL,
        {
            "lease": _known_id(lease),
            "format": HISTORY_FORMAT,
            "token": request.token,
            "bearer": principal.id,
            "digest": _digest(said),
            "outcome": request.outcome,
            "value": request.value,
            "reason": storable(request.reason),
            "traceback": storable(request.traceback),
            "checkpoint": request.checkpoint_epoch,
            "tasks": None if request.answers is None else request.answers.tasks,
            "bits": None if request.answers is None else request.answers.bits,
        },
    )
    reply = _reply(lease, answer)
    desk.foresee(reply.study)
    return reply


def release(desk: Desk, lease: int, request: ReleaseRequest, principal: Principal) -> TellReply:
    """Take a trial back unfinished: it is queued again, before all others; or cancelled, if that was asked for.

    "stalled" and "broken" count as a death of its worker, and the last one a trial may have fails it. The same release
    again gets the same answer.

    Raises:
        NotFound: there is no such lease.
        LeaseLost: the lease is over, or was never this bearer's. Nothing was changed.
        NewerFormat: a newer Whetstone has written the study's history. Nothing was changed.
        Told: the trial was told an outcome before. Nothing was changed.
    """
    answer: dict[str, Any] = database.call(
        desk.engine,
        GIVE_BACK,
        {
            "lease": _known_id(lease),
            "format": HISTORY_FORMAT,
            "token": request.token,
            "bearer": principal.id,
            "digest": _digest({"release": request.reason}),
            "how": {"stalled": "stalled", "broken": "lost"}.get(request.reason, "released"),
            "why": _WHY[request.reason],
            "checkpoint": request.checkpoint_epoch,
        },
    )
    return _reply(lease, answer)


def _reply(lease: int, answer: dict[str, Any]) -> TellReply:
    if "reply" not in answer:
        _refuse(lease, answer)
    return TellReply.model_validate(answer["reply"])


def _refuse(lease: int, answer: dict[str, Any]) -> NoReturn:
    if "newer" in answer:
        check_format(answer["study"], answer["newer"])
    if "missing" in answer:
        raise NotFound(f"there is no lease {lease}")
    if "lost" in answer:
        raise LeaseLost(answer["lost"])
    if "ended" in answer:
        raise Told("another program has ended this trial through Optuna: its outcome stands")
    raise Told(f"the trial was told {answer['told']} before, with other words: that stands")


def _known_id(lease: int) -> int:
    """An id that PostgreSQL can look for: beyond 64 bits there is no lease."""
    return lease if -1 <= lease < 2**63 else -1


def _digest(said: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
