"""Drawings of characters as one tensor, and the three parts of a data set.

Promise: each character of a `Drawings` has the same number of drawings, each by another person as far as the data set
tells people apart; 255 is ink, 0 is paper; grey or colour.
Invariant: the flat index of a drawing is ``c * D + d`` (character c, drawer d): pairs and episodes speak in flat
indices, so that whole batches are gathered by one indexing operation wherever the tensor lives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

INK = 255


class DataError(Exception):
    """Data is missing, damaged, or too small for what was asked. One line: what, what was expected, what to do."""


@dataclass(frozen=True, eq=False)
class Drawings:
    """Characters drawn by several people.

    images      (C, D, S, S) uint8 of grey, or (C, D, 3, S, S) of colour; 255 = ink, 0 = paper
    alphabet    (C,) int64, index into `alphabets`
    alphabets   names
    characters  (C) names, ``Latin/character01``
    """

    images: Tensor
    alphabet: Tensor
    alphabets: tuple[str, ...]
    characters: tuple[str, ...]

    def __post_init__(self) -> None:
        count, drawers, *channels, height, width = self.images.shape
        assert channels in ([], [3]), self.images.shape
        assert self.images.dtype == torch.uint8, self.images.dtype
        assert height == width, (height, width)
        assert drawers > 0, drawers
        assert len(self.characters) == count == self.alphabet.shape[0], (len(self.characters), self.alphabet.shape)

    def __len__(self) -> int:
        """Number of drawings, C * D."""
        return self.images.shape[0] * self.images.shape[1]

    @property
    def flat(self) -> Tensor:
        """(C * D, S, S), or (C * D, 3, S, S) of colour, a view where the memory allows it: drawing ``c * D + d``."""
        return self.images.flatten(0, 1)

    @property
    def drawers(self) -> int:
        """D, the number of people."""
        return self.images.shape[1]

    @property
    def size(self) -> int:
        """S, the side of an image in pixels."""
        return self.images.shape[-1]

    @property
    def channels(self) -> int:
        """1 of grey, 3 of colour."""
        return 1 if self.images.dim() == 4 else 3

    @property
    def device(self) -> torch.device:
        return self.images.device

    def to(self, device: torch.device | str) -> Drawings:
        """The same drawings on `device`; no copy where they are there already."""
        return Drawings(self.images.to(device), self.alphabet.to(device), self.alphabets, self.characters)

    def coloured(self) -> Drawings:
        """The same drawings in three channels: grey is shown three times (a view, no more memory)."""
        if self.channels == 3:
            return self
        images = self.images[:, :, None].expand(-1, -1, 3, -1, -1)
        return Drawings(images, self.alphabet, self.alphabets, self.characters)

    def select(self, *, alphabets: Sequence[str] | None = None, drawers: Sequence[int] | None = None) -> Drawings:
        """Only these alphabets (by name, in the order given) and drawers (counted from 0).

        Raises DataError for an alphabet or a drawer that is not here.
        """
        images, alphabet, names, characters = self.images, self.alphabet, self.alphabets, self.characters
        if alphabets is not None:
            unknown = [name for name in alphabets if name not in names]
            if unknown:
                raise DataError(f"no alphabet named {', '.join(unknown)}; there are {', '.join(names)}")
            rows = [(alphabet == names.index(name)).nonzero().flatten() for name in alphabets]
            keep = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64, device=alphabet.device)
            alphabet = torch.cat([torch.full_like(row, i) for i, row in enumerate(rows)]) if rows else keep
            names = tuple(alphabets)
            characters = tuple(characters[c] for c in keep.tolist())
            images = images[keep]
        if drawers is not None:
            beyond = [d for d in drawers if not 0 <= d < self.drawers]
            if beyond or not drawers:
                raise DataError(f"drawers {list(drawers)} were asked for; there are 0 to {self.drawers - 1}")
            images = images[:, list(drawers)]
        return Drawings(images.contiguous(), alphabet, names, characters)


def rotated(drawings: Drawings) -> Drawings:
    """The characters, then the same turned by 90, 180 and 270 degrees (counter-clockwise) as characters of their own.

    A turned alphabet is an alphabet of its own, ``Latin@90`` with the characters ``Latin@90/character01``: two
    characters of one alphabet share the turn, which therefore gives nothing away.
    """
    turns = range(4)
    names = [name.partition("/") for name in drawings.characters]
    return Drawings(
        torch.cat([torch.rot90(drawings.images, turn, (-2, -1)) for turn in turns]),
        torch.cat([drawings.alphabet + turn * len(drawings.alphabets) for turn in turns]),
        tuple(f"{name}{_turned(turn)}" for turn in turns for name in drawings.alphabets),
        tuple(f"{alphabet}{_turned(turn)}{slash}{rest}" for turn in turns for alphabet, slash, rest in names),
    )


def _turned(turn: int) -> str:
    return f"@{90 * turn}" if turn else ""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three parts that share no characters, and as a rule neither alphabets nor drawers (Koch et al. 2015, 3.1).

    The digits of MNIST are the exception: the same ten in each part, drawn by others. `test` may be without characters
    where a folder of images has none to test on. `name` is omniglot, strokes, mnist, or folder: and the folder's name.
    """

    train: Drawings
    validation: Drawings
    test: Drawings
    name: str
    size: int

    @property
    def channels(self) -> int:
        """1 of grey, 3 of colour."""
        return self.train.channels

    def to(self, device: torch.device | str) -> Dataset:
        """The same data set on `device`."""
        return Dataset(self.train.to(device), self.validation.to(device), self.test.to(device), self.name, self.size)

    def coloured(self) -> Dataset:
        """The same data set in three channels."""
        train, validation, test = self.train.coloured(), self.validation.coloured(), self.test.coloured()
        return Dataset(train, validation, test, self.name, self.size)
