"""One-shot tasks: which of N characters is this?

Promise: a task shows N different characters of one alphabet, all drawn by one person, and a query of one of them drawn
by another person; the true one stands at a uniformly random place (a tie that falls on place 0 must not look like
knowledge). The same seed gives the same tasks on every device.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model import omniglot
from model.drawings import DataError, Drawings


@dataclass(frozen=True, eq=False)
class Episodes:
    """T tasks of N ways, as flat indices into the `Drawings` they were drawn from.

    query    (T,) int64
    support  (T, N) int64
    target   (T,) int64, the place in [0, N) of the query's character
    """

    query: Tensor
    support: Tensor
    target: Tensor

    def __len__(self) -> int:
        return int(self.query.shape[0])

    @property
    def way(self) -> int:
        """N."""
        return int(self.support.shape[1])

    def first(self, tasks: int) -> Episodes:
        """The first `tasks` of these tasks (all, where there are fewer)."""
        return Episodes(self.query[:tasks], self.support[:tasks], self.target[:tasks])

    def to(self, device: torch.device | str) -> Episodes:
        return Episodes(self.query.to(device), self.support.to(device), self.target.to(device))


def draw(drawings: Drawings, tasks: int, way: int, seed: int) -> Episodes:
    """Draws `tasks` tasks of `way` characters; alphabets with fewer characters are left out, the others equally likely.

    Lives on the CPU whatever the drawings' device. Raises DataError where no alphabet is large enough or all drawings
    are by one person, ValueError for numbers that make no task.
    """
    if tasks < 1 or way < 2:
        raise ValueError(f"one-shot tasks: at least 1 task of at least 2 ways; got {tasks} of {way}")
    if drawings.drawers < 2:
        raise DataError("one-shot tasks need drawings by at least 2 people")
    alphabet = drawings.alphabet.cpu()
    sizes = torch.bincount(alphabet, minlength=len(drawings.alphabets))
    usable = (sizes >= way).nonzero().flatten()
    if len(usable) == 0:
        largest = int(sizes.max()) if len(sizes) else 0
        raise DataError(f"no alphabet has {way} characters for a {way}-way task; the largest has {largest}")

    # A table of the characters of each alphabet, padded on the right: (A, M).
    members = [(alphabet == a).nonzero().flatten() for a in usable.tolist()]
    table = torch.nn.utils.rnn.pad_sequence(members, batch_first=True, padding_value=-1)

    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(usable), (tasks,), generator=generator)
    # N distinct characters, in random order: the N smallest of one random key for each; padding sorts last.
    keys = torch.rand(tasks, table.shape[1], generator=generator, dtype=torch.float64)
    keys[table[chosen] < 0] = 2.0
    places = keys.topk(way, dim=1, largest=False, sorted=True).indices
    characters = table[chosen].gather(1, places)  # (T, N)

    hand = torch.randint(drawings.drawers, (tasks,), generator=generator)
    step = torch.randint(1, drawings.drawers, (tasks,), generator=generator)
    other_hand = (hand + step) % drawings.drawers
    target = torch.randint(way, (tasks,), generator=generator)
    query = characters.gather(1, target[:, None])[:, 0] * drawings.drawers + hand
    support = characters * drawings.drawers + other_hand[:, None]
    return Episodes(query, support, target)


def lake_runs(data_root: Path | None, size: int) -> tuple[Drawings, Episodes]:
    """Lake's official one-shot test: 20 runs of 20 tasks of 20 ways (Lake et al. 2015), read from ``all_runs.zip``.

    Gives the 800 images as Drawings of their own (a run is an "alphabet" of 20 characters; drawer 0 gave the training
    image, drawer 1 the test item) and the 400 tasks that index them. Raises DataError where the file is missing or
    damaged.
    """
    drawings, answers = omniglot.read_lake_runs(data_root, size)
    runs, way = answers.shape  # answers[r, i]: the class, from 0, that item i of run r shows
    characters = torch.arange(runs * way).view(runs, way)
    query = characters.gather(1, answers) * 2 + 1
    support = (characters * 2)[:, None, :].expand(runs, way, way)
    return drawings, Episodes(query.flatten(), support.reshape(runs * way, way), answers.flatten())
