"""The edge where Whetlab's experiments come in: a name, a description and a list of settings, read into a document.

Nothing of the input is believed: `read` names every fault at once, each with its path (``settings[2].min``). Names are
any text that can be stored and shown; keys that nobody knows are passed over, as the old server did. What comes out is
a study's document, which `hpo.spec` reads once more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hpo.document import BIGGEST, MAX_NAME, SAMPLERS
from hpo.errors import Fault, Invalid
from hpo.experiments import MAX_SIZE, OURS, PLACES
from hpo.space import MAX_INTEGER, show
from hpo.spec import EXTERNAL

MAX_DESCRIPTION = 20_000
_TYPES = {"float": "float", "integer": "integer", "int": "integer", "enum": "enum"}


def read(body: Mapping[str, Any]) -> dict[str, Any]:
    """The document of the study that an experiment asks for.

    Raises:
        Invalid: names every fault.
    """
    faults: list[Fault] = []
    name = text(body, "name", faults, most=MAX_NAME, needed=True)
    description = text(body, "description", faults, most=MAX_DESCRIPTION)
    given = body.get("settings")
    settings: list[dict[str, Any]] = []
    if not isinstance(given, list) or not 2 <= len(given) <= PLACES:
        faults.append(Fault("settings", f"must be a list of 2 to {PLACES} settings, one of them the outcome"))
        given = []
    for place, entry in enumerate(given):
        settings.append(read_setting(entry, f"settings[{place}]", faults))
    faults += _repeated(settings)
    outputs = [setting for setting in settings if setting.get("isOutput")]
    if given and len(outputs) != 1:
        faults.append(Fault("settings", f"exactly one must have isOutput true: it is the outcome; {len(outputs)} have"))
    if faults:
        raise Invalid(faults, "the experiment")
    inputs = [setting for setting in settings if not setting["isOutput"]]
    return {
        "name": name,
        "description": description,
        "workload": EXTERNAL,
        "direction": "maximize",
        "sampler": "auto" if "auto" in SAMPLERS else "tpe",
        "space": [_parameter(setting) for setting in inputs],
        "settings": {
            OURS: {
                "outcome": {key: outputs[0][key] for key in ("name", "units", "min", "max")},
                "units": {setting["name"]: setting["units"] for setting in inputs},
            }
        },
    }


def read_setting(entry: object, at: str, faults: list[Fault]) -> dict[str, Any]:
    """One setting with its defaults; what is wrong with it is added to `faults`."""
    if not isinstance(entry, Mapping):
        faults.append(Fault(at, f"must be an object, not {show(entry)}"))
        return {}
    kind = entry.get("type", "float")
    if not isinstance(kind, str) or kind not in _TYPES:
        faults.append(Fault(f"{at}.type", f"must be float, integer or enum, not {show(kind)}"))
        return {"name": entry.get("name"), "isOutput": bool(entry.get("isOutput"))}
    kind = _TYPES[kind]
    output = entry.get("isOutput", False)
    if not isinstance(output, bool):
        faults.append(Fault(f"{at}.isOutput", f"must be true or false, not {show(output)}"))
        output = False
    setting: dict[str, Any] = {
        "name": text(entry, "name", faults, at=at, most=MAX_NAME, needed=True),
        "type": kind,
        "isOutput": output,
        "size": _size(entry, at, faults, most=1 if output else MAX_SIZE),
        "units": text(entry, "units", faults, at=at, most=MAX_NAME)
        or {"float": "Reals", "integer": "Integers"}.get(kind, ""),
        "scale": entry.get("scale") or "linear",
    }
    if setting["scale"] not in ("linear", "log"):
        faults.append(Fault(f"{at}.scale", f"must be linear or log, not {show(setting['scale'])}"))
    if output:
        if kind == "enum":
            faults.append(Fault(f"{at}.type", "an outcome is a number"))
        setting |= {"type": "float", "min": _or(entry.get("min"), -100.0), "max": _or(entry.get("max"), 100.0)}
    elif kind == "enum":
        setting["options"] = _options(entry, at, faults)
    else:
        _bounds(entry, kind, at, setting, faults)
    return setting


def text(
    body: Mapping[str, Any], key: str, faults: list[Fault], *, at: str = "", most: int, needed: bool = False
) -> str:
    """A text that can be stored and shown as it is; newlines and tabs are its only control characters."""
    value = body.get(key)
    where = f"{at}.{key}" if at else key
    if value is None and not needed:
        return ""
    problem = ""
    if not isinstance(value, str):
        problem = "is missing" if value is None else f"must be text, not {show(value)}"
    elif needed and not value.strip():
        problem = "must not be empty"
    elif len(value) > most:
        problem = f"must have at most {most} characters; this has {len(value)}"
    else:
        problem = unprintable(value)
    if problem:
        faults.append(Fault(where, problem))
        return ""
    assert isinstance(value, str)
    return value


def unprintable(value: str) -> str:
    """Why a text cannot be stored or shown, or nothing."""
    if "\0" in value:
        return "holds a NUL character, which cannot be stored"
    if any((ord(each) < 32 and each not in "\t\r\n") or ord(each) == 127 for each in value):
        return "holds a control character"
    if any("\ud800" <= each <= "\udfff" for each in value):
        return "holds half of a surrogate pair, which is no character"
    return ""


def number(value: object) -> float | None:
    """A finite number as JSON has it, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, int):
        return value if abs(value) <= 10**300 else None
    return value if math.isfinite(value) else None


