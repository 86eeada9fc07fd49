"""What an old script does through Whetlab's protocol: the calls of its clients, written from the protocol's page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.testclient import TestClient

FLOAT: dict[str, Any] = {"name": "x", "type": "float", "min": 0, "max": 10.0, "size": 1, "isOutput": False}
WHOLE: dict[str, Any] = {"name": "n", "type": "integer", "min": 0, "max": 10, "size": 1, "isOutput": False}
ENUM: dict[str, Any] = {"name": "kind", "type": "enum", "options": ["one", "two", "three"], "size": 1}
OUTCOME: dict[str, Any] = {"name": "Negative loss", "type": "float", "min": -100.0, "max": 100.0, "isOutput": True}
SYSTEM = {"sys_info": ["Linux", "box"], "load_info": [0.1, 0.2, 0.3]}


class Script:
    """One running script, resumed by its experiment's name as the clients do it."""

    def __init__(self, client: TestClient, name: str = "Braninhoo", settings: Sequence[Mapping[str, Any]] = ()) -> None:
        self.client = client
        found = [each for each in self.list("experiments/") if each["name"] == name]
        if found:
            self.id = int(found[0]["id"])
        else:
            asked = [*(settings or (FLOAT, WHOLE)), OUTCOME]
            body = {"name": name, "description": "of a script", "settings": asked, **SYSTEM}
            answer = client.post("/api/alpha/experiments/", json=body)
            assert answer.status_code == 201, answer.text
            self.id = int(answer.json()["id"])
        self.settings = {each["name"]: each for each in self.list(f"settings/?experiment={self.id}&page_size=1000000")}
        [self.outcome] = [name for name, each in self.settings.items() if each["isOutput"]]

    def list(self, path: str) -> list[dict[str, Any]]:
        answer = self.client.get(f"/api/alpha/{path}")
        assert answer.status_code == 200, answer.text
        return list(answer.json()["results"])

    def suggest(self) -> tuple[int, dict[str, Any]]:
        """A new result's id and point."""
        answer = self.client.post(f"/api/alpha/experiments/{self.id}/suggest/", json=SYSTEM)
        assert answer.status_code == 201, answer.text
        return int(answer.json()["id"]), self.point(self.result(answer.json()["id"]))

    def result(self, result: int) -> dict[str, Any]:
        answer = self.client.get(f"/api/alpha/results/{result}/")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def point(self, result: Mapping[str, Any]) -> dict[str, Any]:
        return {each["name"]: each["value"] for each in result["variables"] if each["name"] != self.outcome}

    def outcome_of(self, result: Mapping[str, Any]) -> Any:
        return next(each["value"] for each in result["variables"] if each["name"] == self.outcome)

    def update(self, result: int, outcome: Any) -> None:
        """As the clients do it: the result is read, its outcome changed, and all of it sent back."""
        whole = self.result(result)
        for variable in whole["variables"]:
            if variable["name"] == self.outcome:
                variable["value"] = outcome
        answer = self.client.patch(f"/api/alpha/results/{result}/", content=dumps({**whole, **SYSTEM}))
        assert answer.status_code == 200, answer.text

    def add(self, point: Mapping[str, Any], outcome: Any = None) -> int:
        """A result of the script's own; without an outcome the variable is left out."""
        named = {**point, **({} if outcome is None else {self.outcome: outcome})}
        variables = [
            {"setting": self.settings[name]["id"], "result": None, "name": name, "value": value}
            for name, value in named.items()
        ]
        body = {"variables": variables, "experiment": self.id, "userProposed": True, "description": "of a script"}
        answer = self.client.post("/api/alpha/results/", content=dumps({**body, **SYSTEM}))
        assert answer.status_code == 201, answer.text
        return int(answer.json()["id"])

    def cancel(self, result: int) -> None:
        answer = self.client.delete(f"/api/alpha/results/{result}/")
        assert answer.status_code == 204, answer.text

    def results(self) -> dict[int, Any]:
        """Outcomes by result, pending ones as None."""
        found = self.list(f"results?experiment={self.id}&page_size=1000000")
        return {each["id"]: self.outcome_of(each) for each in found}

    def best(self) -> int:
        """The result with the highest outcome, as the clients find it."""
        outcomes = {result: -math.inf if value is None else float(value) for result, value in self.results().items()}
        return max(outcomes, key=lambda result: outcomes[result] if math.isfinite(outcomes[result]) else -math.inf)


def dumps(body: Mapping[str, Any]) -> bytes:
    """As Python 2 wrote JSON: NaN and infinities stand bare."""
    import json

    return json.dumps(body).encode()
