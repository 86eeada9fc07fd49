"""Figures of others, to stand beside ours: each with where it was published and how far it could be checked.

Promise: nothing here is ours, and no figure is without its source. Accuracies are shares in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """A publication: how it is cited beside a figure, and in full."""

    short: str
    full: str


KOCH = Source(
    "Koch et al. 2015",
    "Koch, Zemel and Salakhutdinov 2015, Siamese Neural Networks for One-shot Image Recognition",
)
LAKE = Source(
    "Lake et al. 2015",
    "Lake, Salakhutdinov and Tenenbaum 2015, Human-level concept learning through probabilistic program induction",
)
LAKE_2013 = Source(
    "Lake et al. 2013",
    "Lake, Salakhutdinov and Tenenbaum 2013, One-shot learning by inverting a compositional causal process",
)
PROGRESS = Source(
    "Lake et al. 2019", "Lake, Salakhutdinov and Tenenbaum 2019, The Omniglot challenge: a 3-year progress report"
)
SNELL = Source("Snell et al. 2017", "Snell, Swersky and Zemel 2017, Prototypical Networks for Few-shot Learning")
SHYAM = Source("Shyam et al. 2017", "Shyam, Gupta and Dukkipati 2017, Attentive Recurrent Comparators")


@dataclass(frozen=True)
class Figure:
    """An accuracy that somebody published; `where` it stands, `quoted` by whom, and what could not be checked."""

    who: str
    accuracy: float
    source: Source
    where: str = ""
    quoted: Source | None = None
    caveat: str = ""

    @property
    def cited(self) -> str:
        """The source in a few words."""
        own = f"{self.source.short}, {self.where}" if self.where else self.source.short
        return f"{own}, as quoted in {self.quoted.short}" if self.quoted else own


@dataclass(frozen=True)
class VerificationRow:
    """A row of the first table: training pairs, with or without distorted copies, and the accuracy on test pairs."""

    pairs: int
    distorted: bool
    accuracy: float


VERIFICATION: tuple[VerificationRow, ...] = (
    VerificationRow(30_000, False, 0.9061),
    VerificationRow(30_000, True, 0.9190),
    VerificationRow(90_000, False, 0.9154),
    VerificationRow(90_000, True, 0.9315),
    VerificationRow(150_000, False, 0.9163),
    VerificationRow(150_000, True, 0.9342),
)
"""KOCH, table 1: accuracy on 10,000 test pairs."""

HUMANS = Figure("humans", 0.955, KOCH, "table 2")
BPL_2013 = Figure("BPL (2013)", 0.952, LAKE_2013, quoted=KOCH)
BPL_2015 = Figure("BPL (2015)", 0.967, LAKE)
PAPER = Figure("convolutional Siamese net, the paper", 0.920, KOCH, "table 2")
NEAREST = Figure("pixel 1-nearest neighbour, the paper", 0.217, KOCH, "table 2")
PROTOTYPICAL = Figure(
    "prototypical networks",
    1 - 0.137,
    SNELL,
    quoted=PROGRESS,
    caveat="an error of 13.7%, which was not checked against that report or another source",
)
ARC = Figure(
    "attentive recurrent comparators",
    1 - 0.015,
    SHYAM,
    quoted=PROGRESS,
    caveat="an error of 1.5%, which stands in the abstract of its own paper too; whether it was reached by training on "
    "more than the 30 background alphabets was not checked",
)

ONE_SHOT: tuple[Figure, ...] = (ARC, BPL_2015, HUMANS, BPL_2013, PAPER, PROTOTYPICAL, NEAREST)
"""20-way one-shot classification on Lake's 400 trials, best first."""

MNIST: tuple[Figure, ...] = (
    Figure("convolutional Siamese net, the paper", 0.703, KOCH, "table 3"),
    Figure("pixel 1-nearest neighbour, the paper", 0.265, KOCH, "table 3"),
)
"""10-way one-shot classification of MNIST's digits by a network trained on Omniglot."""
