"""Faults, and the kinds of value a setting may have: what JSON or YAML gave us, checked before anybody relies on it.

A `Kind` takes any object and returns (value, "") or (None, fault). It never raises, whatever it is given, and never
repeats what it was given: an integer of a million digits or a lone surrogate must not travel on inside a message.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Kind = Callable[[Any], tuple[Any, str]]
_PLAIN = re.compile(r"[A-Za-z0-9_.\-\[\]]{1,64}")


@dataclass(frozen=True, order=True)
class Fault:
    """One thing wrong with a document: `at` is a path into it (``net.conv[1].kernel``), `fault` a sentence."""

    at: str
    fault: str

    def __str__(self) -> str:
        return f"{self.at}: {self.fault}" if self.at else self.fault


def key_path(key: object) -> str:
    """A key as it may stand in a message: itself where it is a plain name, else only what kind of thing it is."""
    return key if isinstance(key, str) and _PLAIN.fullmatch(key) else "(a key that is no plain name)"


def suggestion(key: object, known: Iterable[str]) -> str:
    """ "; did you mean ...?" where a known name is near, else nothing."""
    near = difflib.get_close_matches(key, list(known), n=1) if isinstance(key, str) and len(key) <= 64 else []
    return f"; did you mean {near[0]}?" if near else ""


def show_type(value: object) -> str:
    """The kind of a JSON value, in words."""
    if isinstance(value, bool):
        return "true or false"
    names = {int: "an integer", float: "a number", str: "text", list: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")


def number(*, low: float | None = None, above: float | None = None, high: float | None = None) -> Kind:
    """A finite number, at least `low` or greater than `above`, at most `high`."""
    bounds = [f"at least {low:g}"] if low is not None else [f"greater than {above:g}"] if above is not None else []
    bounds += [f"at most {high:g}"] if high is not None else []
    rule = f"must be a number, {' and '.join(bounds)}" if bounds else "must be a number"

    def kind(value: Any) -> tuple[Any, str]:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None, f"{rule}, not {show_type(value)}{_text_number(value)}"
        try:
            real = float(value)
        except OverflowError:
            return None, f"{rule}; it is too large"
        if not math.isfinite(real):
            return None, f"{rule}, not NaN or infinity"
        if (low is not None and real < low) or (above is not None and real <= above):
            return None, f"{rule}; it is {real:g}"
        if high is not None and real > high:
            return None, f"{rule}; it is {real:g}"
        return real, ""

    return kind


def integer(low: int, high: int) -> Kind:
    """An integer from `low` to `high`; 128.0 is one, as JSON knows no difference."""
    rule = f"must be an integer from {low:,} to {high:,}"

    def kind(value: Any) -> tuple[Any, str]:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None, f"{rule}, not {show_type(value)}{_text_number(value)}"
        if isinstance(value, float) and not value.is_integer():  # NaN and infinities are no integers either
            return None, f"{rule}; it is {value:g}"
        if not low <= value <= high:
            return None, f"{rule}; it is {'smaller' if value < low else 'larger'}"
        return int(value), ""

    return kind


def boolean() -> Kind:
    def kind(value: Any) -> tuple[Any, str]:
        return (value, "") if isinstance(value, bool) else (None, f"must be true or false, not {show_type(value)}")

    return kind


def choice(*names: str) -> Kind:
    rule = f"must be one of {', '.join(names)}"

    def kind(value: Any) -> tuple[Any, str]:
        if not isinstance(value, str):
            return None, f"{rule}, not {show_type(value)}"
        return (value, "") if value in names else (None, rule + suggestion(value, names))

    return kind


def optional(inner: Kind) -> Kind:
    """`inner`, or null."""

    def kind(value: Any) -> tuple[Any, str]:
        if value is None:
            return None, ""
        result, fault = inner(value)
        return result, f"{fault} (or null)" if fault else ""

    return kind


def several(inner: Kind, most: int) -> Kind:
    """One `inner`, or a list of 1 to `most` of them; the value is a tuple."""

    def kind(value: Any) -> tuple[Any, str]:
        if not isinstance(value, list | tuple):
            result, fault = inner(value)
            return (None if fault else (result,)), fault
        if not 1 <= len(value) <= most:
            return None, f"must have 1 to {most} entries"
        taken = [inner(entry) for entry in value]
        fault = next((fault for _, fault in taken if fault), "")
        return (None, f"each entry {fault}") if fault else (tuple(result for result, _ in taken), "")

    return kind


def path_text() -> Kind:
    """A path of printable characters, at most 1,024."""
    rule = "must be a path, as text of at most 1,024 printable characters"

    def kind(value: Any) -> tuple[Any, str]:
        if not isinstance(value, str):
            return None, f"{rule}, not {show_type(value)}"
        return (value, "") if 0 < len(value) <= 1024 and value.isprintable() else (None, rule)

    return kind


def name_below() -> Kind:
    """A plain relative name below some root: no way up, out, or to a drive, whatever the system."""
    path = path_text()

    def kind(value: Any) -> tuple[Any, str]:
        name, fault = path(value)
        if fault:
            return None, fault
        parts = name.replace("\\", "/").split("/")
        if not parts[0] or ".." in parts or ":" in name or not any(part not in ("", ".") for part in parts):
            return None, "must be a plain relative name, such as my-letters: not absolute, without .. and :"
        return name, ""

    return kind


def _text_number(value: Any) -> str:
    """YAML 1.1 reads 1e-4 as text: say so, for whoever wrote it meant a number."""
    if isinstance(value, str) and len(value) <= 32 and re.fullmatch(r"[+-]?[0-9.]+[eE][+-]?[0-9]+", value):
        return " (YAML takes 1e-4 for text: write 1.0e-4)"
    return ""
