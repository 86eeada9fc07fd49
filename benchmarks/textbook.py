"""The same network as a good tutorial would write it: what the trainer is measured against, and no straw man.

Plain PyTorch in fp32: two forwards for the two images of a pair, a Dataset that opens PNG files with PIL and distorts
them with torchvision's RandomAffine, a DataLoader in the same process (on one core, workers would only take turns),
SGD, and a forward for every pair to evaluate. Promise: with the same weights and images it gives the same logits as
`model.net`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from model import vision
from model.drawings import Drawings


class SiameseNetwork(nn.Module):
    """Koch et al. 2015, figure 4."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 64, 10)
        self.conv2 = nn.Conv2d(64, 128, 7)
        self.conv3 = nn.Conv2d(128, 128, 4)
        self.conv4 = nn.Conv2d(128, 256, 4)
        self.fc = nn.Linear(256 * 6 * 6, 4096)
        self.output = nn.Linear(4096, 1)

    def embed(self, x: Tensor) -> Tensor:
        """(B, 1, 105, 105) -> (B, 4096)"""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.max_pool2d(F.relu(self.conv3(x)), 2)
        x = F.relu(self.conv4(x))
        return torch.sigmoid(self.fc(x.flatten(1)))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Logits (B,) of B pairs."""
        distance = torch.abs(self.embed(first) - self.embed(second))
        logits: Tensor = self.output(distance).squeeze(1)
        return logits


def unpack(drawings: Drawings, folder: Path) -> None:
    """Write drawings as Omniglot has them: alphabet/character/DD.png, black ink on white, one bit a pixel if it can."""
    for character, name in enumerate(drawings.characters):
        place = folder / name
        place.mkdir(parents=True)
        for drawer, image in enumerate(drawings.images[character]):
            paper = Image.fromarray((255 - image).numpy())
            black_and_white = bool(((image == 0) | (image == 255)).all())
            (paper.convert("1") if black_and_white else paper).save(place / f"{drawer + 1:02}.png")


def characters(folder: Path, names: Sequence[str]) -> list[list[Path]]:
    """The drawings of each character, in the order in which `unpack` wrote them."""
    return [sorted((folder / name).iterdir()) for name in names]


class Pairs(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Random pairs, every other one of the same character; a pair that differs stays within one alphabet."""

    def __init__(self, drawings: Sequence[Sequence[Path]], transform: Any, length: int) -> None:
        alphabets: dict[str, list[Sequence[Path]]] = {}
        for character in drawings:
            alphabets.setdefault(character[0].parent.parent.name, []).append(character)
        self.alphabets = list(alphabets.values())
        self.transform, self.length = transform, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        alphabet = random.choice(self.alphabets)
        if index % 2 == 0:
            first, second = random.sample(random.choice(alphabet), 2)
        else:
            first, second = (random.choice(character) for character in random.sample(alphabet, 2))
        same = torch.tensor(1.0 if index % 2 == 0 else 0.0)
        return self.transform(read(first)), self.transform(read(second)), same


def read(path: Path) -> Image.Image:
    """A drawing, its ink white on black."""
    with Image.open(path) as image:
        return ImageOps.invert(image.convert("L"))


def transforms() -> tuple[Any, Any]:
    """(to train with: distorted; to evaluate with: as it is)"""
    vision.datasets()  # makes torchvision importable where its operators are not
    from torchvision import transforms as t

    affine = t.RandomAffine(
        degrees=10,
        translate=(2 / 105, 2 / 105),
        scale=(0.8, 1.2),
        shear=(-17, 17, -17, 17),
        interpolation=t.InterpolationMode.BILINEAR,
    )
    return t.Compose([affine, t.ToTensor()]), t.ToTensor()


def train(model: SiameseNetwork, loader: DataLoader[Any], steps: int) -> Iterator[float]:
    """Seconds for every next `steps` steps, loading included."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    criterion = nn.BCEWithLogitsLoss()
    running_loss = 0.0
    began = time.perf_counter()
    for done, (first, second, same) in enumerate(loader, start=1):
        optimizer.zero_grad()
        loss = criterion(model(first, second), same)
        loss.backward()
        optimizer.step()
        running_loss += loss.item()
        if done % steps == 0:
            yield time.perf_counter() - began
            began = time.perf_counter()


@torch.no_grad()
def evaluate(
    model: SiameseNetwork, drawings: Sequence[Path], transform: Any, tasks: Sequence[tuple[int, Sequence[int], int]]
) -> list[bool]:
    """Which tasks (query, support, place of the true one) are answered rightly: a forward for every pair."""
    right = []
    for query, support, target in tasks:
        image = transform(read(drawings[query])).unsqueeze(0)
        scores = [model(image, transform(read(drawings[other])).unsqueeze(0)).item() for other in support]
        right.append(scores.index(max(scores)) == target)
    return right
