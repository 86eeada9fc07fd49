"""What people change on the pages: launches, budgets, fixed parameters, queues, and what they typed wrongly."""

from __future__ import annotations

import re
from html import unescape

import pytest
from starlette.testclient import TestClient

from hpo import yaml_document
from hpo.coordinator import Coordinator
from hpo.protocol import ClaimRequest
from tests.integration.pages.app import EXTERNAL, SIAMESE, WORKER, form, text_of, trained


def test_the_form_launches_a_study(admin: TestClient, hpo: Coordinator) -> None:
    start = admin.get("/studies/new?preset=mini")
    document = unescape(re.search(r'<textarea id="document"[^>]*>(.*?)</textarea>', start.text, re.S)[1])  # type: ignore[index]
    sent = form(document=document, name="my sweep", trials="7", hours="0,5", sampler="random", notes="a\r\nb")
    answer = admin.post("/studies/new", data=sent)
    assert answer.status_code == 303, text_of(answer.text)
    study = hpo.get_study(int(answer.headers["location"].rsplit("/", 1)[1]))
    assert study.name == "my sweep"
    assert (study.budget.trials, study.budget.hours, study.sampler, study.notes) == (7, 0.5, "random", "a\nb")
    assert study.spec["settings"]["net"] == "mini", "what the form does not name stays as the document has it"


def test_a_name_that_is_taken_is_not_offered_again(admin: TestClient, hpo: Coordinator) -> None:
    hpo.create_study({**SIAMESE, "name": "mini"})
    assert 'value="mini-2"' in admin.get("/studies/new?preset=mini").text


def test_a_refused_study_names_every_fault_and_keeps_what_was_typed(admin: TestClient, hpo: Coordinator) -> None:
    document = "name: x\nworkload: external\nspace: [{name: x, type: float, low: 3, high: 1e-1}]\ncolour: red"
    answer = admin.post("/studies/new", data=form(document=document, trials="-3", sampler="tpe", notes="keep <me>"))
    assert answer.status_code == 422
    seen = text_of(answer.text)
    assert "colour is not known here" in seen
    assert "space[0]" in seen
    assert "budget.trials" in seen
    assert document in unescape(answer.text)
    assert 'value="-3"' in answer.text
    assert "keep &lt;me&gt;" in answer.text
    assert re.search(r'id="trials"[^>]*aria-invalid="true"', answer.text)
    assert hpo.list_studies().items == []


@pytest.mark.parametrize(
    "document",
    [
        "",
        "- a\n- b",
        "a: &x [1]\nb: *x",
        "name: a\nname: b",
        "[" * 100_000,
        "a: !!python/object/apply:os.system ['true']",
        "{" + '"a":' * 40 + "1" + "}" * 40,
        "name: \0",
        "a: " + "9" * 10_000,
        "x" * 300_000,
    ],
)
def test_a_document_that_cannot_be_read_is_refused_with_a_reason(admin: TestClient, document: str) -> None:
    answer = admin.post("/studies/new", data=form(document=document))
    assert answer.status_code == 422
    assert 'role="alert"' in answer.text


def test_a_taken_name_is_a_fault_of_the_form(admin: TestClient, hpo: Coordinator) -> None:
    hpo.create_study(EXTERNAL)
    document = "name: mine\nworkload: external\nspace: [{name: x, type: float, low: 0, high: 1}]"
    answer = admin.post("/studies/new", data=form(document=document))
    assert answer.status_code == 409
    assert document in unescape(answer.text)
    assert re.search(r'id="name"[^>]*aria-invalid="true"', answer.text)


def test_pause_resume_and_stop(admin: TestClient, hpo: Coordinator) -> None:
    study = hpo.create_study(EXTERNAL).study
    for state in ("paused", "running", "stopped"):
        answer = admin.post(f"/studies/{study}/state", data={"state": state})
        assert answer.headers["location"] == f"/studies/{study}"
        assert hpo.get_study(study).state == state
    answer = admin.post(f"/studies/{study}/state", data={"state": "paused"})
    assert answer.status_code == 409
    assert "text/html" in answer.headers["content-type"]


