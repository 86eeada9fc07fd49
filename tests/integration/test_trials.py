"""Trials against a real PostgreSQL: pages, the best, points of one's own, cancelling and trying again."""

from __future__ import annotations

import base64
import json
from typing import Any

import optuna
import pytest
import sqlalchemy as sa

from hpo import statements
from hpo.coordinator import Coordinator
from hpo.errors import Conflict, Invalid, NotFound
from hpo.protocol import Verdict
from tests.integration.leases_harness import (
    Ball,
    claim,
    coordinator,
    must_claim,
    point,
    release,
    report,
    study,
    tell,
    together,
)


def pages(desk: Coordinator, number: int, limit: int, **asked: Any) -> list[int]:
    seen: list[int] = []
    cursor: str | None = None
    for _ in range(100):
        page = desk.list_trials(number, limit=limit, cursor=cursor, **asked)
        assert len(page.items) <= limit
        seen += [trial.trial for trial in page.items]
        cursor = page.next
        if cursor is None:
            return seen
    raise AssertionError("the pages never end")


@pytest.fixture
def mixed(engine: sa.Engine) -> tuple[Coordinator, int]:
    """Trials 0..9: complete .3 .9 .5 .9, infeasible .05, pruned .2, failed, cancelled, leased, queued."""
    desk = coordinator(engine)
    made = desk.create_study(study())
    for value in (0.3, 0.9, 0.5, 0.9):
        tell(desk, must_claim(desk), value)
    tell(desk, must_claim(desk), 0.05, "infeasible", reason="diverged")
    tell(desk, must_claim(desk), 0.2, "pruned")
    tell(desk, must_claim(desk), None, "failed", reason="boom")
    desk.add_trial(made.study, {"params": point(0.1)})
    desk.cancel_trial(made.study, 7)
    must_claim(desk)
    desk.add_trial(made.study, {"params": point(0.2)})
    return desk, made.study


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 10, 50])
def test_pages_hold_every_trial_once_and_in_order(mixed: tuple[Coordinator, int], limit: int) -> None:
    desk, number = mixed
    assert pages(desk, number, limit) == list(range(10))
    assert pages(desk, number, limit, order="-value") == [1, 3, 2, 0, 5, 4, 6, 7, 8, 9]
    assert pages(desk, number, limit, order="value") == [4, 5, 0, 2, 1, 3, 6, 7, 8, 9]
    assert pages(desk, number, limit, order="-value", state="complete") == [1, 3, 2, 0]


@pytest.mark.parametrize("few", [0, 2, statements.LOOKED_UP])
def test_states_are_told_apart(mixed: tuple[Coordinator, int], monkeypatch: pytest.MonkeyPatch, few: int) -> None:
    desk, number = mixed
    monkeypatch.setattr(statements, "LOOKED_UP", few)
    found = {state: pages(desk, number, 50, state=state) for state in desk.get_study(number).counts}
    assert found == {
        "queued": [9],
        "leased": [8],
        "complete": [0, 1, 2, 3],
        "infeasible": [4],
        "pruned": [5],
        "failed": [6],
        "cancelled": [7],
    }
    counts = {state: len(trials) for state, trials in found.items()}
    assert desk.get_study(number).counts == counts
    other = desk.create_study(study("other")).study
    assert [each.counts for each in desk.list_studies().items] == [desk.get_study(other).counts, counts]
    reasons = [trial.reason for trial in desk.list_trials(number).items]
    assert reasons == ["", "", "", "", "diverged", "", "boom", "cancelled by a person", "", ""]


def test_the_best_are_feasible_and_the_earlier_of_equals_comes_first(mixed: tuple[Coordinator, int]) -> None:
    desk, number = mixed
    assert [trial.trial for trial in desk.best(number)] == [1, 3, 2, 0]
    assert [trial.trial for trial in desk.best(number, top=1)] == [1]
    view = desk.get_study(number).best
    assert view is not None
    assert view == desk.best(number)[0]


def test_a_minimising_study_has_its_smallest_value_as_best(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study(direction="minimize", workload="external", settings={}))
    for value in (3.0, -1.5, 2.0):
        desk.add_trial(made.study, {"params": point(0.5), "value": value})
    assert [trial.value for trial in desk.best(made.study)] == [-1.5, 2.0, 3.0]
    assert [step.best for step in desk.progress(made.study)] == [3.0, -1.5, -1.5]


