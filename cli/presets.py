"""The studies that come with Whetstone: one YAML file each in `presets/`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import yaml


@cache
def _read() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(files("presets").iterdir(), key=lambda f: f.name):
        if file.name.endswith(".yaml"):
            found[file.name.removesuffix(".yaml")] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return found


def load_all() -> dict[str, dict[str, Any]]:
    """Every preset's document by name."""
    return copy.deepcopy(_read())


def names() -> list[str]:
    return list(_read())


def merge(document: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The document with the overrides laid over it: mappings merge, everything else is replaced."""
    merged = dict(document)
    for key, value in overrides.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged
