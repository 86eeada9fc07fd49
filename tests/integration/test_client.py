"""The client of a notebook against a real server: the verbs, the heartbeats, and what is measured is never lost."""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import sqlalchemy as sa

from api.app import create_app
from hpo.client import ApiError, Experiment
from hpo.coordinator import Coordinator
from hpo.expiry import Reaper
from hpo.tokens import Principal
from tests.integration.api_server import SECRETS, served

SPACE = {
    "x": {"type": "float", "low": -5.0, "high": 10.0},
    "rate": {"type": "float", "low": 1e-4, "high": 0.1, "log": True, "labels": ["a", "b"]},
    "kind": {"type": "categorical", "choices": ["round", "square"]},
}
TERM_S = 5.0
"""Of leases that end in a test, or that are kept from it: short, but not as short as a busy machine may hang."""


@contextmanager
def serving(engine: sa.Engine, term_s: float) -> Iterator[str]:
    """A server's address. Its leases live for `term_s` seconds."""
    coordinator = Coordinator(engine, {}, term_s=term_s, heartbeat_s=term_s / 3, stall_s=10 * term_s)
    tokens = {
        hashlib.sha256(secret.encode()).hexdigest(): Principal(id=f"process:{role}", role=role, name=role)
        for role, secret in SECRETS.items()
    }
    app = create_app(
        coordinator, engine, presets={}, artifacts="/nonexistent", process_tokens=tokens, one_time=None, version="0"
    )
    with Reaper(coordinator, term_s / 3), served(app) as (where, _):
        yield where


@pytest.fixture
def url(engine: sa.Engine) -> Iterator[str]:
    with serving(engine, 60.0) as where:
        yield where


@pytest.fixture
def hasty_url(engine: sa.Engine) -> Iterator[str]:
    """A server that takes back what it hears nothing of for `TERM_S` seconds."""
    with serving(engine, TERM_S) as where:
        yield where


def experiment(url: str, name: str = "oven", **more: object) -> Experiment:
    given = {"space": SPACE, "sampler": "random", "seed": 3, "token": SECRETS["admin"]} | more
    return Experiment(name, url=url, **given)  # type: ignore[arg-type]


def until(true: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.05)


def test_an_objective_is_tuned_in_five_lines(url: str) -> None:
    with experiment(url) as oven:
        assert oven.best() is None
        for _ in range(6):
            job = oven.suggest()
            assert set(job) == set(SPACE)
            assert set(job["rate"]) == {"a", "b"}
            oven.update(job, -((job["x"] - 2.0) ** 2))
        results, values = oven.get_all_results()
        assert [result.result_id for result in results] == list(range(6))
        best = oven.best()
        assert best is not None
        assert best.value == max(value for value in values if value is not None)
        assert best.value == -((best["x"] - 2.0) ** 2)
        assert oven.pending() == []


def test_a_point_of_ones_own_counts_and_a_value_that_is_no_number_is_infeasible(url: str) -> None:
    with experiment(url) as oven:
        own = {"x": 2.0, "rate": {"a": 0.01, "b": 0.02}, "kind": "round"}
        assert oven.update(own, 7.0).value == 7.0
        job = oven.suggest()
        assert math.isnan(oven.update(job, math.inf).value or 0.0)
        assert oven.best() == own
        values = oven.get_all_results()[1]
        assert values[0] == 7.0
        assert values[1] is not None
        assert math.isnan(values[1])


def test_an_outcome_told_again_replaces_the_first_and_the_best_follows(url: str) -> None:
    with experiment(url) as oven:
        first, second = oven.suggest(), oven.suggest()
        oven.update(first, 3.0)
        oven.update(second, 2.0)
        assert oven.update(first, 1.0).value == 1.0
        assert oven.best() == second
        assert math.isnan(oven.update(second, math.nan).value or 0.0)
        assert oven.best() == first
        third = oven.suggest()
        with experiment(url) as elsewhere, pytest.raises(ApiError, match="leased"):
            elsewhere.update_by_result_id(third.result_id, 1.0)


def test_a_value_that_is_no_number_is_refused_and_the_point_stays_ones_own(url: str) -> None:
    with experiment(url) as oven:
        job = oven.suggest()
        with pytest.raises(TypeError, match="a value is a number"):
            oven.update(job, "good")  # type: ignore[arg-type]
        assert oven.update(job, 1.0).value == 1.0


def test_pending_points_are_listed_found_by_their_values_and_given_up(url: str) -> None:
    with experiment(url) as oven:
        first, second, third = oven.suggest(), oven.suggest(), oven.suggest()
        assert [result.result_id for result in oven.pending()] == [0, 1, 2]
        oven.update(dict(second), 1.0)
        assert [result.result_id for result in oven.pending()] == [0, 2]
        oven.cancel(dict(first))
        assert [result.result_id for result in oven.pending()] == [2]
        oven.clear_pending()
        assert oven.pending() == []
        results, values = oven.get_all_results()
        assert ([result.result_id for result in results], values) == ([1], [1.0]), "what was cancelled is gone"
        with pytest.raises(ValueError, match="not pending"):
            oven.cancel({"x": 0.0})
        assert third.value is None


def test_a_suggestion_is_kept_alive_for_longer_than_its_term(hasty_url: str) -> None:
    with experiment(hasty_url) as oven:
        job = oven.suggest()
        time.sleep(2 * TERM_S)
        assert oven.suggest().result_id == job.result_id + 1, "nobody else was given the point"
        assert oven.update(job, 1.0).result_id == job.result_id


def test_a_process_that_dies_loses_no_point(hasty_url: str) -> None:
    code = (
        "import os; from hpo.client import Experiment; "
        f"oven = Experiment('oven', url={hasty_url!r}, token={SECRETS['admin']!r}); "
        "print(oven.suggest()['x'], flush=True); os._exit(9)"
    )
    with experiment(hasty_url) as oven:
        dead = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
        assert dead.returncode == 9, dead.stderr
        until(lambda: oven._client.get(f"/api/v1/studies/{oven.study}/trials/0")["state"] == "queued")
        again = oven.suggest()
        assert (again.result_id, repr(again["x"])) == (0, dead.stdout.strip())


def test_a_value_measured_after_the_suggestion_was_taken_back_is_recorded(hasty_url: str) -> None:
    with experiment(hasty_url) as oven:
        job = oven.suggest()
        oven._heart._stopped = True  # as if the machine had slept: no renewal for longer than the term
        until(lambda: oven._client.get(f"/api/v1/studies/{oven.study}/trials/0")["state"] == "queued")
        told = oven.update(job, 5.0)
        assert (told.value, dict(told)) == (5.0, dict(job))
        assert oven.pending() == [], "the point is not evaluated once more"
        best = oven.best()
        assert best is not None
        assert best.value == 5.0


def test_an_experiment_is_resumed_by_its_name_and_only_with_its_own_space(url: str) -> None:
    with experiment(url) as oven:
        oven.update(oven.suggest(), 1.0)
    with experiment(url, space=None) as again, experiment(url) as once_more:
        assert again.study == once_more.study == oven.study
        assert again.get_all_results()[1] == [1.0]
    other = {"x": {"type": "float", "low": -5.0, "high": 11.0}}
    with pytest.raises(ValueError, match="another space"):
        experiment(url, space=SPACE | other)
    with pytest.raises(ValueError, match="is to maximize"):
        experiment(url, direction="minimize")
    with pytest.raises(ValueError, match="no study named"):
        experiment(url, "unheard of", space=None)
    with pytest.raises(ApiError, match="choose another name"):
        experiment(url, resume=False)


def test_a_space_may_hold_tuples_and_numbers_of_numpy_and_is_resumed_all_the_same(url: str) -> None:
    numpy = pytest.importorskip("numpy")
    space = {
        "x": {"type": "float", "low": numpy.float32(0.0), "high": numpy.float64(1.0), "labels": ("a", "b")},
        "kind": {"type": "categorical", "choices": ("round", "square")},
    }
    with experiment(url, space=space) as oven, experiment(url, space=space) as again:
        assert again.study == oven.study
        point = {"x": {"a": numpy.float32(0.5), "b": numpy.int64(1)}, "kind": "round"}
        assert oven.update(point, numpy.float32(2.5)).value == 2.5


def test_a_refusal_names_every_fault(url: str) -> None:
    with pytest.raises(ApiError, match=r"2 faults: space\[0\]\.high.*space\[1\]"):
        experiment(url, space={"x": {"type": "float", "low": 0.0}, "y": {"type": "colour"}})


def test_forked_children_share_an_experiment_and_keep_alive_what_they_ask_for(hasty_url: str) -> None:
    fork = multiprocessing.get_context("fork")
    with experiment(hasty_url) as oven:
        mine = oven.suggest()
        told = fork.SimpleQueue()

        def child() -> None:
            numbers = []
            for _ in range(5):
                job = oven.suggest()
                oven.update(job, job["x"])
                numbers.append(job.result_id)
            job = oven.suggest()
            time.sleep(2 * TERM_S)
            told.put([*numbers, oven.update(job, 1.0).result_id])

        children = [fork.Process(target=child, daemon=True) for _ in range(3)]
        for each in children:
            each.start()
        numbers = [mine.result_id]
        for _ in range(5):
            job = oven.suggest()
            assert oven.update(job, job["x"]).value == job["x"]
            numbers.append(job.result_id)
        for each in children:
            each.join(120.0)
            assert each.exitcode == 0
            numbers += told.get()
        assert sorted(numbers) == list(range(24)), "no point was given twice, and none was taken back"
        oven.update(mine, 1.0)
        assert oven.pending() == []


def test_steps_are_reported_and_a_cancelled_point_is_to_be_given_up(url: str) -> None:
    with experiment(url) as oven:
        job = oven.suggest()
        assert oven.step(job, 0, 0.25)
        oven._client.post(f"/api/v1/studies/{oven.study}/trials/0/cancel")
        assert not oven.step(job, 1, 0.5)
        curve = oven._client.get(f"/api/v1/studies/{oven.study}/trials/0")["curve"]
        assert [point["value"] for point in curve] == [0.25, 0.5]


def test_the_progress_is_drawn(url: str) -> None:
    pytest.importorskip("matplotlib")
    with experiment(url) as oven:
        assert "no outcome yet" in [text.get_text() for text in oven.report().axes[0].texts]
        for value in (1.0, 3.0, math.nan, 2.0):
            oven.update(oven.suggest(), value)
        dots, line, crosses = oven.report().axes[0].lines
        assert list(dots.get_ydata()) == [1.0, 3.0, 2.0]
        assert list(line.get_ydata()) == [1.0, 3.0, 3.0]
        assert list(crosses.get_xdata()) == [2]


def test_it_needs_neither_optuna_nor_sqlalchemy() -> None:
    code = "import sys, hpo.client; print(sorted({'optuna', 'sqlalchemy', 'torch', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
