"""Whether any point of a space can be trained, as its workload sees it.

A study in which nothing can be trained is refused at its launch, as is a change that leaves nothing: a worker never
waits for a point that cannot come. The draws are fixed, so the same document always gets the same answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hpo.errors import Fault
from hpo.protocol import Value, Workload
from hpo.space import Flat, SearchSpace

PROBES = 64


def faults_of(
    space: SearchSpace, workload: Workload, settings: Mapping[str, Any], fixed: Mapping[str, Value]
) -> list[Fault]:
    """Look for one point that can be trained: first in the whole space, then where `fixed` has its values."""
    reason = _why_none(space, workload, settings, {})
    if reason is not None:
        return [Fault("space", f"none of {PROBES} random points can be trained: {reason}")]
    return fixed_faults(space, workload, settings, fixed)


def fixed_faults(
    space: SearchSpace, workload: Workload, settings: Mapping[str, Any], fixed: Mapping[str, Value]
) -> list[Fault]:
    """Look for one point that can be trained and has the fixed values."""
    reason = _why_none(space, workload, settings, fixed) if fixed else None
    if reason is None:
        return []
    if len(fixed) == len(space.names):
        return [Fault("fixed", f"this point can never be trained: {reason}")]
    return [Fault("fixed", f"none of {PROBES} random points with these values can be trained: {reason}")]


def _why_none(
    space: SearchSpace, workload: Workload, settings: Mapping[str, Any], given: Mapping[str, Value]
) -> str | None:
    rng = np.random.default_rng(0)
    reasons: Counter[str] = Counter()
    for _ in range(PROBES):
        reason = workload.feasible(space.nest({**space.random(rng), **given}), settings)
        if reason is None:
            return None
        reasons[reason] += 1
    return reasons.most_common(1)[0][0]


def point_faults(
    points: Sequence[Flat], space: SearchSpace, workload: Workload, settings: Mapping[str, Any]
) -> list[Fault]:
    """Name the complete points that can never be trained."""
    faults = []
    for place, flat in enumerate(points):
        if len(flat) == len(space.names):
            reason = workload.feasible(space.nest(flat), settings)
            if reason is not None:
                faults.append(Fault(f"points[{place}]", f"can never be trained: {reason}"))
    return faults
