"""One-shot and k-shot tasks: which of N characters is this?

Promise: a task shows N different characters, of one alphabet unless it is drawn across all, and a query of one of them;
each shot of the support set is by one person, and no two shots nor the query are by the same one. The true character
stands at a uniformly random place (a tie that falls on place 0 must not look like knowledge). The same seed gives the
same tasks on every device, and the tasks of K shots are those of fewer with further drawings.
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
    """T tasks of N ways and K shots, as flat indices into the `Drawings` they were drawn from.

    query    (T,) int64
    support  (T, N, K) int64, K drawings of each character
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

    @property
    def shot(self) -> int:
        """K."""
        return int(self.support.shape[2])

    def first(self, tasks: int) -> Episodes:
        """The first `tasks` of these tasks (all, where there are fewer)."""
        return Episodes(self.query[:tasks], self.support[:tasks], self.target[:tasks])

    def to(self, device: torch.device | str) -> Episodes:
        return Episodes(self.query.to(device), self.support.to(device), self.target.to(device))


def draw(drawings: Drawings, tasks: int, way: int, seed: int, *, shot: int = 1, across: bool = False) -> Episodes:
    """Draws `tasks` tasks of `way` characters with `shot` drawings each.

    The characters of a task are of one alphabet: alphabets with fewer are left out, the others equally likely. With
    `across` they are any of all alphabets. Lives on the CPU whatever the drawings' device. Raises DataError where there
    are too few characters or people for such a task, ValueError for numbers that make none.
    """
    if tasks < 1 or way < 2 or shot < 1:
        raise ValueError(f"one-shot tasks: at least 1 task of at least 2 ways and 1 shot; got {tasks}, {way}, {shot}")
    if drawings.drawers <= shot:
        people = f"drawings by at least {shot + 1} people, one for the query; these are by {drawings.drawers}"
        raise DataError(f"tasks of {shot} {'shot' if shot == 1 else 'shots'} need {people}")
    table = _alphabets(drawings, way, across)

    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(table), (tasks,), generator=generator)
    characters = _distinct(table, chosen, way, generator)  # (T, N)
    hand = torch.randint(drawings.drawers, (tasks,), generator=generator)
    step = torch.randint(1, drawings.drawers, (tasks,), generator=generator)
    target = torch.randint(way, (tasks,), generator=generator)
    steps = step[:, None]  # (T, K), from the query's drawer to those of the shots
    if shot > 1:  # after the first, any that are left
        keys = torch.rand(tasks, drawings.drawers - 1, generator=generator).scatter_(1, steps - 1, -1.0)
        steps = keys.topk(shot, dim=1, largest=False, sorted=True).indices + 1
    hands = (hand[:, None] + steps) % drawings.drawers
    query = characters.gather(1, target[:, None])[:, 0] * drawings.drawers + hand
    support = characters[:, :, None] * drawings.drawers + hands[:, None, :]
    return Episodes(query, support, target)


def _alphabets(drawings: Drawings, way: int, across: bool) -> Tensor:
    """(A, M) characters to draw tasks from, a row for each alphabet that has `way` of them, padded with -1."""
    alphabet = drawings.alphabet.cpu()
    if across:
        if len(alphabet) < way:
            raise DataError(f"there are {len(alphabet)} characters in all, too few for a {way}-way task")
        return torch.arange(len(alphabet))[None]
    sizes = torch.bincount(alphabet, minlength=len(drawings.alphabets))
    usable = (sizes >= way).nonzero().flatten().tolist()
    if not usable:
        largest = int(sizes.max()) if len(sizes) else 0
        raise DataError(f"no alphabet has {way} characters for a {way}-way task; the largest has {largest}")
    members = [(alphabet == a).nonzero().flatten() for a in usable]
    return torch.nn.utils.rnn.pad_sequence(members, batch_first=True, padding_value=-1)


_KEYS = 2**26
"""Random keys held at once, 512 MiB; a million tasks within an alphabet stay below it."""


def _distinct(table: Tensor, chosen: Tensor, way: int, generator: torch.Generator) -> Tensor:
    """(T, way) different characters of row `chosen` of `table` each, in random order."""
    drawn = []
    step = max(1, _KEYS // table.shape[1])
    for begin in range(0, len(chosen), step):
        rows = table[chosen[begin : begin + step]]
        # The N smallest of one random key for each character; padding sorts last.
        keys = torch.rand(rows.shape, generator=generator, dtype=torch.float64)
        keys[rows < 0] = 2.0
        places = keys.topk(way, dim=1, largest=False, sorted=True).indices
        drawn.append(rows.gather(1, places))
    return torch.cat(drawn)


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
    return drawings, Episodes(query.flatten(), support.reshape(runs * way, way, 1), answers.flatten())