def test_a_study_is_deleted_only_under_its_name(admin: TestClient, hpo: Coordinator) -> None:
    study = hpo.create_study(EXTERNAL).study
    assert admin.post(f"/studies/{study}/delete", data={"confirm": "Mine"}).status_code == 422
    assert hpo.get_study(study).name == "mine"
    assert admin.post(f"/studies/{study}/delete", data={"confirm": "mine"}).status_code == 303
    assert admin.get(f"/studies/{study}").status_code == 404


def test_budget_concurrency_and_notes_change_while_it_runs(admin: TestClient, hpo: Coordinator) -> None:
    study = hpo.create_study({**EXTERNAL, "budget": {"trials": 9, "target": 0.5}}).study
    sent = {"trials": "20", "hours": "", "target": "", "concurrency": "2", "notes": "longer"}
    assert admin.post(f"/studies/{study}/change", data=sent).status_code == 303
    view = hpo.get_study(study)
    assert (view.budget.trials, view.budget.target, view.concurrency, view.notes) == (20, None, 2, "longer")
    refused = admin.post(f"/studies/{study}/change", data={**sent, "trials": "many", "concurrency": "0"})
    assert refused.status_code == 422
    assert 'value="many"' in refused.text
    assert hpo.get_study(study).budget.trials == 20


def test_a_study_is_seeded_in_the_form_and_says_from_where(admin: TestClient, hpo: Coordinator) -> None:
    first, number = hpo.create_study(SIAMESE).study, trained(hpo)[1]
    text = yaml_document.write(SIAMESE | {"name": "heir"})
    admin.post("/studies/new", data=form(document=text, seed_from=str(first)))
    made = hpo.list_studies(name="heir").items[0].study
    seen = text_of(admin.get(f"/studies/{made}").text)
    assert "Seeded digits : 1 finished trial, recorded with their values" in seen
    assert f"It comes from study {first}" in seen
    assert f"trial {number} of study {first}" in text_of(admin.get(f"/studies/{made}/trials/0").text)
    assert f"of study {first}" in text_of(admin.get(f"/studies/{made}/trials").text)
    other = {**SIAMESE, "name": "pupil", "settings": SIAMESE["settings"] | {"epochs": 7}, "seed_from": "digits"}
    admin.post("/studies/new", data=form(document=yaml_document.write(other)))
    made = hpo.list_studies(name="pupil").items[0].study
    assert "because its settings differ in epochs" in text_of(admin.get(f"/studies/{made}").text)
    refused = admin.post("/studies/new", data=form(document=text, name="orphan", seed_from="nobody"))
    assert refused.status_code == 422
    assert "there is no study of this name" in refused.text
    assert 'value="nobody"' in refused.text, "what was typed is kept"


def test_parameters_are_fixed_and_released_in_a_form(admin: TestClient, hpo: Coordinator) -> None:
    made = hpo.create_study(SIAMESE)
    at = f"/studies/{made.study}"
    name = made.spec["space"][0]["name"]
    labels = made.spec["space"][0]["labels"]
    admin.post(f"{at}/fixed", data={"fixed": f"{name}: 0.01"})
    assert hpo.get_study(made.study).fixed == {name: dict.fromkeys(labels, 0.01)}
    assert "Fixed hyperparameters" in admin.get(at).text
    assert f"{labels[0]}: 0.01" in admin.get(f"{at}/config").text
    admin.post(f"{at}/fixed", data={"fixed": f"{name}: {{{labels[0]}: 0.02}}"})
    assert hpo.get_study(made.study).fixed == {name: {labels[0]: 0.02}}, "what is taken out of the form is released"
    refused = admin.post(f"{at}/fixed", data={"fixed": f"{name}: often"})
    assert refused.status_code == 422
    assert "must be a number" in refused.text
    assert f"{name}: often" in refused.text, "what was typed is kept"
    admin.post(f"{at}/fixed", data={"fixed": " "})
    assert hpo.get_study(made.study).fixed == {}


