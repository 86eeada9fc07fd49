"""What may stand in the settings of a study of Siamese networks, and what makes a point of it trainable.

Needs no torch: a coordinator checks a study with it, and never leases a point that could not be trained. Every fault
is named, with its place, in one pass. Invariant: `config` accepts exactly the points that `feasible` finds nothing
against, and `config(**c.document()) == c`, so that a checkpoint carries its own recipe.

Settings are fixed for a study; a point may sweep any of them by name but those in `FROZEN`, which decide what the
objective measures. The hyperparameters eta, mu and lambda are one number for all layers or {label: number}; what a
point leaves out of them may be fixed in the settings under the same names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from model.geometry import LARGEST_INPUT, NETS, Conv, NetConfig, Pool
from model.values import Fault, Kind, boolean, choice, integer, key_path, number, optional, show_type, suggestion

__all__ = ["FROZEN", "Fault", "LayerRates", "Refused", "SiameseWorkload", "TrainConfig", "config"]

LARGEST_WAY = 46
"""Characters of the largest validation alphabet (Oriya's): there is no task of more within one alphabet."""

HYPERPARAMETERS: Mapping[str, Kind] = {
    "eta": number(above=0.0),
    "mu": number(low=0.0, high=1.0),
    "lambda": number(low=0.0),
}

SETTINGS: Mapping[str, tuple[Kind, Any]] = {
    "init": (choice("he", "paper"), "he"),
    "batch_pairs": (integer(2, 65_536), 128),
    "pairs_per_epoch": (integer(1, 1_000_000_000), 30_000),
    "epochs": (integer(1, 1_000_000), 200),
    "patience": (optional(integer(1, 1_000_000)), 20),
    "momentum_epochs": (integer(0, 1_000_000), 10),
    "momentum_start": (number(low=0.0, high=1.0), 0.5),
    "decay": (number(above=0.0, high=1.0), 0.99),
    "distort": (boolean(), True),
    "same_alphabet": (boolean(), True),
    "precision": (choice("auto", "fp32", "bf16"), "auto"),
    "way": (integer(2, LARGEST_WAY), 20),
    "validation_tasks": (integer(1, 1_000_000), 2000),
    "validation_seed": (integer(0, 2**63 - 1), 0),
    "data": (choice("auto", "omniglot", "strokes"), "auto"),
    "max_seconds": (optional(number(above=0.0)), None),
    "checkpoint_every_s": (number(low=0.0), 10.0),
}
"""Every setting but the network, with its kind and its default."""

FROZEN = frozenset({"way", "validation_tasks", "validation_seed", "data"})
"""Settings that a point must not sweep: values measured under different ones cannot be compared."""

_FILTERS, _KERNEL, _FC, _INPUT = integer(1, 65_536), integer(1, 1024), integer(1, 1_048_576), integer(8, LARGEST_INPUT)
ARCHITECTURE = ("filters", "kernel", "fc")
"""Settings laid over the network's own layers; the first two are one integer or {"conv1": integer, ...}."""

KNOWN = ("net", *ARCHITECTURE, *HYPERPARAMETERS, *SETTINGS)
_MAX_CONVS = 32
GIVE_ONE = ": give it one in the space or in settings"
_POOLS: Mapping[Any, Pool] = {True: "floor", False: "none", "ceil": "ceil"}


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
    init: str
    batch_pairs: int
    pairs_per_epoch: int
    epochs: int
    patience: int | None
    momentum_epochs: int
    momentum_start: float
    decay: float
    distort: bool
    same_alphabet: bool
    precision: str
    way: int
    validation_tasks: int
    validation_seed: int
    data: str
    max_seconds: float | None
    checkpoint_every_s: float

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch: `pairs_per_epoch` rounded up to whole batches."""
        return math.ceil(self.pairs_per_epoch / self.batch_pairs)

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
    """The Siamese network as a coordinator sees it: fits `hpo.protocol.Workload` without importing it."""

    def check(self, settings: Mapping[str, Any]) -> Sequence[Fault]:
        """Name every fault of a study's settings; paths are relative to them (``net.conv[1].kernel``)."""
        faults: list[Fault] = []
        _read_settings(settings, faults)
        return faults

    def feasible(self, point: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
        """Say everything that keeps this point from ever being trained under these settings, or None."""
        try:
            config(point, settings, 0)
        except Refused as refused:
            return str(refused)
        return None


def config(params: Mapping[str, Any], settings: Mapping[str, Any], seed: int) -> TrainConfig:
    """Lay a point over a study's settings. Raises `Refused` naming every fault of either."""
    faults: list[Fault] = []
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        faults.append(Fault("seed", "must be an integer from 0 to 2^63 - 1"))
    point, fixed = _mapping(params, "the point", faults), _mapping(settings, "the settings", faults)
    for name in point:
        if name in FROZEN:
            faults.append(Fault(name, "must not be swept: values measured under different ones do not compare"))
        elif name not in KNOWN:
            what = "is not a hyperparameter or setting of this network"
            faults.append(Fault(key_path(name), what + suggestion(name, KNOWN)))
    merged = {**fixed, **{name: _merged(fixed.get(name), value) for name, value in point.items() if name in KNOWN}}
    net, values, rates = _read_settings(merged, faults)
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
        return _Rest(fixed, swept)
    return swept


@dataclass(frozen=True)
class _Rest:
    """One value for every layer, but for those that `labelled` names."""

    value: Any
    labelled: Mapping[Any, Any]


def _mapping(document: Any, what: str, faults: list[Fault]) -> Mapping[str, Any]:
    if isinstance(document, Mapping):
        return document
    faults.append(Fault("", f"{what} must be an object with named values, not {show_type(document)}"))
    return {}


def _read_settings(
    document: Any, faults: list[Fault]
) -> tuple[NetConfig | None, dict[str, Any], dict[str, dict[str, float]]]:
    """The network, the plain settings, and the rates by layer; meaningful only where no fault was added."""
    settings = _mapping(document, "the settings", faults)
    for name in settings:
        if name not in KNOWN:
            faults.append(Fault(key_path(name), "is not a setting" + suggestion(name, KNOWN)))
    values: dict[str, Any] = {}
    for name, (kind, default) in SETTINGS.items():
        values[name] = _take(kind, settings[name], name, faults) if name in settings else default
    net = _read_net(settings, faults) if isinstance(document, Mapping) else None
    rates: dict[str, dict[str, float]] = {}
    for name, kind in HYPERPARAMETERS.items():
        rates[name] = (
            _by_label(kind, settings[name], name, net.labels if net else None, faults) if name in settings else {}
        )
    return net, values, rates


def _read_net(settings: Mapping[str, Any], faults: list[Fault]) -> NetConfig | None:
    """The network a study names or spells out, with `filters`, `kernel` and `fc` laid over it; None if faulty."""
    named, before = settings.get("net"), len(faults)
    net: NetConfig | None = None
    if named is None:
        faults.append(Fault("net", f"is missing: name one of {', '.join(NETS)}, or spell out its layers"))
    elif isinstance(named, str):
        net = NETS.get(named)
        if net is None:
            faults.append(Fault("net", f"is none of the networks {', '.join(NETS)}" + suggestion(named, NETS)))
    elif isinstance(named, Mapping):
        net = _spelled_out(named, faults)
    else:
        faults.append(Fault("net", f"must be a name or an object with its layers, not {show_type(named)}"))
    convs = net.labels[:-2] if net else None
    filters = _by_label(_FILTERS, settings["filters"], "filters", convs, faults) if "filters" in settings else {}
    kernels = _by_label(_KERNEL, settings["kernel"], "kernel", convs, faults) if "kernel" in settings else {}
    fc = _take(_FC, settings["fc"], "fc", faults) if "fc" in settings else None
    if net is None or len(faults) > before:
        return None
    layers = tuple(
        replace(layer, filters=filters.get(label, layer.filters), kernel=kernels.get(label, layer.kernel))
        for label, layer in zip(net.labels, net.conv, strict=False)
    )
    net = NetConfig(net.input, layers, fc or net.fc)
    if fault := net.fault():
        faults.append(Fault("net", fault))
        return None
    return net


def _spelled_out(document: Mapping[str, Any], faults: list[Fault]) -> NetConfig | None:
    """{input: 28, conv: [{filters, kernel, pool: true | false | ceil}, ...], fc: 512}, or None and its faults."""
    before = len(faults)
    _unknown(document, ("input", "conv", "fc"), "net", faults)
    side = _required(_INPUT, document, "input", "net", faults)
    fc = _required(_FC, document, "fc", "net", faults)
    conv = document.get("conv")
    if not isinstance(conv, Sequence) or isinstance(conv, str) or not 1 <= len(conv) <= _MAX_CONVS:
        faults.append(Fault("net.conv", f"must be a list of 1 to {_MAX_CONVS} convolutions"))
        return None
    layers = []
    for i, layer in enumerate(conv):
        at = f"net.conv[{i}]"
        if not isinstance(layer, Mapping):
            faults.append(Fault(at, f"must be an object with filters and kernel, not {show_type(layer)}"))
            continue
        _unknown(layer, ("filters", "kernel", "pool"), at, faults)
        filters = _required(_FILTERS, layer, "filters", at, faults)
        kernel = _required(_KERNEL, layer, "kernel", at, faults)
        pool = layer.get("pool", False)
        if not isinstance(pool, bool) and pool != "ceil":
            faults.append(Fault(f"{at}.pool", "must be true, false or ceil"))
            pool = False
        layers.append(Conv(filters, kernel, _POOLS[pool]))
    return None if len(faults) > before else NetConfig(side, tuple(layers), fc)


def _by_label(kind: Kind, value: Any, at: str, labels: Sequence[str] | None, faults: list[Fault]) -> dict[str, Any]:
    """{label: value}, from one value for all labels or a mapping of some. Labels go unchecked where they are None."""
    result: dict[str, Any] = {}
    if isinstance(value, _Rest):
        result = _by_label(kind, value.value, at, labels, faults)
        value = value.labelled
    if not isinstance(value, Mapping):
        taken = _take(kind, value, at, faults)
        return dict.fromkeys(labels or (), taken)
    for label, entry in value.items():
        if labels is not None and label not in labels:
            what = f"is no layer of this network ({', '.join(labels)})" + suggestion(label, labels)
            faults.append(Fault(f"{at}.{key_path(label)}", what))
        else:
            result[label] = _take(kind, entry, f"{at}.{key_path(label)}", faults)
    return result


def _take(kind: Kind, value: Any, at: str, faults: list[Fault]) -> Any:
    result, fault = kind(value)
    if fault:
        faults.append(Fault(at, fault))
    return result


def _required(kind: Kind, document: Mapping[str, Any], key: str, at: str, faults: list[Fault]) -> Any:
    if key in document:
        return _take(kind, document[key], f"{at}.{key}", faults)
    faults.append(Fault(f"{at}.{key}", "is missing"))
    return None


def _unknown(document: Mapping[str, Any], known: Iterable[str], at: str, faults: list[Fault]) -> None:
    known = tuple(known)
    for key in document:
        if key not in known:
            what = f"is unknown here (there are {', '.join(known)})" + suggestion(key, known)
            faults.append(Fault(f"{at}.{key_path(key)}", what))
