"""`--set KEY=VALUE` on the command line: dotted paths and YAML values, read into nested overrides of a document.

Promise: whatever is typed, the answer is the overrides or one `Invalid` that names every fault.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hpo import yaml_document
from hpo.errors import Fault, Invalid


def assign(pairs: Iterable[str], example: str = "settings.epochs=5") -> dict[str, Any]:
    """Nested overrides from KEY.PATH=VALUE: {"settings": {"epochs": 5}}. Raises `Invalid`."""
    overrides: dict[str, Any] = {}
    faults: list[Fault] = []
    for pair in pairs:
        try:
            _assign(overrides, pair, example)
        except Invalid as error:
            faults += error.faults
    if faults:
        raise Invalid(faults, "--set")
    return overrides


def _assign(overrides: dict[str, Any], pair: str, example: str) -> None:
    path, found, text = pair.partition("=")
    if not found or not all(path.split(".")):
        raise Invalid([Fault(pair, f"write --set KEY=VALUE, such as --set {example}")], "--set")
    value = yaml_document.parse(text, path, "--set")
    place = overrides
    *parents, last = path.split(".")
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise Invalid([Fault(path, f"{parent} was set to one value before")], "--set")
    place[last] = value
