"""Per-task answers against a real PostgreSQL: told with the outcome by whoever holds the lease, and compared."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient

from hpo.answers import FROZEN
from hpo.coordinator import Coordinator
from hpo.errors import Conflict, Invalid, LeaseLost, NotFound
from hpo.protocol import TaskAnswers
from model import settings
from model.spec import SiameseWorkload
from tests.integration.api_server import BRANIN, bearer, make_app
from tests.integration.leases_harness import (
    MALLORY,
    ask,
    coordinator,
    must_claim,
    point,
    release,
    study,
    tell,
)
from tests.integration.pages.app import SIAMESE


def answers(right: str) -> TaskAnswers:
    """Answers from a picture of them: "1101"."""
    return TaskAnswers.of(len(right), np.packbits([mark == "1" for mark in right]).tobytes())


def rows(engine: sa.Engine) -> int:
    with engine.connect() as conn:
        found: int = conn.execute(sa.text("SELECT count(*) FROM whetstone.answers")).scalar_one()
        return found


def told(desk: Coordinator, *rights: str) -> int:
    """A study with one complete trial for each picture of answers."""
    made = desk.create_study(study()).study
    for right in rights:
        tell(desk, must_claim(desk), right.count("1") / len(right), answers=answers(right))
    return made


def siamese(desk: Coordinator, name: str, right: str, **settings: Any) -> int:
    """A study of the Siamese network with one complete trial."""
    frozen = {"net": "mini", "data": "omniglot", "validation_tasks": 4}
    made = desk.create_study(SIAMESE | {"name": name, "settings": frozen | settings, "budget": {"trials": 1}}).study
    tell(desk, must_claim(desk), answers=answers(right))
    return made


@pytest.fixture
def client(engine: sa.Engine, tmp_path: Path) -> Iterator[TestClient]:
    with TestClient(make_app(engine, tmp_path / "artifacts"), headers=bearer("admin")) as made:
        made.base_url = made.base_url.join("/api/v1/")
        yield made


# Storing


def test_answers_come_back_as_they_were_told_with_the_score(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = told(desk, "1101000011")
    found = desk.get_answers(made, 0)
    assert found.answers == answers("1101000011")
    assert (found.score.tasks, found.score.correct, found.score.accuracy) == (10, 5, 0.5)
    assert found.score.low < 0.5 < found.score.high
    assert desk.get_trial(made, 0).score == found.score
    exported = desk.export(made)["trials"][0]
    assert exported["answers"] == {"tasks": 10, "right": base64.b64encode(bytes([0b11010000, 0b11000000])).decode()}


def test_a_pruned_trial_keeps_its_answers_and_others_have_none(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study()).study
    tell(desk, must_claim(desk), 0.5, "pruned", answers=answers("10"))
    assert desk.get_answers(made, 0).score.correct == 1
    for outcome, value in (("infeasible", 0.05), ("failed", None)):
        lease = must_claim(desk)
        with pytest.raises(Invalid) as error:
            tell(desk, lease, value, outcome, answers=answers("10"))
        assert [fault.at for fault in error.value.faults] == ["answers"]
        assert desk.get_trial(made, lease.trial).state == "leased", "nothing was stored"
        tell(desk, lease, value, outcome)
    assert rows(engine) == 1


def test_the_same_tell_again_has_the_same_answers_and_another_changes_nothing(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study()).study
    lease = must_claim(desk)
    first = tell(desk, lease, 0.5, answers=answers("10"))
    assert tell(desk, lease, 0.5, answers=answers("10")) == first
    for other in (answers("01"), None):
        with pytest.raises(Conflict):
            tell(desk, lease, 0.5, answers=other)
    assert desk.get_answers(made, 0).answers == answers("10")


def test_answers_of_a_lease_that_is_over_change_nothing(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study()).study
    late = must_claim(desk)
    release(desk, late)
    again = must_claim(desk)
    for lease, who in ((late, {}), (again, {"who": MALLORY})):
        with pytest.raises(LeaseLost):
            tell(desk, lease, 0.9, answers=answers("11"), **who)
    assert rows(engine) == 0
    tell(desk, again, 0.5, answers=answers("10"))
    assert desk.get_answers(made, 0).answers == answers("10")


def test_a_tell_without_answers_is_taken_as_ever(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study()).study
    assert tell(desk, must_claim(desk), 0.5).state == "complete"
    assert desk.get_trial(made, 0).score is None
    assert desk.export(made)["trials"][0]["answers"] is None


def test_answers_go_with_their_study(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = told(desk, "10", "11")
    assert rows(engine) == 2
    desk.patch_study(made, {"state": "stopped"})
    desk.delete_study(made)
    assert rows(engine) == 0


def test_a_requeued_point_begins_without_answers(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study()).study
    tell(desk, must_claim(desk), 0.5, "pruned", answers=answers("10"))
    again = desk.requeue_trial(made, 0).trial
    with pytest.raises(NotFound, match="it is not finished"):
        desk.get_answers(made, again)
    assert desk.get_answers(made, 0).answers == answers("10")


# Comparing


def test_two_trials_are_compared_task_by_task(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = told(desk, "1110000000", "1100000001")
    found = desk.compare(made, 0, 1)
    assert (found.both, found.only_a, found.only_b, found.neither, found.tasks) == (2, 1, 1, 6, 10)
    assert (found.difference, found.p_value, found.more_than_noise) == (0.0, 1.0, False)
    assert (found.a.score.correct, found.b.score.correct) == (3, 3)


def test_a_clear_difference_is_called_more_than_noise(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = told(desk, "1" * 60 + "0" * 40, "1" * 90 + "0" * 10)
    found = desk.compare(made, 0, 1)
    assert found.difference == pytest.approx(-0.3)
    assert found.low < -0.3 < found.high < 0
    assert found.more_than_noise
    assert found.verdict.startswith("Trial 1 is 30.0 points ahead of trial 0 on the same 100 tasks")
    turned = desk.compare(made, 1, 0)
    assert (turned.difference, turned.p_value) == (-found.difference, found.p_value)


def test_trials_of_two_studies_compare_where_their_tasks_are_the_same(engine: sa.Engine) -> None:
    desk = coordinator(engine, siamese=SiameseWorkload())
    first, second = siamese(desk, "one", "1110"), siamese(desk, "two", "1000", epochs=9)
    found = desk.compare(first, 0, 0, second)
    assert (found.only_a, found.b.study_name) == (2, "two")
    assert f"trial 0 of study {second}" in found.verdict
    others = {"validation_seed": 5, "way": 5, "validation_tasks": 5}
    for name, value in others.items():
        with pytest.raises(Conflict, match=f"their settings differ in {name}"):
            desk.compare(first, 0, 0, siamese(desk, name, "1000", **{name: value}))
    auto = [siamese(desk, f"auto{turn}", "1000", data="auto") for turn in range(2)]
    with pytest.raises(Conflict, match="leave their data to their workers"):
        desk.compare(auto[0], 0, 0, auto[1])


def test_the_settings_that_freeze_the_tasks_are_those_of_the_workload() -> None:
    assert set(FROZEN) == settings.FROZEN


def test_what_cannot_be_compared_is_refused_with_the_reason(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = told(desk, "1110")
    tell(desk, must_claim(desk), 0.5)
    tell(desk, must_claim(desk), None, "failed", reason="boom")
    tell(desk, must_claim(desk), 0.5, answers=answers("11100"))
    must_claim(desk)
    desk.add_trial(made, {"params": point(0.5), "value": 0.1})
    reasons = {
        1: "its worker told none",
        2: "it is failed",
        3: "answered 4 and 5 tasks",
        4: "it is not finished",
        5: "its value was recorded",
    }
    for number, reason in reasons.items():
        for pair in ((0, number), (number, 0)):
            with pytest.raises(Conflict, match=reason.replace("4 and 5", "[45] and [45]")):
                desk.compare(made, *pair)
    with pytest.raises(NotFound, match="no trial 99"):
        desk.compare(made, 0, 99)
    with pytest.raises(Invalid):
        desk.compare(made, 0, 0)
    outside = desk.create_study(study("asked", workload="external", settings={})).study
    tell(desk, ask(desk, outside, "w2"), 0.5, answers=answers("1110"))
    with pytest.raises(Conflict, match="workload siamese"):
        desk.compare(made, 0, 0, outside)


# Over HTTP


def test_answers_travel_over_the_wire(client: TestClient) -> None:
    number = client.post("studies", json=BRANIN).json()["study"]
    for bits in (0b11100000, 0b10000000):
        lease = client.post("claims", json={"worker": "w1"}).json()
        right = base64.b64encode(bytes([bits])).decode()
        body = {"token": lease["token"], "outcome": "complete", "value": 0.5, "answers": {"tasks": 4, "right": right}}
        assert client.post(f"leases/{lease['lease']}/tell", json=body).status_code == 200
    kept = client.get(f"studies/{number}/trials/0/answers").json()
    assert kept["answers"] == {"tasks": 4, "right": "4A=="}
    assert kept["score"]["correct"] == 3
    found = client.get(f"studies/{number}/compare", params={"a": 0, "b": 1}).json()
    assert (found["both"], found["only_a"], found["only_b"], found["neither"]) == (1, 2, 0, 1)
    assert client.get(f"studies/{number}/compare", params={"a": 0}).status_code == 422
    refused = client.get(f"studies/{number}/compare", params={"a": 0, "b": 0}).json()["error"]
    assert refused["details"][0]["at"] == "b"
    assert client.get(f"studies/{number}/trials/7/answers").status_code == 404


@pytest.mark.parametrize(
    ("sent", "at", "fault"),
    [
        ({"tasks": 4, "right": "4A"}, "answers.right", "is not base64"),
        ({"tasks": 4, "right": "4A\u00e9="}, "answers.right", "is not base64"),
        ({"tasks": 9, "right": "4A=="}, "answers.right", "must hold one bit a task: 2 bytes, not 1"),
        ({"tasks": 4, "right": ""}, "answers.right", "must hold one bit a task: 1 bytes, not 0"),
        ({"tasks": 2, "right": "4A=="}, "answers.right", "must be zero in the bits after the last task"),
        ({"tasks": 0, "right": ""}, "answers.tasks", "greater than or equal to 1"),
        ({"tasks": 1_000_001, "right": "4A=="}, "answers.tasks", "less than or equal to 1000000"),
        ({"tasks": 4}, "answers.right", "required"),
        ({"tasks": 4, "right": "4A==", "wrong": 1}, "answers.wrong", "no such field"),
    ],
)
def test_malformed_answers_are_refused_by_their_field_and_nothing_is_stored(
    client: TestClient, engine: sa.Engine, sent: dict[str, Any], at: str, fault: str
) -> None:
    number = client.post("studies", json=BRANIN).json()["study"]
    lease = client.post("claims", json={"worker": "w1"}).json()
    body = {"token": lease["token"], "outcome": "complete", "value": 0.5, "answers": sent}
    refused = client.post(f"leases/{lease['lease']}/tell", json=body)
    assert refused.status_code == 422
    (named,) = refused.json()["error"]["details"]
    assert named["at"] == at
    assert fault in named["fault"]
    assert client.get(f"studies/{number}/trials/0").json()["state"] == "leased"
    assert rows(engine) == 0


def test_a_million_answers_fit_in_one_tell(client: TestClient) -> None:
    number = client.post("studies", json=BRANIN).json()["study"]
    lease = client.post("claims", json={"worker": "w1"}).json()
    right = base64.b64encode(b"\xff" * 125_000).decode()
    body = {"token": lease["token"], "outcome": "complete", "value": 1, "answers": {"tasks": 10**6, "right": right}}
    assert client.post(f"leases/{lease['lease']}/tell", json=body).status_code == 200
    assert client.get(f"studies/{number}/trials/0").json()["score"]["correct"] == 10**6
