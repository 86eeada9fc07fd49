"""The studies that come with Whetstone: one YAML file each in `presets/`.

A preset's first point is what its source published, so a study begins with it and `whetstone train NAME` trains it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from hpo.errors import Fault, Invalid


@cache
def _read() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(files("presets").iterdir(), key=lambda f: f.name.removesuffix(".yaml")):
        if file.name.endswith(".yaml"):
            found[file.name.removesuffix(".yaml")] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return found


def load_all() -> dict[str, dict[str, Any]]:
    """Every preset's document by name."""
    return copy.deepcopy(_read())


def names() -> list[str]:
    return list(_read())


def recipe(name: str, document: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(params, settings) of a study's first point, with what is `given` by name laid over them.

    Raises `Invalid` where a parameter of its space has no value: there is no point, or it leaves that one open.
    """
    params = dict(next(iter(document.get("points") or []), {}))
    searched = [parameter["name"] for parameter in document["space"]]
    open_ones = [parameter for parameter in searched if parameter not in params and parameter not in given]
    if open_ones:
        start = {"eta": "0.1", "mu": "0.9", "lambda": "0"}  # from which the networks that come along learn
        values = " ".join(f"--set {parameter}={start.get(parameter, 'VALUE')}" for parameter in open_ones)
        what = f"is a search without a point to train, which leaves {', '.join(open_ones)} open: run it as a study"
        raise Invalid(
            [Fault(name, f"{what} (`whetstone study launch --preset {name}`), or choose a point, as {values}")],
            "the preset",
        )
    return lay(params, document.get("settings", {}), given)


def lay(
    params: Mapping[str, Any], settings: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(params, settings) with the given ones instead, each where it stands already; rates belong to the params.

    A value for some layers only, {"eta": {"conv1": 0.1}}, keeps the one that the others have.
    """
    from model.settings import HYPERPARAMETERS, Rest

    params, settings = dict(params), dict(settings)
    for name, value in given.items():
        place = params if name in params or (name in HYPERPARAMETERS and name not in settings) else settings
        old = place.get(name)
        if isinstance(value, Mapping) and isinstance(old, int | float):
            place[name] = Rest(old, value)
        else:
            place[name] = merge({name: old}, {name: value})[name]
    return params, settings


def merge(document: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The document with the overrides laid over it: mappings merge, everything else is replaced."""
    merged = dict(document)
    for key, value in overrides.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged
