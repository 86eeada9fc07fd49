"""Studies against a real PostgreSQL: launched whole, listed, steered, deleted."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa

from hpo.coordinator import Coordinator
from hpo.errors import Conflict, Invalid, NotFound
from hpo.protocol import Verdict
from tests.integration.leases_harness import (
    ask,
    claim,
    coordinator,
    must_claim,
    point,
    report,
    study,
    tell,
    together,
)


def test_a_study_is_read_back_as_it_was_launched(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    document = study(
        description="d",
        notes="n\u2028",
        budget={"trials": 5, "hours": 2.5, "target": 0.9},
        concurrency=2,
        pruner="median",
    )
    made = desk.create_study(document)
    assert (made.name, made.state, made.reason, made.workload, made.direction) == (
        "s",
        "running",
        "",
        "ball",
        "maximize",
    )
    assert (made.sampler, made.pruner, made.concurrency, made.notes) == ("random", "median", 2, "n\u2028")
    assert (made.budget.trials, made.budget.hours, made.budget.target) == (5, 2.5, 0.9)
    assert (made.budget.trials_used, made.budget.hours_used, made.best, made.finished_at) == (0, 0.0, None, None)
    assert set(made.counts.values()) == {0}
    assert made.spec["seed"] == 7
    assert coordinator(engine).get_study(made.study) == made
    again = desk.create_study(made.spec | {"name": "again"})
    assert again.spec == made.spec | {"name": "again"}, "a spec is a document that can be launched"


def test_large_bounds_survive_the_database(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    space = [{"name": "x", "type": "float", "low": -1e20, "high": 1.0}]
    made = desk.create_study(study(space=space))
    lease = claim(coordinator(engine))
    assert lease is not None
    assert lease.study == made.study


def test_a_bad_document_is_refused_whole(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    with pytest.raises(Invalid) as refused:
        desk.create_study(study(sampler="astrology", settings={"nett": 1}))
    assert {fault.at for fault in refused.value.faults} >= {"sampler", "settings.nett"}
    assert desk.list_studies().items == []
    with engine.connect() as conn:
        assert conn.execute(sa.text("SELECT count(*) FROM public.studies")).scalar_one() == 0


def test_a_thousand_points_are_queued_and_cancelled_at_the_price_of_one(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    statements: list[str] = []
    sa.event.listen(engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    made = desk.create_study(study(points=[point(n / 1000) for n in range(1000)]))
    desk.patch_study(desk.create_study(study("other", points=[{"x": 0.5}])).study, {"state": "paused"})
    assert len(statements) < 60, "not one by one"
    assert made.counts["queued"] == 1000
    queued = desk.list_trials(made.study, limit=1000).items
    assert [(trial.trial, trial.params["x"]) for trial in queued] == [(n, n / 1000) for n in range(1000)]
    assert [must_claim(desk).trial, must_claim(desk).trial] == [0, 1]
    statements.clear()
    stopped = desk.patch_study(made.study, {"state": "stopped"})
    assert len(statements) < 40
    assert (stopped.counts["cancelled"], stopped.counts["leased"], stopped.counts["queued"]) == (998, 2, 0)
    assert {trial.reason for trial in desk.list_trials(made.study, state="cancelled").items} == {
        "the study was stopped"
    }


def test_of_two_studies_of_one_name_at_once_one_is_launched(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    results = together(*[lambda: desk.create_study(study())] * 4)
    assert sum(isinstance(result, Conflict) for result in results) == 3, results
    assert len(desk.list_studies().items) == 1


def test_what_is_not_there_is_not_found(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    calls: list[Any] = [
        lambda: desk.get_study(1),
        lambda: desk.get_study(10**30),
        lambda: desk.patch_study(1, {"notes": "x"}),
        lambda: desk.delete_study(1),
        lambda: desk.list_trials(1),
        lambda: desk.get_trial(1, 0),
        lambda: desk.add_trial(1, {"params": {}}),
        lambda: desk.cancel_trial(1, 0),
        lambda: desk.requeue_trial(1, 0),
        lambda: desk.best(1),
        lambda: desk.progress(1),
        lambda: desk.export(1),
    ]
    for call in calls:
        with pytest.raises(NotFound):
            call()


def test_studies_are_listed_newest_first_in_pages(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    for place in range(7):
        desk.create_study(study(f"run-{place}"))
    desk.patch_study(3, {"state": "paused"})
    seen: list[str] = []
    cursor: str | None = None
    for _ in range(10):
        page = desk.list_studies(limit=3, cursor=cursor)
        seen += [item.name for item in page.items]
        cursor = page.next
        if cursor is None:
            break
    assert seen == [f"run-{place}" for place in reversed(range(7))]
    assert [item.name for item in desk.list_studies(state="paused").items] == ["run-2"]
    assert desk.list_studies(name="nothing").items == []


def test_an_exact_name_comes_first_and_once(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    for name in ("mini", "mini-2", "other", "MINI-3"):
        desk.create_study(study(name))
    names: list[str] = []
    cursor: str | None = None
    for _ in range(5):
        page = desk.list_studies(name="mini", limit=1, cursor=cursor)
        names += [item.name for item in page.items]
        cursor = page.next
        if cursor is None:
            break
    assert names == ["mini", "MINI-3", "mini-2"]


@pytest.mark.parametrize(
    "cursor", ["", "x", "é", "bnVsbA", "WyJzdHVkaWVzIiwgdHJ1ZV0", "W1tbW1tb", "WyJudW1iZXIiLCBudWxsLCAxXQ", "A" * 5000]
)
def test_a_damaged_cursor_is_refused(engine: sa.Engine, cursor: str) -> None:
    with pytest.raises(Invalid) as refused:
        coordinator(engine).list_studies(cursor=cursor)
    assert refused.value.faults[0].at == "cursor"


def test_bad_questions_are_refused(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    for asked in ({"state": "open"}, {"limit": 0}, {"limit": 1001}, {"name": "a\x00"}):
        with pytest.raises(Invalid):
            desk.list_studies(**asked)  # type: ignore[arg-type]


# Steering


@pytest.mark.parametrize(("path", "wanted"), [(["stopped"], "paused"), (["paused", "stopped"], "paused")])
def test_a_state_that_is_not_allowed_is_refused_and_the_allowed_ones_are_named(
    engine: sa.Engine, path: list[str], wanted: str
) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study())
    for state in path:
        assert desk.patch_study(made.study, {"state": state}).state == state
    with pytest.raises(Conflict, match="it can become running"):
        desk.patch_study(made.study, {"state": wanted, "notes": "not kept"})
    assert desk.get_study(made.study).notes == "", "a refused change changes nothing"


def test_a_finished_study_can_be_neither_paused_nor_stopped(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study(budget={"trials": 1}))
    tell(desk, must_claim(desk))
    for wanted in ("paused", "stopped", "running"):
        with pytest.raises(Conflict):
            desk.patch_study(made.study, {"state": wanted})
    assert desk.patch_study(made.study, {"notes": "good"}).notes == "good"


def test_a_state_named_again_changes_nothing(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study())
    for state in ("running", "paused", "paused", "running", "stopped", "stopped", "running"):
        assert desk.patch_study(made.study, {"state": state}).state == state


def test_concurrency_and_notes_change_while_it_runs(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study(concurrency=1))
    must_claim(desk)
    assert claim(desk) is None
    view = desk.patch_study(made.study, {"concurrency": None, "notes": "more"})
    assert (view.concurrency, view.notes, view.spec["concurrency"], view.spec["notes"]) == (None, "more", None, "more")
    assert claim(desk) is not None
    with pytest.raises(Invalid):
        desk.patch_study(made.study, {"concurrency": 0})


def test_a_stopped_study_may_run_again(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study(points=[point(0.1)]))
    view = desk.patch_study(made.study, {"state": "stopped"})
    assert view.reason == "stopped by a person"
    view = desk.patch_study(made.study, {"state": "running"})
    assert (view.state, view.counts["cancelled"]) == ("running", 1)
    assert must_claim(desk).trial == 1


def test_a_study_is_deleted_with_all_it_has(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study(points=[point(0.1)]))
    kept = desk.create_study(study("kept"))
    lease = must_claim(desk)
    report(desk, lease, {0: 0.5})
    with pytest.raises(Conflict, match="stop the study first"):
        desk.delete_study(made.study)
    desk.patch_study(made.study, {"state": "stopped"})
    desk.delete_study(made.study)
    assert [item.study for item in desk.list_studies().items] == [kept.study]
    assert report(desk, lease, {1: 0.6}).verdict == Verdict.LOST
    with pytest.raises(NotFound):
        tell(desk, lease)
    with engine.connect() as conn:
        for table in ("public.trials", "public.trial_params", "whetstone.attempts", "whetstone.metrics"):
            assert conn.execute(sa.text(f"SELECT count(*) FROM {table}")).scalar_one() == 0
    assert desk.create_study(study()).study > kept.study, "the name is free again"


def test_a_delete_that_meets_a_report_gives_way_and_is_made_again(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    for _ in range(20):
        made = desk.create_study(study(points=[point(0.5)]))
        if gave_way(desk, made.study, engine):
            break
    else:
        raise AssertionError("the delete never gave way")
    with pytest.raises(NotFound):
        desk.get_study(made.study)


def gave_way(desk: Coordinator, number: int, engine: sa.Engine) -> bool:
    """Delete a study that somebody reports on; tell which of the two PostgreSQL ended: the first to wait for a second.

    That is the delete, unless this process is held up so long between the two.
    """
    with ThreadPoolExecutor(1) as pool, engine.connect() as reporting:
        reporting.execute(sa.text("SELECT 1 FROM public.trials FOR KEY SHARE"))
        deleting = pool.submit(desk.delete_study, number)
        waits = sa.text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query ~ 'FOR UPDATE'")
        while not deleting.done():
            with engine.connect() as looking:  # one transaction sees the same of it all along
                if looking.execute(waits).scalar_one():
                    break
            time.sleep(0.02)
        attribute = "INSERT INTO public.study_system_attributes (study_id, key, value_json) VALUES (:s, 'rung', '1')"
        try:
            reporting.execute(sa.text(attribute), {"s": number})
            reporting.commit()
            return True
        except sa.exc.OperationalError:
            reporting.rollback()
            return False
        finally:
            deleting.result(60)


def test_a_study_deleted_by_another_process_is_not_found(engine: sa.Engine) -> None:
    desk, other = coordinator(engine), coordinator(engine)
    made = desk.create_study(study())
    assert desk.list_trials(made.study).items == []
    other.delete_study(made.study)
    for call in (desk.list_trials, desk.best, desk.progress, desk.export, desk.get_study):
        with pytest.raises(NotFound):
            call(made.study)
    assert claim(desk) is None


def test_a_study_that_this_server_cannot_sample_is_read_and_told_all_the_same(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study(sampler="gp", pruner="median"))
    lease = must_claim(desk)
    monkeypatch.setattr("hpo.spec.importlib.util.find_spec", lambda name: None)  # torch is gone
    after = coordinator(engine)
    assert (after.get_study(made.study).sampler, after.get_study(made.study).pruner) == ("gp", "median")
    assert claim(after) is None
    assert tell(after, lease, 0.5).state == "complete"
    with pytest.raises(Conflict, match="gp fits its kernel with torch"):
        ask(after, made.study)
    assert after.get_study(made.study).state == "running"


def test_a_study_whose_sampler_this_release_does_not_know_is_read_all_the_same(engine: sa.Engine) -> None:
    made = coordinator(engine).create_study(study())
    with engine.begin() as conn:
        conn.execute(sa.text("UPDATE whetstone.studies SET spec = jsonb_set(spec, '{sampler,name}', '\"anneal\"')"))
    after = coordinator(engine)
    assert after.list_studies().items[0].sampler == "anneal"
    with pytest.raises(Conflict, match="there is no sampler 'anneal'"):
        ask(after, made.study)


def test_stats_count_what_is_there_and_what_was_called(engine: sa.Engine) -> None:
    began = time.monotonic()
    desk = coordinator(engine)
    desk.create_study(study())
    tell(desk, must_claim(desk))
    tell(desk, must_claim(desk), 0.05, "infeasible")
    must_claim(desk, "w2")
    stats = desk.stats()
    assert {state: n for state, n in stats["trials"].items() if n} == {"leased": 1, "complete": 1, "infeasible": 1}
    assert stats["studies"] == {"running": 1, "paused": 0, "stopped": 0, "finished": 0}
    assert stats["workers"] == {"idle": 1, "busy": 1, "draining": 0, "silent": 0, "stopped": 0}
    assert stats["leases"] == 1
    assert stats["calls"]["claim"]["count"] == 3
    assert all(0 < stats["calls"][call]["seconds"] < time.monotonic() - began for call in ("claim", "tell"))


def test_the_sampler_that_auto_picked_is_shown(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study())
    assert made.picked is None
    with engine.begin() as conn:
        conn.execute(
            sa.text("UPDATE whetstone.studies SET picked = CAST(:picked AS jsonb)"),
            {"picked": '{"sampler": "gp", "why": "few dimensions"}'},
        )
    picked = desk.get_study(made.study).picked
    assert picked is not None
    assert (picked.sampler, picked.why) == ("gp", "few dimensions")
