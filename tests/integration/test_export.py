"""Exports of a real study: whole, one state of the database, and safe to open in a spreadsheet."""

from __future__ import annotations

import csv
import io
import json
import threading

import pytest
import sqlalchemy as sa
import yaml

from hpo import export
from tests.integration.leases_harness import coordinator, must_claim, point, release, report, study, tell


def test_an_export_holds_the_spec_and_every_trial_with_its_attempts(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study())
    first = must_claim(desk)
    release(desk, first, checkpoint_epoch=2)
    tell(desk, must_claim(desk), 0.61)
    tell(desk, must_claim(desk), None, "failed", reason="boom", traceback="Traceback")
    exported = json.loads(export.WRITERS["json"](desk.export(made.study)))
    assert exported["study"]["spec"] == made.spec
    assert [trial["state"] for trial in exported["trials"]] == ["complete", "failed"]
    assert [attempt["state"] for attempt in exported["trials"][0]["history"]] == ["released", "complete"]
    assert exported["trials"][1]["history"][0]["traceback"] == "Traceback"
    assert exported["trials"][0]["params"] == first.params
    assert yaml.safe_load(export.WRITERS["yaml"](desk.export(made.study))) == exported
    again = desk.create_study(exported["study"]["spec"] | {"name": "again"})
    assert again.state == "running", "an exported spec can be launched"


def test_the_best_point_can_be_trained_from_its_yaml(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study())
    assert export.best_point(desk.export(made.study)) is None
    tell(desk, must_claim(desk), 0.3)
    lease = must_claim(desk)
    tell(desk, lease, 0.7)
    text = export.best_point(desk.export(made.study))
    assert text is not None
    assert yaml.safe_load(text) == {"params": lease.params, "settings": {"net": "mini"}, "seed": lease.seed}


def test_more_trials_than_a_page_are_all_exported(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "CHUNK", 3)
    desk = coordinator(engine)
    made = desk.create_study(study())
    for count in range(1, 8):
        desk.add_trial(made.study, {"params": point(0.5), "value": 0.1})
        assert [trial["trial"] for trial in desk.export(made.study)["trials"]] == list(range(count))


def test_a_spreadsheet_runs_nothing_of_a_csv(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    space = [
        {"name": "x", "type": "float", "low": -1.0, "high": 1.0},
        {"name": "init", "type": "categorical", "choices": ["=cmd|' /C calc'!A0", "he"]},
        {"name": "eta", "type": "float", "low": 1e-5, "high": 1.0, "labels": ["conv", "fc"]},
    ]
    made = desk.create_study(study(space=space, workload="external", settings={}))
    params = {"x": -0.5, "init": "=cmd|' /C calc'!A0", "eta": {"conv": 1e-5, "fc": 0.5}}
    reasons = ["=1+1", "+1", "-1", "@SUM(A1)", "\tx", "\rx", 'fine, "quoted"\nand long']
    for reason in reasons:
        desk.add_trial(made.study, {"params": params, "value": -0.25, "reason": reason})
    text = export.WRITERS["csv"](desk.export(made.study))
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert [row["reason"] for row in rows] == [f"'{reason}" for reason in reasons[:-1]] + [reasons[-1]]
    assert {row["init"] for row in rows} == {"'=cmd|' /C calc'!A0"}
    assert {row["x"] for row in rows} == {"-0.5"}, "a number is left alone"
    assert {row["value"] for row in rows} == {"-0.25"}
    assert {row["eta[conv]"] for row in rows} == {"1e-05"}
    assert [row["trial"] for row in rows] == [str(place) for place in range(7)]


def test_a_report_in_the_middle_of_an_export_does_not_tear_it(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study())
    lease = must_claim(desk)
    real = export.trials.views

    def slow(*args: object) -> object:
        other = coordinator(engine)

        def finish() -> None:
            report(other, lease, {0: 0.5})
            tell(other, lease, 0.5)

        thread = threading.Thread(target=finish)
        thread.start()
        thread.join(60)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(export.trials, "views", slow)
    exported = desk.export(made.study)
    monkeypatch.undo()
    assert exported["study"]["counts"]["leased"] == 1
    assert [trial["state"] for trial in exported["trials"]] == ["leased"]
    assert [trial["state"] for trial in desk.export(made.study)["trials"]] == ["complete"]
