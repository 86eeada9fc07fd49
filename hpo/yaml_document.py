"""Documents as people type them, into a form or a file: YAML or JSON in, YAML out.

Whatever is typed, the answer is plain values or `Invalid`: nesting and size are limited before anything is built,
aliases are refused (a few lines of them unfold to gigabytes) and so are repeated keys, of which YAML silently keeps the
last. What the document holds is for the coordinator to check, as it does for the REST route. It needs PyYAML only.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from hpo.errors import Fault, Invalid

MAX_CHARACTERS = 200_000
MAX_DEPTH = 32
_NUMBER = re.compile(
    r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number (YAML 1.1 wants 1.0e-4), leaves dates as text, refuses repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem="this key stands here twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":float", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """Lists of plain values, and small mappings of them, stand on one line; nothing is an alias."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        plain = not any(isinstance(part, dict | list) for part in sequence)
        return super().represent_sequence(tag, sequence, flow_style=plain)

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.MappingNode:
        small = 0 < len(mapping) <= 4 and not any(isinstance(part, dict | list) for part in mapping.values())
        return super().represent_mapping(tag, mapping, flow_style=small)


# The writer too, so that it quotes what the reader would take for a number.
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789."))


def read(text: str, at: str = "document", what: str = "the document", most: int = MAX_CHARACTERS) -> dict[str, Any]:
    """One mapping from YAML or JSON text of at most `most` characters.

    Raises `Invalid` of `what`, whose faults say where, begin with `at`, and never repeat the text at length.
    """
    value = parse(text, at, what, most)
    if value is None:
        raise Invalid([Fault(at, "is empty")], what)
    if not isinstance(value, dict):
        raise Invalid([Fault(at, "must be a mapping, such as `{name: value}`")], what)
    return value


def parse(text: str, at: str = "document", what: str = "the document", most: int = MAX_CHARACTERS) -> Any:
    """Do what `read` does, for a value of any kind."""
    if len(text) > most:
        raise Invalid([Fault(at, f"is longer than {most:,} characters")], what)
    try:
        if fault := _survey(text):
            raise Invalid([Fault(at, fault)], what)
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        raise Invalid([Fault(_place(at, error), _problem(error))], what) from None
    except (yaml.YAMLError, ValueError, OverflowError):  # a NUL, a surrogate, a number nothing can hold
        raise Invalid([Fault(at, "is neither YAML nor JSON")], what) from None


def write(document: Any) -> str:
    """YAML for reading and editing, its keys in their order."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=100, allow_unicode=True)


def _survey(text: str) -> str | None:
    """Walk the events, which build nothing and do not recurse, before anything that does; say what is refused."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            return "uses an alias (*name); write the part out instead"
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                return f"is nested more than {MAX_DEPTH} deep"
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
    return None


def _place(at: str, error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    line = f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return ", ".join(part for part in (at, line) if part)


def _problem(error: yaml.MarkedYAMLError) -> str:
    """PyYAML's own words, unless they quote what was typed."""
    problem = error.problem or "is neither YAML nor JSON"
    return "is neither YAML nor JSON here" if "'" in problem and len(problem) > 80 else problem