def test_a_name_or_a_source_that_only_the_database_knows_is_named_with_the_other_faults(
    admin: TestClient, hpo: Coordinator
) -> None:
    hpo.create_study(EXTERNAL)
    document = yaml_document.write(EXTERNAL)
    for more, fields in (
        ({"trials": "-3", "hours": "x"}, ["name", "trials", "hours"]),
        ({"trials": "-3", "seed_from": "nobody"}, ["name", "trials", "seed_from"]),
        ({"seed_from": "nobody"}, ["name", "seed_from"]),
        ({"name": "free", "target": "x", "seed_from": "7"}, ["target", "seed_from"]),
        ({"name": "a/b", "seed_from": "mine"}, ["name", "seed_from"]),
    ):
        answer = admin.post("/studies/new", data=form(document=document, **more))
        assert answer.status_code == 422
        assert re.findall(r'id="(\w+)"[^>]*aria-invalid="true"', answer.text) == fields
        assert len(re.findall(r"<li><code>", answer.text)) == len(fields)
    assert [study.name for study in hpo.list_studies().items] == ["mine"]


def test_a_studys_document_is_shown_as_it_stands_and_can_be_launched_again(admin: TestClient, hpo: Coordinator) -> None:
    study = hpo.create_study(SIAMESE).study
    now = hpo.patch_study(study, {"fixed": {"mu": 0.5}, "budget": {"trials": 9}, "notes": "wider"})
    page = admin.get(f"/studies/{study}/config").text
    assert "As launched" not in text_of(page)
    assert "budget, concurrency, notes and fixed hyperparameters: those are as they are now" in text_of(page)
    shown = unescape(page.rpartition("<pre")[2].partition("<code>")[2].partition("</code>")[0])
    assert yaml_document.read(shown) == now.spec
    assert re.findall(r"^(\w+):", shown, re.MULTILINE)[:4] == ["name", "description", "notes", "workload"]
    assert admin.post("/studies/new", data=form(document=shown, name="again")).status_code == 303
    again = hpo.list_studies(name="again").items[0]
    assert (again.fixed, again.budget.trials, again.notes) == (now.fixed, 9, "wider")


def test_a_point_of_ones_own_is_queued_and_a_wrong_one_kept_for_correction(admin: TestClient, hpo: Coordinator) -> None:
    study = hpo.create_study(SIAMESE).study
    page = admin.get(f"/studies/{study}/queue").text
    example = unescape(re.search(r'<textarea id="params"[^>]*>(.*?)</textarea>', page, re.S)[1])  # type: ignore[index]
    assert admin.post(f"/studies/{study}/trials", data={"params": example}).status_code == 303
    assert [trial.state for trial in hpo.list_trials(study).items] == ["queued"]
    assert "a point of one's own" in text_of(admin.get(f"/studies/{study}/queue").text)
    wrong = "eta: {conv1: 7, conv2: 0.1}\nnu: 3"
    refused = admin.post(f"/studies/{study}/trials", data={"params": wrong})
    assert refused.status_code == 422
    assert wrong in unescape(refused.text)
    assert "nu" in text_of(refused.text)
    assert len(hpo.list_trials(study).items) == 1


def test_a_trial_is_cancelled_and_its_point_queued_again(admin: TestClient, hpo: Coordinator) -> None:
    study = hpo.create_study(EXTERNAL).study
    n = hpo.add_trial(study, {"params": {"x": 0.5}}).trial
    answer = admin.post(f"/studies/{study}/trials/{n}/cancel")
    assert answer.headers["location"] == f"/studies/{study}/trials/{n}"
    assert hpo.get_trial(study, n).state == "cancelled"
    answer = admin.post(f"/studies/{study}/trials/{n}/requeue")
    again = int(answer.headers["location"].rsplit("/", 1)[1])
    assert again != n
    assert (hpo.get_trial(study, again).state, hpo.get_trial(study, again).params) == ("queued", {"x": 0.5})


def test_a_worker_is_drained(admin: TestClient, hpo: Coordinator) -> None:
    hpo.create_study(SIAMESE)
    assert hpo.claim(ClaimRequest(worker="gpu-0@lab", device="cuda:0"), WORKER) is not None
    page = admin.get("/workers").text
    assert "busy" in text_of(page)
    action = re.search(r'action="(/workers/[^"]+/drain)"', page)
    assert action is not None
    assert admin.post(action[1]).status_code == 303
    page = admin.get("/workers").text
    assert "draining" in text_of(page)
    assert "gets no other" in page
    assert "exits" not in page, "it stays, idle"
