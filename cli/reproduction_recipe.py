"""The recipe of a reproduction: a preset's first point and settings, shrunk as far as `--scale` says.

Promise: what was shrunk is told, line by line, and nothing is shrunk in silence. At scale S pairs and epochs are each
the paper's times the square root of S, so that the work is S of the paper's; below `FULL_NET` the network and its
images are smaller too. Scale 1 changes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cli import presets

if TYPE_CHECKING:
    from model.spec import TrainConfig

FULL_NET = 0.1
"""The smallest scale at which the network is the paper's."""
_SMALL_RATES = {"eta": 0.1, "mu": 0.9, "lambda": 0.0}
"""Ours: what the smaller networks learn well with."""
_SMALL_FC = 512
_FEWEST_PAIRS, _FEWEST_EPOCHS = 300, 3


@dataclass(frozen=True)
class Recipe:
    """A run to train, and what it leaves out of the paper's."""

    config: TrainConfig
    scale: float
    shrunk: tuple[str, ...]

    @property
    def told(self) -> str:
        """The scale in a few words, for titles."""
        if self.scale == 1:
            return "scale 1: the paper's own size"
        side, filters = self.config.net.input, ", ".join(str(layer.filters) for layer in self.config.net.conv)
        small = f", {side} x {side} images, {filters} filters" if self.scale < FULL_NET else ""
        root = 100 * math.sqrt(self.scale)
        return f"scale {self.scale:g}: {root:.3g}% of the paper's pairs and of its epochs{small}"

    @property
    def pairs(self) -> int:
        """Pairs to be trained on, at most."""
        return self.config.epochs * self.config.steps_per_epoch * self.config.batch_pairs


def recipe(preset: str, scale: float, *, seed: int, data: str, **changes: Any) -> Recipe:
    """The preset's recipe with some settings changed, then shrunk. Raises Refused where that leaves no sound one."""
    from model import spec

    document = presets.load_all()[preset]
    point, settings = document["points"][0], {**document["settings"], **changes, "data": data}
    shrunk: list[str] = []
    if scale < 1:
        root = math.sqrt(scale)
        for name, least, what in (
            ("fixed_pairs", _FEWEST_PAIRS, "pairs in the training set"),
            ("pairs_per_epoch", _FEWEST_PAIRS, "pairs an epoch"),
            ("epochs", _FEWEST_EPOCHS, "epochs at most"),
            ("momentum_epochs", 1, "epochs of rising momentum"),
        ):
            if settings.get(name) is None:
                continue
            smaller = min(settings[name], max(least, round(settings[name] * root)))
            shrunk.append(f"{what}: {smaller:,}, at scale 1 {settings[name]:,}")
            settings[name] = smaller
        settings["patience"] = None
        shrunk.append("no early stop: so few epochs are all trained")
    if scale < FULL_NET:
        settings, point = _smaller(settings, shrunk), _SMALL_RATES
    return Recipe(spec.config(point, settings, seed), scale, tuple(shrunk))


def _smaller(settings: dict[str, Any], shrunk: list[str]) -> dict[str, Any]:
    """Half the filters and 512 units; for the paper's 105 x 105 network its sister of 28 x 28 images."""
    if settings["net"] == "paper":
        kernels = "kernels of 5, 3, 2 and 2 for 10, 7, 4 and 4"
        shrunk.append(f"28 x 28 images for 105 x 105, half the filters, {kernels}, {_SMALL_FC} units for 4096")
        return {**settings, "net": "mini"}
    filters = {f"conv{i}": layer["filters"] // 2 for i, layer in enumerate(settings["net"]["conv"], 1)}
    shrunk.append(f"half the filters and {_SMALL_FC} units for {settings['net']['fc']}")
    return {**settings, "filters": filters, "fc": _SMALL_FC}
