"""A file of hyperparameters for one network, as `whetstone train FILE` takes it.

    params: {eta: 0.1, mu: {conv1: 0.5, conv2: 0.9, ...}, lambda: 0.0001}
    settings: {net: mini, epochs: 20}
    seed: 0

Promise: every fault of the file is named in one go, with its place; YAML is read by a safe loader, to which 1e-4 is a
number (YAML 1.1 takes it for text) and a key that stands twice a fault rather than a riddle.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from model.spec import Fault, Refused, config
from model.values import key_path, suggestion

_LARGEST = 2**20
_KEYS = ("params", "settings", "seed")


class _Loader(yaml.SafeLoader):
    """The safe loader, which refuses duplicate keys and knows numbers without a point."""


def _unique(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key_path(key.value)} stands twice", problem_mark=key.start_mark)
            seen.add(key.value)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def load_recipe(path: Path | str) -> tuple[dict[str, Any], dict[str, Any], int]:
    """(params, settings, seed) from a YAML or JSON file, checked: `model.spec.config` takes them.

    The seed is 0 where the file names none. Raises `Refused` with every fault; a file that cannot be read is one.
    """
    path = Path(path)
    document = _read(path)
    faults = [
        Fault(key_path(key), f"is unknown here (there are {', '.join(_KEYS)})" + suggestion(key, _KEYS))
        for key in document
        if key not in _KEYS
    ]
    faults += [Fault(key, "is missing") for key in ("params", "settings") if key not in document]
    params, settings, seed = document.get("params", {}), document.get("settings", {}), document.get("seed", 0)
    try:
        config(params, settings, seed)
    except Refused as refused:
        absent = {fault.at for fault in faults}
        if not absent & {"params", "settings"}:  # what is missing there would be named a second time
            faults += refused.faults
    if faults:
        raise Refused(faults)
    return params, settings, seed


def _read(path: Path) -> dict[Any, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
    except OSError as fault:
        raise Refused([Fault(str(path), f"cannot be read: {fault.strerror}")]) from fault
    if len(data) > _LARGEST:
        raise Refused([Fault(str(path), "is larger than 1 MB; a recipe is a few lines")])
    try:
        document = yaml.load(data, Loader=_Loader)  # noqa: S506 - a subclass of SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as fault:
        first = " ".join(str(fault).split()) if isinstance(fault, yaml.MarkedYAMLError) else "not YAML"
        raise Refused([Fault(str(path), f"is not readable as YAML: {first}")]) from fault
    if not isinstance(document, dict):
        raise Refused([Fault(str(path), "must hold params, settings and, if you like, a seed")])
    return document
