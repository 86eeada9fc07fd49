"""A notebook's way to Whetstone: suggestions for any objective of one's own, in five lines.

    experiment = Experiment("oven", {"minutes": {"type": "float", "low": 5, "high": 60}})
    for _ in range(20):
        job = experiment.suggest()
        experiment.update(job, taste(job["minutes"]))
    print(experiment.best())

The verbs are those of Whetlab's client of 2014. An experiment is a study of the server's, of the workload "external".
Promise: a suggestion in hand is kept alive by a thread for as long as this process lives, so it is given to nobody
else; if the process dies, the server hands the same point out again; and a value that was measured is never lost, even
if its suggestion was taken back meanwhile. Needs neither Optuna nor SQLAlchemy.
"""

from __future__ import annotations

import logging
import math
import os
import platform
import re
import uuid
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

from hpo.heartbeat import Heart, Held
from hpo.rest import ApiError, Client, ServerUnreachable, as_sent, new_key

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ApiError", "Experiment", "Result", "ServerUnreachable"]

log = logging.getLogger("whetstone.client")

DEFAULT_URL = "http://127.0.0.1:8000"
PATIENCE_S = 120.0
"""How long a call is repeated while the server is away."""
OPENING_S = 10.0
"""The same for the first ones: an address that is wrong is to be known soon."""


class Result(dict[str, Any]):
    """A point by parameter name; a vector is a dictionary by label. It can be passed on as ``f(**result)``.

    `result_id` is the trial's number in the study, `value` its outcome: None while it is pending, NaN where the point
    turned out infeasible or failed.
    """

    def __init__(self, params: Mapping[str, Any], result_id: int, value: float | None = None) -> None:
        super().__init__(params)
        self.result_id = result_id
        self.value = value

    def __repr__(self) -> str:
        return f"Result({dict(self)}, result_id={self.result_id}, value={self.value})"


