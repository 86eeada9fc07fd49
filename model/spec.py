"""A trial's recipe, checked: what makes a point of a study of Siamese networks trainable.

Needs no torch: a coordinator checks a study with it, and never leases a point that could not be trained. Every fault
is named, with its place, in one pass. Invariant: `config` accepts exactly the points that `feasible` finds nothing
against, and `config(**c.document()) == c`, so that a checkpoint carries its own recipe. The hyperparameters eta, mu and
lambda are one number for all layers or {label: number}; what a point leaves out of them, and of any setting
(`model.settings`), may be fixed in the settings under the same names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model import settings as rules
from model.geometry import NetConfig
from model.settings import FROZEN, HYPERPARAMETERS, KNOWN, SETTINGS, Rest, as_object
from model.values import Fault, key_path, suggestion

__all__ = ["FROZEN", "KNOWN", "SETTINGS", "Fault", "LayerRates", "Refused", "SiameseWorkload", "TrainConfig", "config"]

GIVE_ONE = ": give it one in the space or in settings"


class Refused(ValueError):
    """A recipe has faults; `faults` names every one."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(str(fault) for fault in self.faults))


@dataclass(frozen=True)
class LayerRates:
    """Learning rate, momentum and L2 strength of one layer (Koch et al. 2015, section 3.2)."""

    label: str
    eta: float
    mu: float
    lam: float

    @property
    def weight_decay(self) -> float:
        """The gradient of lam * |w|^2 is 2 * lam * w."""
        return 2.0 * self.lam


@dataclass(frozen=True)
class TrainConfig:
    """One trial's recipe, complete: the same config and data give the same trial again on the same machine's CPU."""

    net: NetConfig
    layers: tuple[LayerRates, ...]
    seed: int
    loss: str
    distance: str
    normalise: bool
    activation: str
    dropout: float
    norm: str
    margin: float
    mining: str
    temperature: float
    classes: int | None
    batches: str
    batch_pairs: int
    same_alphabet: bool
    fixed_pairs: int | None
    distorted_copies: int
    characters: int
    drawings: int
    alphabets: int
    negatives: int
    distort: bool
    strength: float
    elastic: float
    rotations: bool
    optimizer: str
    init: str
    transfer: str | None
    schedule: str
    decay: float
    average: float
    momentum_epochs: int
    momentum_start: float
    pairs_per_epoch: int
    epochs: int
    patience: int | None
    max_seconds: float | None
    checkpoint_every_s: float
    precision: str
    data: str
    folder: str | None
    ink: str
    way: int
    shot: int
    validation_tasks: int
    validation_seed: int

    @property
    def pairs_per_batch(self) -> int:
        """Pairs that a batch counts as: with P x K batches half its images, since a pair is two."""
        return self.characters * self.drawings // 2 if self.batches == "pxk" else self.batch_pairs

    @property
    def footprint(self) -> float:
        """Bytes that training takes on its device, roughly: comparable between recipes, no measure of a device."""
        images = self.characters * self.drawings if self.batches == "pxk" else 2 * self.batch_pairs
        copies = 3 + (self.optimizer == "adam") + (self.average > 0)  # weights, gradients, momentum, and more
        width = 2 if self.precision == "bf16" else 4
        return 4.0 * copies * self.net.parameters + 2.0 * width * images * self.net.activations  # values and gradients

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch: `pairs_per_epoch` rounded up to whole batches."""
        return math.ceil(self.pairs_per_epoch / self.pairs_per_batch)

    @property
    def wanted(self) -> dict[str, Any]:
        """The data set to train on, as `model.dataset.load` takes it."""
        return {
            "size": self.net.input,
            "source": self.data,
            "channels": self.net.channels,
            "folder": self.folder or "",
            "ink": self.ink,
        }

    def document(self) -> dict[str, Any]:
        """{"params", "settings", "seed"}: plain JSON from which `config` makes an equal TrainConfig."""
        params = {
            "eta": {layer.label: layer.eta for layer in self.layers},
            "mu": {layer.label: layer.mu for layer in self.layers},
            "lambda": {layer.label: layer.lam for layer in self.layers},
        }
        settings = {"net": self.net.document(), **{name: getattr(self, name) for name in SETTINGS}}
        return {"params": params, "settings": settings, "seed": self.seed}


class SiameseWorkload:
    """The Siamese network as a coordinator sees it: fits `hpo.protocol.Workload` and `Sized` without importing them."""

    def check(self, settings: Mapping[str, Any]) -> Sequence[Fault]:
        """Name every fault of a study's settings; paths are relative to them (``net.conv[1].kernel``)."""
        faults: list[Fault] = []
        rules.read(settings, faults)
        return faults

    def feasible(self, point: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
        """Say everything that keeps this point from ever being trained under these settings, or None."""
        try:
            config(point, settings, 0)
        except Refused as refused:
            return str(refused)
        return None

    def footprint(self, point: Mapping[str, Any], settings: Mapping[str, Any]) -> float | None:
        """Return the memory that training this point takes, in bytes, roughly; None for one that cannot be trained."""
        try:
            return config(point, settings, 0).footprint
        except Refused:
            return None


def config(params: Mapping[str, Any], settings: Mapping[str, Any], seed: int) -> TrainConfig:
    """Lay a point over a study's settings. Raises `Refused` naming every fault of either."""
    faults: list[Fault] = []
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        faults.append(Fault("seed", "must be an integer from 0 to 2^63 - 1"))
    point, fixed = as_object(params, "the point", faults), as_object(settings, "the settings", faults)
    for name in point:
        if name in FROZEN:
            faults.append(Fault(name, "must not be swept: values measured under different ones do not compare"))
        elif name not in KNOWN:
            what = "is not a hyperparameter or setting of this network"
            faults.append(Fault(key_path(name), what + suggestion(name, KNOWN)))
    merged = {**fixed, **{name: _merged(fixed.get(name), value) for name, value in point.items() if name in KNOWN}}
    net, values, rates = rules.read(merged, faults)
    if net is not None:
        for name in HYPERPARAMETERS:
            missing = [label for label in net.labels if label not in rates[name]]
            if missing and not any(fault.at.split(".")[0] == name for fault in faults):
                faults.append(Fault(name, f"has no value for {', '.join(missing)}{GIVE_ONE}"))
    if faults or net is None:
        raise Refused(faults)
    layers = tuple(LayerRates(label, *(rates[name][label] for name in HYPERPARAMETERS)) for label in net.labels)
    return TrainConfig(net=net, layers=layers, seed=seed, **values)


def _merged(fixed: Any, swept: Any) -> Any:
    """A swept {"conv2": 64} keeps what the settings say of the other layers; anything else replaces it."""
    if isinstance(fixed, Mapping) and isinstance(swept, Mapping):
        return {**fixed, **swept}
    if fixed is not None and not isinstance(fixed, str) and isinstance(swept, Mapping):
        return Rest(fixed, swept)
    return swept
