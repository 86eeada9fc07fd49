"""What a network is measured against (chance, the nearest neighbour on bare pixels), and how sure a measurement is."""

from __future__ import annotations

import math

import torch

from model.drawings import Drawings
from model.episode import Episodes

_TASKS = 64
"""Tasks of 20 ways compared at a time: at 105 pixels their images take 113 MB as float64."""


def chance(way: int) -> float:
    """The accuracy of guessing among `way` characters."""
    return 1.0 / way


def nearest_neighbour(drawings: Drawings, episodes: Episodes) -> int:
    """Tasks answered rightly by the support image at the least cosine distance from the query, on pixels.

    With several drawings of each character the nearest of all answers.

    With this distance Lake's 400 tasks give 87, the 21.7% that the literature quotes (Koch et al. 2015, table 2). A tie
    between the true character and another counts as wrong, as it does for a network.
    """
    flat = drawings.flat.flatten(1)
    episodes = episodes.to(drawings.device)
    correct = 0
    chunk = max(1, _TASKS * 20 // (episodes.way * episodes.shot))
    for start in range(0, len(episodes), chunk):
        some = slice(start, start + chunk)
        # Sums of products of bytes stay below 2^53: float64 makes them exact, and equal images exactly tied. The
        # query's own length is the same for all of a task, so it is left out.
        support = flat[episodes.support[some].flatten(1)].to(torch.float64)  # (t, N K, P)
        query = flat[episodes.query[some]].to(torch.float64)  # (t, P)
        likeness = torch.bmm(support, query[:, :, None])[:, :, 0]
        likeness /= support.square().sum(2).sqrt().clamp_min(1.0)  # an empty image is like nothing
        likeness = likeness.view(-1, episodes.way, episodes.shot).amax(2)  # (t, N)
        true = likeness.gather(1, episodes.target[some, None])
        # Only the true one itself is as near as the true one.
        correct += int(((likeness >= true).sum(1) == 1).sum())
    return correct


def interval(successes: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a proportion (1927), by default at 95%: never outside [0, 1], sound near 0 and 1.

    Without any trial nothing is known: (0, 1). Raises ValueError where successes are not within 0 to n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}")
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - reach), min(1.0, middle + reach)