class Experiment:
    """One study, as whoever evaluates its objective sees it. Threads may share it; a ``with`` closes it.

    Args:
        name: of the study. One of that name is resumed, whoever made it.
        space: parameters by name, each as in a study's document without its name (``{"type": "float", "low": 1e-4,
            "high": 0.1, "log": True}``; integer, categorical with ``choices``, vectors with ``labels``), or the
            document's list. None resumes only.
        direction: "maximize" (by default) or "minimize"; one that is resumed must agree, if this is given.
        description: for people.
        sampler: a name, or an object with its options.
        budget: ``{"trials": 100}`` and the like; by default there is none.
        seed: of the study.
        resume: whether a study of that name may be resumed.
        url: of the server, by default WHETSTONE_URL or http://127.0.0.1:8000.
        token: by default WHETSTONE_TOKEN. Launching and cancelling need an admin's, the rest a worker's.
        worker: the name under which this process shows, by default made of the host's.

    Raises:
        ValueError: the study is not "external", has another space or direction, or is not there and `space` is None.
        ApiError: the server refused; its message names every fault.
        ServerUnreachable: no server answers.
    """

    def __init__(
        self,
        name: str,
        space: Mapping[str, Mapping[str, Any]] | Sequence[Mapping[str, Any]] | None = None,
        *,
        direction: Literal["maximize", "minimize"] | None = None,
        description: str = "",
        sampler: str | Mapping[str, Any] = "auto",
        budget: Mapping[str, Any] | None = None,
        seed: int | None = None,
        resume: bool = True,
        url: str | None = None,
        token: str | None = None,
        worker: str | None = None,
    ) -> None:
        self.name = name
        self._worker = worker or _worker_name()
        where = url or os.environ.get("WHETSTONE_URL") or DEFAULT_URL
        self._client = Client(where, token or os.environ.get("WHETSTONE_TOKEN"), patience_s=PATIENCE_S)
        self._heart = Heart(Client(where, token or os.environ.get("WHETSTONE_TOKEN"), patience_s=0.0))
        self._end = weakref.finalize(self, Heart.stop, self._heart)
        document: dict[str, Any] = {
            "name": name,
            "workload": "external",
            "direction": direction or "maximize",
            "description": description,
            "sampler": sampler if isinstance(sampler, str) else dict(sampler),
            "space": _listed(space),
        }
        if budget is not None:
            document["budget"] = dict(budget)
        if seed is not None:
            document["seed"] = seed
        try:
            with Client(where, token or os.environ.get("WHETSTONE_TOKEN"), patience_s=OPENING_S) as opening:
                study = self._open(opening, document, resume)
            if direction not in (None, study["direction"]):
                raise ValueError(f"the study {name!r} is there and is to {study['direction']}: choose another name")
        except BaseException:
            self.close()
            raise
        self.study = int(study["study"])
        self.direction: str = study["direction"]

    def _open(self, client: Client, document: dict[str, Any], resume: bool) -> dict[str, Any]:
        if document["space"]:
            try:
                made: dict[str, Any] = client.post("/api/v1/studies", json=document)
                return made
            except ApiError as error:
                if error.status != 409 or not resume:
                    raise
        found = next(
            (one for one in client.get("/api/v1/studies", params={"name": self.name})["items"]
             if one["name"] == self.name),
            None,
        )  # fmt: skip
        if found is None:
            raise ValueError(f"there is no study named {self.name!r}: give its space to launch it")
        if found["workload"] != "external":
            raise ValueError(
                f"the study {self.name!r} is trained by workers ({found['workload']}): choose another name"
            )
        differs = _differs(document["space"], found["spec"]["space"])
        if differs:
            raise ValueError(f"the study {self.name!r} is there with another space ({differs}): choose another name")
        return dict(found)

    def suggest(self) -> Result:
        """The next point to evaluate. It is this process's until it is updated or cancelled.

        Raises:
            ApiError: the study is paused, stopped, or its budget is spent; the message says which.
        """
        path = f"/api/v1/studies/{self.study}/ask"
        lease = self._client.post(path, json={"worker": self._worker}, key=new_key())
        self._heart.hold(lease["trial"], Held(lease["lease"], lease["token"], lease["heartbeat_s"]))
        return Result(lease["params"], lease["trial"])

    def update(self, point: Mapping[str, Any], value: float | None, reason: str = "") -> Result:
        """Tell what a point is worth: a suggested one, or one of one's own, which is recorded.

        A value of None, NaN or an infinity means that the point is infeasible: it is never the best, and later
        suggestions stay away from it. Told again with another value, the later one counts.
        """
        result_id = self._id_of(point)
        if result_id is not None:
            return self.update_by_result_id(result_id, value, reason)
        return self._record(point, value, reason)

    def update_by_result_id(self, result_id: int, value: float | None, reason: str = "") -> Result:
        """The same by number: of a suggestion in this process's hands, or of a point that has an outcome already."""
        held = self._heart.held(result_id)
        finite = _finite(value)
        if held is None:
            return self._correct(result_id, finite)
        told: dict[str, Any] = {"token": held.token, "reason": reason, "value": finite}
        told["outcome"] = "infeasible" if finite is None else "complete"
        held.telling = True
        try:
            self._client.post(f"/api/v1/leases/{held.lease}/tell", json=told, key=new_key())
            self._heart.let_go(result_id)
        except ApiError as error:
            if error.code != "lost":
                raise
            self._heart.let_go(result_id)
            return self._rescue(result_id, value, reason)
        finally:
            held.telling = False
        return self._result(result_id)

    def step(self, point: Mapping[str, Any], step: int, value: float) -> bool:
        """Report an intermediate value of a suggested point; False where it should be given up (then `cancel` it, or
        `update` it with what it has reached).
        """
        result_id = self._id_of(point)
        held = None if result_id is None else self._heart.held(result_id)
        if held is None:
            raise ValueError("this point is not in the hands of this process: `suggest` gives one")
        body = {"token": held.token, "reports": [{"epoch": step, "value": _finite(value)}]}
        reply = self._client.post(f"/api/v1/leases/{held.lease}/report", json=body, key=new_key())
        return bool(reply["verdict"] == "go_on")

    def cancel(self, point: Mapping[str, Any]) -> None:
        """Give a pending point up: nothing is learnt from it, and it counts for nothing."""
        result_id = self._id_of(point)
        if result_id is None:
            raise ValueError("this point is not pending: `pending` lists those that are")
        self._cancel(result_id)

    def _cancel(self, result_id: int) -> None:
        held = self._heart.let_go(result_id)
        self._client.post(f"/api/v1/studies/{self.study}/trials/{result_id}/cancel", key=new_key())
        if held is not None and not held.lost:
            body = {"token": held.token, "reason": "stopped"}
            self._client.post(f"/api/v1/leases/{held.lease}/release", json=body, key=new_key())

    def pending(self) -> list[Result]:
        """The points that have no outcome yet, of this process and of all others, in order."""
        waiting = [
            one
            for state in ("queued", "leased")
            for one in self._client.pages(f"/api/v1/studies/{self.study}/trials", params={"state": state})
        ]
        return [_as_result(one) for one in sorted(waiting, key=lambda one: int(one["trial"]))]

    def clear_pending(self) -> None:
        """Give up every point that has no outcome yet, of whomever."""
        for result in self.pending():
            try:
                self._cancel(result.result_id)
            except ApiError as error:
                if error.status != 409:  # somebody has told its outcome meanwhile
                    raise

    def best(self) -> Result | None:
        """The best point so far with its value, or None."""
        found = self._client.get(f"/api/v1/studies/{self.study}/best", params={"top": 1})
        items = found["items"] if isinstance(found, Mapping) else found
        return _as_result(items[0]) if items else None

    def get_all_results(self) -> tuple[list[Result], list[float | None]]:
        """Every point in order, and beside it the values: None while pending, NaN where infeasible or failed."""
        trials = self._client.pages(f"/api/v1/studies/{self.study}/trials")
        results = [_as_result(one) for one in trials if one["state"] != "cancelled"]
        return results, [result.value for result in results]

    def report(self) -> Figure:
        """Draw the progress: every outcome in order, and the best so far. A notebook shows the figure it returns."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("report draws with matplotlib: pip install 'whetstone[plots]'") from error
        results, values = self.get_all_results()
        told = [(one.result_id, value) for one, value in zip(results, values, strict=True) if value is not None]
        finite = [(number, value) for number, value in told if math.isfinite(value)]
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(self.name)
        axes.set_xlabel("trial")
        axes.set_ylabel("value")
        if finite:
            numbers, heights = zip(*finite, strict=True)
            axes.plot(numbers, heights, "o", color="#8a94a6", markersize=4, label="each trial")
            keep = max if self.direction == "maximize" else min
            so_far = [keep(heights[: place + 1]) for place in range(len(heights))]
            axes.step(numbers, so_far, where="post", color="#0b5fff", linewidth=2, label="best so far")
            floor = min(heights)
            bad = [number for number, value in told if not math.isfinite(value)]
            if bad:
                axes.plot(bad, [floor] * len(bad), "x", color="#c0392b", markersize=5, label="infeasible or failed")
            axes.legend(frameon=False)
        else:
            axes.text(0.5, 0.5, "no outcome yet", ha="center", va="center", transform=axes.transAxes)
        axes.spines[["top", "right"]].set_visible(False)
        return figure

    def close(self) -> None:
        """End the heartbeats. What is still in hand is given out again when its term is over."""
        self._end()
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Experiment({self.name!r}, study {getattr(self, 'study', '?')} at {self._client.url})"

    def _id_of(self, point: Mapping[str, Any]) -> int | None:
        """The number of a result, or of the pending point that has exactly these values."""
        if isinstance(point, Result):
            return point.result_id
        return next((one.result_id for one in self.pending() if dict(one) == dict(point)), None)

    def _result(self, result_id: int) -> Result:
        return _as_result(self._client.get(f"/api/v1/studies/{self.study}/trials/{result_id}"))

    def _record(self, point: Mapping[str, Any], value: float | None, reason: str) -> Result:
        finite = _finite(value)
        body: dict[str, Any] = {"params": dict(point), "value": finite, "reason": reason}
        body["outcome"] = "infeasible" if finite is None else "complete"
        made = self._client.post(f"/api/v1/studies/{self.study}/trials", json=body, key=new_key())
        return _as_result(made)

    def _correct(self, result_id: int, value: float | None) -> Result:
        """Replace the outcome of a point that has one. What somebody else is evaluating is refused."""
        body = {"outcome": "infeasible" if value is None else "complete", "value": value}
        changed = self._client.patch(f"/api/v1/studies/{self.study}/trials/{result_id}", json=body)
        return _as_result(changed)

    def _rescue(self, result_id: int, value: float | None, reason: str) -> Result:
        """The suggestion was taken back, after this process was cut off for longer than its term: what was measured is
        recorded beside it, and the point is not evaluated once more if nobody has begun to.
        """
        trial = self._client.get(f"/api/v1/studies/{self.study}/trials/{result_id}")
        why = f"measured after trial {result_id} was taken back" + (f"; {reason}" if reason else "")
        result = self._record(trial["params"], value, why)
        if trial["state"] == "queued":
            self._client.post(f"/api/v1/studies/{self.study}/trials/{result_id}/cancel", key=new_key())
        log.warning("the suggestion %d had been taken back: its value is recorded as %d", result_id, result.result_id)
        return result


def _as_result(trial: Mapping[str, Any]) -> Result:
    """A trial as REST shows it."""
    value = trial["value"]
    if trial["state"] in ("infeasible", "failed"):
        value = math.nan
    elif trial["state"] in ("queued", "leased"):
        value = None
    return Result(trial["params"], int(trial["trial"]), value)


def _finite(value: float | None) -> float | None:
    try:
        return float(value) if value is not None and math.isfinite(value) else None
    except TypeError:
        raise TypeError(f"a value is a number, or None where the point is infeasible, not {value!r:.80}") from None


def _listed(space: Mapping[str, Mapping[str, Any]] | Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """A space as JSON has it: a tuple is a list there, and one that is resumed is compared with what is stored."""
    if space is None:
        return []
    if isinstance(space, Mapping):
        space = [{"name": name, **about} for name, about in space.items()]
    listed: list[dict[str, Any]] = as_sent(space)
    return listed


def _differs(wanted: Sequence[Mapping[str, Any]], there: Sequence[Mapping[str, Any]]) -> str:
    """Name the first thing that was asked for and is otherwise; "" where nothing is, or nothing was asked for."""
    if not wanted:
        return ""
    known = {one["name"]: one for one in there}
    for one in wanted:
        other = known.pop(str(one.get("name")), None)
        if other is None:
            return f"it has no {one.get('name')!r}"
        for key, value in one.items():
            if other.get(key, value) != value:
                return f"{key} of {one['name']!r} is {other[key]!r}"
    return f"it also has {next(iter(known))!r}" if known else ""


def _worker_name() -> str:
    host = re.sub(r"[^A-Za-z0-9._-]", "-", platform.node())[:80].lstrip("._-") or "notebook"
    return f"{host}-{os.getpid()}-{uuid.uuid4().hex[:4]}"
