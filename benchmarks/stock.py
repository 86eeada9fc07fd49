"""The other side of the comparison: stock Optuna as one would put it behind an API, its RDBStorage on PostgreSQL.

`python -m benchmarks.stock URL STUDY` serves ask, report and tell of one study: the routes, the messages and the
server of ours, with plain `study.ask`, `trial.report` and `study.tell` behind them. It is made as fast as that is:
the study and its running trials are kept in memory, the pool has the size of ours, nobody is asked for a token.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Callable

import optuna
import sqlalchemy as sa
import uvicorn
from fastapi import FastAPI
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage
from optuna.trial import Trial

from benchmarks import past
from benchmarks.place import Place, address
from hpo.protocol import AskRequest, Lease, ReportReply, ReportRequest, TellReply, TellRequest, Verdict

SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {"random": RandomSampler, "tpe": lambda seed: TPESampler(seed=seed)}


def storage(url: str) -> RDBStorage:
    """Stock Optuna's own storage, with as many connections as the coordinator takes."""
    return RDBStorage(url, engine_kwargs={"pool_size": 10, "max_overflow": 40})


def filled(place: Place, sampler: str, trials: int) -> tuple[str, sa.Engine]:
    """The name of a study with a past, and the database of its own that holds it: Optuna's tables and nothing else."""
    engine = place.database("stock", ours=False)
    name = f"{sampler}_{trials}"
    study = optuna.create_study(storage=storage(address(engine)), study_name=name, direction="maximize")
    past.fill(engine, study._study_id, trials, ours=False)
    return name, engine


def load(url: str, name: str) -> optuna.Study:
    """The study with its sampler, its trials in memory."""
    sampler = SAMPLERS[name.partition("_")[0]](1)
    study = optuna.load_study(storage=storage(url), study_name=name, sampler=sampler)
    study.get_trials(deepcopy=False)
    return study


def ask(study: optuna.Study) -> Trial:
    """A trial with a value for each of the 18 parameters."""
    return study.ask(fixed_distributions=past.space())


def app(study: optuna.Study) -> FastAPI:
    """The API."""
    made = FastAPI()
    running: dict[int, Trial] = {}
    lock = threading.Lock()

    @made.post("/api/v1/studies/{number}/ask", status_code=201)
    def ask_(number: int, body: AskRequest) -> Lease:
        trial = ask(study)
        with lock:
            running[trial._trial_id] = trial
        return Lease(
            lease=trial._trial_id,
            token=trial._trial_id,
            study=number,
            study_name=study.study_name,
            trial=trial.number,
            attempt=1,
            workload="external",
            params=trial.params,
            settings={},
            seed=trial.number,
            term_s=30.0,
            heartbeat_s=10.0,
            stall_s=600.0,
            artifacts="",
        )

    @made.post("/api/v1/leases/{lease}/report")
    def report(lease: int, body: ReportRequest) -> ReportReply:
        for item in body.reports:
            if item.value is not None:
                running[lease].report(item.value, item.epoch)
        return ReportReply(verdict=Verdict.GO_ON)

    @made.post("/api/v1/leases/{lease}/tell")
    def tell(lease: int, body: TellRequest) -> TellReply:
        trial = running[lease]
        study.tell(trial, body.value)
        with lock:
            del running[lease]
        return TellReply(study=study._study_id, trial=trial.number, state="complete", value=body.value)

    return made


def main() -> None:
    url, name = sys.argv[1:]
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = load(url, name)
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app(study), log_config=None, access_log=False))

    def announce() -> None:
        while not server.started:
            threading.Event().wait(0.02)
        sys.stdout.write(json.dumps({"url": f"http://127.0.0.1:{listener.getsockname()[1]}", "token": "none"}) + "\n")
        sys.stdout.flush()

    threading.Thread(target=announce, daemon=True).start()
    server.run(sockets=[listener])


if __name__ == "__main__":
    main()
