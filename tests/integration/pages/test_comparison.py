"""Two trials side by side on a page, reached from their study and from either of them."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.testclient import TestClient

from hpo.coordinator import Coordinator
from hpo.protocol import TaskAnswers
from tests.integration.leases_harness import must_claim, tell
from tests.integration.pages.app import SIAMESE, browser, text_of


def two_trials(hpo: Coordinator) -> int:
    """A study whose trial 0 answers 60 of 100 tasks, its trial 1 90; a third, pruned, told no answers."""
    study = hpo.create_study(SIAMESE).study
    tell(hpo, must_claim(hpo), 0.6, answers=TaskAnswers.of(100, b"\xff" * 7 + b"\xf0" + bytes(5)))
    tell(hpo, must_claim(hpo), 0.9, answers=TaskAnswers.of(100, b"\xff" * 11 + b"\xc0" + bytes(1)))
    tell(hpo, must_claim(hpo), 0.3, "pruned")
    return study


def test_two_trials_are_shown_side_by_side(viewer: TestClient, hpo: Coordinator) -> None:
    study = two_trials(hpo)
    answer = viewer.get("/compare", params={"study": study, "a": 0, "b": 1})
    assert answer.status_code == 200
    seen = text_of(answer.text)
    assert "Trial 1 is 30.0 points ahead of trial 0 on the same 100 tasks" in seen
    assert "more than noise." in seen
    assert "A: Trial 0 of digits 60.0% 60 of 100 tasks; 95% interval 50.2% to 69.1%" in seen
    assert "A less B −30.0 points; 95% interval −38.5 to −20.4 McNemar's exact test: p below 0.0001" in seen
    assert "A right 60 (60.0%) 0 (0.0%) A wrong 30 (30.0%) 10 (10.0%)" in seen
    assert seen.count("Layer eta mu lambda") == 2


def test_the_page_is_reached_from_the_study_and_from_a_trial(viewer: TestClient, hpo: Coordinator) -> None:
    study = two_trials(hpo)
    listing = viewer.get(f"/studies/{study}/trials").text
    assert 'action="/compare"' in listing
    trial = viewer.get(f"/studies/{study}/trials/0").text
    assert "60 of 100 tasks; 95% interval 50.2% to 69.1%" in text_of(trial)
    assert 'action="/compare"' in trial
    assert 'name="b" type="number" min="0" required value="1"' in trial, "the best one is offered"
    without = viewer.get(f"/studies/{study}/trials/2").text
    assert 'action="/compare"' not in without, "a trial without answers compares with none"


def test_what_cannot_be_compared_is_said_beside_the_form(viewer: TestClient, hpo: Coordinator) -> None:
    study = two_trials(hpo)
    asked = {"study": study, "a": 0, "b": 2}
    refused = viewer.get("/compare", params=asked)
    assert refused.status_code == 409
    seen = text_of(refused.text)
    assert "These cannot be compared Trial 2 of study" in seen
    assert "has no answers to single tasks: its worker told none" in seen
    assert 'id="b" name="b" type="number" min="0" required value="2"' in refused.text
    assert viewer.get("/compare", params=asked | {"b": 0}).status_code == 422
    assert viewer.get("/compare", params=asked | {"b": 99}).status_code == 404
    empty = viewer.get("/compare")
    assert empty.status_code == 200
    assert "These cannot be compared" not in empty.text


def test_a_stranger_is_sent_to_sign_in(app: FastAPI) -> None:
    with browser(app) as stranger:
        answer = stranger.get("/compare", params={"study": 1, "a": 0, "b": 1})
    assert answer.status_code == 303
    assert answer.headers["location"].startswith("/login?next=/compare")