def _or(value: object, default: float) -> float:
    found = number(value)
    return default if found is None else float(found)


def _size(entry: Mapping[str, Any], at: str, faults: list[Fault], most: int) -> int:
    value = number(entry.get("size") if entry.get("size") is not None else 1)
    if value is None or value != int(value) or not 1 <= value <= most:
        what = "1: it is one number" if most == 1 else f"a whole number from 1 to {most}"
        faults.append(Fault(f"{at}.size", f"must be {what}, not {show(entry.get('size'))}"))
        return 1
    return int(value)


def _options(entry: Mapping[str, Any], at: str, faults: list[Fault]) -> list[str]:
    options = entry.get("options")
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(each, str) for each in options):
        faults.append(Fault(f"{at}.options", "must be a list of at least two strings"))
        return []
    for place, option in enumerate(options):
        if problem := unprintable(option):
            faults.append(Fault(f"{at}.options[{place}]", problem))
    if len(set(options)) != len(options):
        faults.append(Fault(f"{at}.options", "names one option twice"))
    return options


def _bounds(entry: Mapping[str, Any], kind: str, at: str, setting: dict[str, Any], faults: list[Fault]) -> None:
    bounds = []
    for key in ("min", "max"):
        value = number(entry.get(key))
        if value is None:
            verdict = "is missing" if entry.get(key) is None else f"must be a finite number, not {show(entry[key])}"
            faults.append(Fault(f"{at}.{key}", verdict))
            continue
        if abs(value) > BIGGEST:
            faults.append(Fault(f"{at}.{key}", "must lie between -1e32 and 1e32"))
            continue
        if kind == "integer":
            if value != int(value):
                faults.append(Fault(f"{at}.{key}", f"must be an integer, not {show(value)}"))
                continue
            if abs(value) > MAX_INTEGER:
                limit = f"{MAX_INTEGER} (2^53)"
                faults.append(
                    Fault(f"{at}.{key}", f"must lie within plus or minus {limit}: values are stored as doubles")
                )
                continue
            value = int(value)
        bounds.append(value)
    if len(bounds) < 2:
        return
    low, high = bounds
    if not low < high:
        faults.append(Fault(f"{at}.min", f"must be below max; {show(low)} is not below {show(high)}"))
    if setting["scale"] == "log" and low <= 0:
        faults.append(Fault(f"{at}.min", f"must be above 0 on a log scale, not {show(low)}"))
    setting |= {"min": low, "max": high}


def _repeated(settings: list[dict[str, Any]]) -> list[Fault]:
    first: dict[Any, int] = {}
    faults = []
    for place, setting in enumerate(settings):
        name = setting.get("name")
        if name and isinstance(name, str) and first.setdefault(name, place) != place:
            faults.append(Fault(f"settings[{place}].name", f"is the name of settings[{first[name]}] already"))
    return faults


def _parameter(setting: Mapping[str, Any]) -> dict[str, Any]:
    """A setting as a study's document declares it."""
    entry: dict[str, Any] = {"name": setting["name"]}
    if setting["type"] == "enum":
        entry |= {"type": "categorical", "choices": setting["options"]}
    else:
        cast = int if setting["type"] == "integer" else float
        entry |= {"type": setting["type"], "low": cast(setting["min"]), "high": cast(setting["max"])}
        if setting["scale"] == "log":
            entry["log"] = True
    if setting["size"] > 1:
        entry["labels"] = [str(place) for place in range(setting["size"])]
    return entry