def test_progress_holds_the_best_so_far(mixed: tuple[Coordinator, int]) -> None:
    desk, number = mixed
    steps = desk.progress(number)
    assert [step.trial for step in steps] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert [step.best for step in steps] == [0.3, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9]
    assert [step.state for step in steps][4:] == ["infeasible", "pruned", "failed", "cancelled"]


def opaque(*parts: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(parts).encode()).decode().rstrip("=")


@pytest.mark.parametrize(
    "cursor",
    [
        "!",
        opaque("value", 0.5, 1),
        opaque("-value", "0.5", 1),
        opaque("-value", 0.5, -1),
        opaque("-value", 0.5, True),
        opaque("-value", 0.5, 2**40),
        opaque("-value", float("nan"), 1),
        opaque("-value", 0.5),
        opaque({}),
    ],
)
def test_a_damaged_cursor_is_refused(mixed: tuple[Coordinator, int], cursor: str) -> None:
    desk, number = mixed
    with pytest.raises(Invalid) as refused:
        desk.list_trials(number, order="-value", cursor=cursor)
    assert refused.value.faults[0].at == "cursor"


def test_bad_questions_are_refused(mixed: tuple[Coordinator, int]) -> None:
    desk, number = mixed
    for asked in ({"state": "waiting"}, {"order": "x"}, {"limit": 0}, {"limit": 10_000}):
        with pytest.raises(Invalid):
            desk.list_trials(number, **asked)  # type: ignore[arg-type]
    with pytest.raises(Invalid):
        desk.best(number, top=0)
    with pytest.raises(NotFound):
        desk.get_trial(number, 10)
    with pytest.raises(NotFound):
        desk.get_trial(number, -1)


@pytest.mark.parametrize("window", [1, 3, 400])
def test_values_of_other_studies_stand_in_nobodys_way(
    mixed: tuple[Coordinator, int], monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    desk, number = mixed
    other = desk.create_study(study("other", workload="external", settings={})).study
    for value in (0.01, 0.05, 0.3, 0.5, 0.5, 0.9, 0.9, 0.95, 7.0, 7.0):
        desk.add_trial(other, {"params": point(0.5), "value": value})
    for name in ("WINDOW", "WIDE"):
        monkeypatch.setattr(statements, name, window)
    for limit in (1, 2, 4, 50):
        assert pages(desk, number, limit, order="-value") == [1, 3, 2, 0, 5, 4, 6, 7, 8, 9]
        assert pages(desk, number, limit, order="value") == [4, 5, 0, 2, 1, 3, 6, 7, 8, 9]
        assert pages(desk, number, limit, order="-value", state="complete") == [1, 3, 2, 0]
        assert pages(desk, number, limit, order="value", state="pruned") == [5]
        assert pages(desk, number, limit, order="value", state="cancelled") == [7]
        assert [trial.trial for trial in desk.best(number, limit)] == [1, 3, 2, 0][:limit]
    assert {each.study: each.best and each.best.trial for each in desk.list_studies().items} == {number: 1, other: 8}


def test_a_value_that_is_no_number_is_listed_behind_all(engine: sa.Engine, postgres_url: str) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study())
    theirs = optuna.load_study(study_name="s", storage=postgres_url)
    for number in (float("inf"), 0.5, float("-inf"), 0.2):
        theirs.add_trial(optuna.trial.create_trial(value=number, params={}, distributions={}))
    for order, found in (("-value", [1, 3, 0, 2]), ("value", [3, 1, 0, 2]), ("number", [0, 1, 2, 3])):
        for state in (None, "complete"):
            assert pages(desk, made.study, 3, order=order, state=state) == found
    assert [trial.trial for trial in desk.best(made.study)] == [1, 3]


def test_a_page_and_the_best_read_few_rows_of_a_long_study(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study())
    with engine.begin() as conn:
        conn.execute(
            sa.text("""
                WITH t AS (
                    INSERT INTO public.trials (study_id, number, state, datetime_start, datetime_complete)
                    SELECT :s, n, 'COMPLETE', now(), now() FROM generate_series(0, 9999) AS n RETURNING trial_id
                )
                , marks AS (
                    INSERT INTO public.trial_system_attributes (trial_id, key, value_json)
                    SELECT trial_id, 'constraints:infeasible', '0.0' FROM t
                )
                INSERT INTO public.trial_values (trial_id, objective, value, value_type)
                SELECT trial_id, 0, random(), 'FINITE' FROM t
            """),
            {"s": made.study},
        )
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
        conn.execute(sa.text("ANALYZE"))
    read: list[float] = []

    @sa.event.listens_for(engine, "before_cursor_execute")
    def note(conn: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if "public.trials" in statement:
            cursor.execute("EXPLAIN (ANALYZE, FORMAT JSON) " + statement, parameters)
            read.append(rows_read(cursor.fetchone()[0][0]["Plan"]))

    first = desk.list_trials(made.study, order="-value")
    desk.list_trials(made.study, order="-value", cursor=first.next)
    desk.list_trials(made.study, order="value", cursor=opaque("value", 0.7, 5000), state="complete")
    desk.list_trials(made.study, limit=10, cursor=opaque("number", None, 9000), state="complete")
    desk.best(made.study)
    assert len(read) == 10, "the page and its rows, five times"
    assert max(read) < 2 * statements.WIDE


def rows_read(plan: dict[str, Any]) -> float:
    """How many rows the scans of an executed plan went through."""
    own = plan["Actual Rows"] + plan.get("Rows Removed by Filter", 0) if "Scan" in plan["Node Type"] else 0
    return own * plan["Actual Loops"] + sum(rows_read(child) for child in plan.get("Plans", ()))


# Points of one's own


def test_a_recorded_trial_teaches_and_costs_nothing(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study())
    good = desk.add_trial(made.study, {"params": point(0.5), "value": 0.61, "reason": "by hand"})
    assert (good.state, good.value, good.origin, good.reason, good.attempts) == (
        "complete",
        0.61,
        "recorded",
        "by hand",
        0,
    )
    bad = desk.add_trial(made.study, {"params": point(0.6), "outcome": "infeasible"})
    assert (bad.state, bad.value) == ("infeasible", 0.61)
    assert desk.add_trial(made.study, {"params": point(0.7), "outcome": "failed"}).state == "failed"
    assert desk.get_study(made.study).budget.trials_used == 0
    url = engine.url.render_as_string(hide_password=False)
    seen = optuna.load_study(study_name="s", storage=optuna.storages.RDBStorage(url))
    assert seen.best_trial.params == {"x": 0.5, "eta[conv]": 0.01, "eta[fc]": 0.02}
    assert seen.trials[1].constraints == {"infeasible": 1.0}


def test_a_queued_point_may_be_partial_and_must_be_possible(engine: sa.Engine) -> None:
    desk = coordinator(engine, ball=Ball(limit=0.5))
    made = desk.create_study(study())
    view = desk.add_trial(made.study, {"params": {"eta": 0.01}})
    assert (view.state, view.origin, view.params) == ("queued", "queued", {"eta": {"conv": 0.01, "fc": 0.01}})
    for params in ({"x": 0.9, "eta": 0.01}, {"x": 7}, {"y": 1}, {"eta": {"nope": 0.01}}):
        with pytest.raises(Invalid):
            desk.add_trial(made.study, {"params": params})
    assert desk.get_study(made.study).counts["queued"] == 1
    lease = must_claim(desk)
    assert lease.params["eta"] == {"conv": 0.01, "fc": 0.01}
    assert lease.params["x"] < 0.5  # type: ignore[operator]


def test_a_study_that_is_over_takes_no_point_but_a_record(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study(budget={"trials": 1}))
    tell(desk, must_claim(desk))
    with pytest.raises(Conflict, match="raise its budget"):
        desk.add_trial(made.study, {"params": point(0.5)})
    assert desk.add_trial(made.study, {"params": point(0.5), "value": 0.9}).state == "complete"
    other = desk.create_study(study("t"))
    desk.patch_study(other.study, {"state": "stopped"})
    with pytest.raises(Conflict, match="set it running first"):
        desk.add_trial(other.study, {"params": point(0.5)})


def test_points_added_at_once_get_numbers_of_their_own(engine: sa.Engine) -> None:
    desk, other = coordinator(engine), coordinator(engine)
    made = desk.create_study(study())
    calls = [
        lambda mine=(desk, other)[n % 2]: mine.add_trial(made.study, {"params": point(0.5)}).trial  # type: ignore[misc]
        for n in range(12)
    ]
    calls += [lambda n=n: must_claim(desk, f"w{n}").trial for n in range(4)]  # type: ignore[misc]
    results = together(*calls)
    assert all(isinstance(result, int) for result in results), results
    assert sorted(results[:12]) == sorted(set(results[:12]))  # type: ignore[type-var]
    view = desk.get_study(made.study)
    assert sum(view.counts.values()) == len(pages(desk, made.study, 50))
    assert pages(desk, made.study, 50) == list(range(sum(view.counts.values())))


# Cancelling, and trying again


def test_a_leased_trial_is_cancelled_through_its_worker(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study())
    lease = must_claim(desk)
    view = desk.cancel_trial(made.study, 0)
    assert (view.state, view.reason) == ("leased", "asked to stop: cancelled by a person")
    verdict = report(desk, lease, {0: 0.5})
    assert (verdict.verdict, verdict.reason) == (Verdict.STOP, "cancelled by a person")
    reply = release(desk, lease, "stopped", checkpoint_epoch=1)
    assert reply.state == "cancelled"
    assert release(desk, lease, "stopped", checkpoint_epoch=1) == reply
    trial = desk.get_trial(made.study, 0)
    assert (trial.state, trial.reason, trial.history[0].state) == ("cancelled", "cancelled by a person", "cancelled")
    assert desk.cancel_trial(made.study, 0).state == "cancelled", "again changes nothing"
    assert must_claim(desk).trial == 1


def test_a_finished_trial_cannot_be_cancelled(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study())
    tell(desk, must_claim(desk))
    with pytest.raises(Conflict, match="complete already"):
        desk.cancel_trial(made.study, 0)


def test_a_cancel_and_a_tell_at_once_leave_one_truth(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study())
    for number in range(12):
        lease = must_claim(desk)
        cancelled, told = together(lambda: desk.cancel_trial(made.study, number), lambda: tell(desk, lease))  # noqa: B023
        assert not isinstance(told, Exception), "a result that is there is kept"
        assert isinstance(cancelled, Conflict) or cancelled.state == "leased"  # type: ignore[union-attr]
        assert desk.get_trial(made.study, number).state == "complete"


def test_a_cancel_and_a_claim_at_once_never_lease_a_cancelled_trial(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study())
    for _ in range(10):
        queued = desk.add_trial(made.study, {"params": point(0.5)}).trial
        cancelled, lease = together(lambda: desk.cancel_trial(made.study, queued), lambda: claim(desk))  # noqa: B023
        view = desk.get_trial(made.study, queued)
        if lease.trial == queued:  # type: ignore[union-attr]
            assert view.state == "leased"
        else:
            assert (view.state, cancelled.state) == ("cancelled", "cancelled")  # type: ignore[union-attr]
        tell(desk, lease)  # type: ignore[arg-type]


def test_a_trial_is_tried_again_as_a_new_one(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study())
    first = must_claim(desk)
    tell(desk, first, None, "failed")
    again = desk.requeue_trial(made.study, 0)
    assert (again.trial, again.state, again.params, again.reason) == (1, "queued", first.params, "trial 0 once more")
    with pytest.raises(Conflict, match="trial 1 is trying trial 0 again"):
        desk.requeue_trial(made.study, 0)
    with pytest.raises(Conflict, match="queued"):
        desk.requeue_trial(made.study, 1)
    lease = must_claim(desk)
    assert (lease.trial, lease.params, lease.attempt) == (1, first.params, 1)
    tell(desk, lease, 0.05, "infeasible")
    assert desk.get_trial(made.study, 0).state == "failed", "the old trial stays what it was"
    assert desk.requeue_trial(made.study, 1).trial == 2
    tell(desk, must_claim(desk), 0.5)
    with pytest.raises(Conflict, match="complete"):
        desk.requeue_trial(made.study, 2)


def test_a_stock_trial_left_running_can_be_cancelled(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study())
    url = engine.url.render_as_string(hide_password=False)
    outside = optuna.load_study(study_name="s", storage=optuna.storages.RDBStorage(url))
    trial = outside.ask()
    assert desk.cancel_trial(made.study, 0).state == "cancelled"
    with pytest.raises(ValueError, match="Cannot tell a FAIL trial"):
        outside.tell(trial, 0.5)


def test_a_trial_that_stock_optuna_ended_is_not_told_again(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study())
    lease = must_claim(desk)
    url = engine.url.render_as_string(hide_password=False)
    optuna.load_study(study_name="s", storage=optuna.storages.RDBStorage(url)).tell(0, 0.9)
    assert report(desk, lease, {0: 0.1}).verdict == Verdict.STOP
    with pytest.raises(Conflict, match="another program"):
        tell(desk, lease, 0.5)
    assert release(desk, lease, "stopped").state == "complete"
    trial = desk.get_trial(made.study, 0)
    assert (trial.state, trial.value) == ("complete", 0.9)
