"""The settings of a training run: their names, kinds and defaults, and how a document of them is read.

Needs no torch. `read` names every fault of a document in one pass and gives the network, the plain settings and the
rates by layer. A setting that is null takes what suits the loss (`BY_LOSS`), so that what comes out is complete:
reading it back gives the same. Settings are fixed for a study; a point may sweep any of them by name but those in
`FROZEN`, which decide what the objective measures.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from model.geometry import LARGEST_INPUT, NETS, Conv, NetConfig, Pool
from model.values import (
    Fault,
    Kind,
    boolean,
    choice,
    integer,
    key_path,
    name_below,
    number,
    optional,
    path_text,
    several,
    show_type,
    suggestion,
)

LARGEST_WAY = 46
"""Characters of the largest validation alphabet (Oriya's): there is no task of more within one alphabet."""
MNIST_WAY = 10

HYPERPARAMETERS: Mapping[str, Kind] = {
    "eta": number(above=0.0),
    "mu": number(low=0.0, high=1.0),
    "lambda": number(low=0.0),
}

SETTINGS: Mapping[str, tuple[Kind, Any]] = {
    # what is learnt
    "loss": (choice("sigmoid", "contrastive", "triplet", "softmax", "classes"), "sigmoid"),
    "distance": (optional(choice("l1", "l2", "squared", "cosine")), None),
    "normalise": (optional(boolean()), None),
    "activation": (optional(choice("sigmoid", "relu", "tanh", "none")), None),
    "dropout": (number(low=0.0, high=0.95), 0.0),
    "norm": (choice("none", "batch"), "none"),
    "margin": (optional(number(above=0.0)), None),
    "mining": (choice("none", "semi-hard"), "none"),
    "temperature": (optional(number(above=0.0)), None),
    "classes": (optional(integer(2, 1_000_000)), None),
    # from which batches
    "batches": (choice("pairs", "pxk"), "pairs"),
    "batch_pairs": (integer(2, 65_536), 128),
    "same_alphabet": (boolean(), True),
    "fixed_pairs": (optional(integer(2, 10_000_000)), None),
    "distorted_copies": (integer(1, 64), 8),
    "characters": (integer(2, 4096), 32),
    "drawings": (integer(2, 256), 4),
    "alphabets": (integer(1, 1024), 2),
    "negatives": (integer(1, 4096), 5),
    "distort": (boolean(), True),
    "strength": (number(above=0.0, high=2.5), 1.0),
    "elastic": (number(low=0.0, high=1.0), 0.0),
    "rotations": (boolean(), False),
    # by which steps, from which start
    "optimizer": (choice("sgd", "adam"), "sgd"),
    "init": (choice("he", "paper", "keras2017"), "he"),
    "transfer": (optional(path_text()), None),
    "schedule": (choice("exponential", "cosine"), "exponential"),
    "decay": (number(above=0.0, high=1.0), 0.99),
    "average": (number(low=0.0, high=0.99999), 0.0),
    "momentum_epochs": (integer(0, 1_000_000), 10),
    "momentum_start": (number(low=0.0, high=1.0), 0.5),
    # for how long
    "pairs_per_epoch": (integer(1, 1_000_000_000), 30_000),
    "epochs": (integer(1, 1_000_000), 200),
    "patience": (optional(integer(1, 1_000_000)), 20),
    "max_seconds": (optional(number(above=0.0)), None),
    "checkpoint_every_s": (number(low=0.0), 10.0),
    "precision": (choice("auto", "fp32", "bf16"), "auto"),
    # on which data, measured how
    "data": (choice("auto", "omniglot", "strokes", "mnist", "folder"), "auto"),
    "folder": (optional(name_below()), None),
    "ink": (choice("dark", "light"), "dark"),
    "way": (integer(2, 1000), 20),
    "shot": (integer(1, 100), 1),
    "validation_tasks": (integer(1, 1_000_000), 2000),
    "validation_seed": (integer(0, 2**63 - 1), 0),
}
"""Every setting but the layers of the network, with its kind and its default."""

FROZEN = frozenset({"way", "shot", "validation_tasks", "validation_seed", "data", "folder", "ink"})
"""Settings that a point must not sweep: values measured under different ones cannot be compared."""

BY_LOSS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "sigmoid": {"distance": "l1", "normalise": False, "activation": "sigmoid", "margin": 1.0},
        "contrastive": {"distance": "l2", "normalise": False, "activation": "none", "margin": 1.0},
        "triplet": {"distance": "l2", "normalise": True, "activation": "none", "margin": 0.2},
        "softmax": {"distance": "squared", "normalise": False, "activation": "none", "margin": 1.0},
        "classes": {"distance": "cosine", "normalise": False, "activation": "relu", "margin": 1.0},
    }
)
"""What null means, for each loss."""

ARCHITECTURE: Mapping[str, Kind] = {
    "input": integer(8, LARGEST_INPUT),
    "channels": integer(1, 3),
    "filters": integer(1, 65_536),
    "kernel": integer(1, 1024),
    "fc": several(integer(1, 1_048_576), 8),
}
"""Settings laid over the network's own layers; filters and kernel are one integer or {"conv1": integer, ...}."""

KNOWN = ("net", *ARCHITECTURE, *HYPERPARAMETERS, *SETTINGS)
_MAX_CONVS = 32
_POOLS: Mapping[Any, Pool] = {True: "floor", False: "none", "ceil": "ceil"}


@dataclass(frozen=True)
class Rest:
    """One value for every layer, but for those that `labelled` names."""

    value: Any
    labelled: Mapping[Any, Any]


def as_object(document: Any, what: str, faults: list[Fault]) -> Mapping[str, Any]:
    """The document, or an empty one and a fault."""
    if isinstance(document, Mapping):
        return document
    faults.append(Fault("", f"{what} must be an object with named values, not {show_type(document)}"))
    return {}


def read(document: Any, faults: list[Fault]) -> tuple[NetConfig | None, dict[str, Any], dict[str, dict[str, float]]]:
    """The network, the plain settings, and the rates by layer; meaningful only where no fault was added."""
    settings = as_object(document, "the settings", faults)
    for name in settings:
        if name not in KNOWN:
            faults.append(Fault(key_path(name), "is not a setting" + suggestion(name, KNOWN)))
    values: dict[str, Any] = {}
    for name, (kind, default) in SETTINGS.items():
        values[name] = _take(kind, settings[name], name, faults) if name in settings else default
    sound = not faults
    for name, value in BY_LOSS.get(values["loss"], {}).items():
        if values[name] is None:
            values[name] = value
    if sound:
        faults += _contradictions(values)
    net = _read_net(settings, values, faults) if isinstance(document, Mapping) else None
    if values["loss"] is None:
        net = None  # an unknown loss leaves open whether there is a head with rates of its own
    if net is not None and values["temperature"] is None:  # distances of untrained networks grow with their units
        on_sphere = values["normalise"] or values["distance"] == "cosine"
        values["temperature"] = 0.1 if on_sphere else 0.05 * net.embedding
    if net is not None and len(net.fc) < 2 and values["dropout"]:
        faults.append(Fault("dropout", "acts between fully connected layers, and fc has one: give fc a list of sizes"))
    rates: dict[str, dict[str, float]] = {}
    labels = net.labels if net else None
    for name, kind in HYPERPARAMETERS.items():
        rates[name] = _by_label(kind, settings[name], name, labels, faults) if name in settings else {}
    if sound and values["optimizer"] == "adam":
        if any(mu == 1.0 for mu in rates["mu"].values()):
            faults.append(Fault("mu", "is Adam's beta1 with optimizer adam, and must be below 1"))
        if values["momentum_epochs"] and values["momentum_start"] == 1.0:
            faults.append(Fault("momentum_start", "is Adam's first beta1 with optimizer adam, and must be below 1"))
    return net, values, rates


def _contradictions(values: Mapping[str, Any]) -> list[Fault]:
    """What single settings, each sound by itself, cannot mean together."""
    faults = []

    def refuse(name: str, what: str) -> None:
        faults.append(Fault(name, what))

    loss, data, pxk = values["loss"], values["data"], values["batches"] == "pxk"
    if loss == "sigmoid" and values["distance"] not in ("l1", "squared"):
        refuse("distance", "must be l1 or squared with loss sigmoid: its head weighs componentwise differences")
    if loss == "sigmoid" and values["normalise"]:
        refuse("normalise", "goes with losses on distances (contrastive, triplet, softmax), not with loss sigmoid")
    if loss == "softmax" and not pxk:
        refuse("loss", "softmax compares within a batch of characters: set batches to pxk")
    if values["mining"] != "none" and loss != "triplet":
        refuse("mining", "goes with loss triplet only")
    if values["elastic"] and not values["distort"]:
        refuse("elastic", "is a distortion: it does nothing with distort false")
    if loss == "classes" and values["classes"] is None:
        refuse("classes", "is missing: loss classes needs the number of training characters (MNIST 10, Omniglot 964)")
    if (count := values["fixed_pairs"]) is not None:
        if pxk or loss not in ("sigmoid", "contrastive"):
            refuse("fixed_pairs", "goes with batches pairs and a loss on pairs (sigmoid, contrastive)")
        if values["elastic"]:
            refuse("elastic", "does not go with fixed_pairs, whose distorted copies are affine")
        whole = count * (1 + values["distorted_copies"] * values["distort"])
        if values["batch_pairs"] > whole:
            refuse("batch_pairs", f"must not be larger than the training set, which has {whole:,} pairs")
    pairs = values["characters"] * values["drawings"] // 2 if pxk else values["batch_pairs"]
    if pairs > values["pairs_per_epoch"]:
        batch = "characters x drawings / 2" if pxk else "batch_pairs"
        refuse("pairs_per_epoch", f"must be at least one batch: {batch} is {pairs:,} pairs")
    if pxk and values["characters"] % values["alphabets"]:
        refuse("characters", f"must be a multiple of alphabets ({values['alphabets']}): each gives the same number")
    if pxk and values["characters"] < 2 * values["alphabets"]:
        refuse("characters", f"must be at least 2 for each of {values['alphabets']} alphabets")
    if (data == "folder") != (values["folder"] is not None):
        if data == "folder":
            refuse("folder", "is missing: data folder needs the name of a folder below WHETSTONE_DATA")
        else:
            refuse("folder", "goes with data folder only")
    largest = {"mnist": MNIST_WAY, "folder": 1000}.get(data, LARGEST_WAY)
    if values["way"] > largest:
        where = "MNIST has 10 digits" if data == "mnist" else "the largest validation alphabet has no more characters"
        refuse("way", f"must be an integer from 2 to {largest}: {where}")
    return faults


def _read_net(settings: Mapping[str, Any], values: Mapping[str, Any], faults: list[Fault]) -> NetConfig | None:
    """The network a study names or spells out, with the architecture settings laid over it; None if faulty."""
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
    laid: dict[str, Any] = {}
    for name, kind in ARCHITECTURE.items():
        if name not in settings:
            laid[name] = {}
        elif name in ("filters", "kernel"):
            laid[name] = _by_label(kind, settings[name], name, net.convolutions if net else None, faults)
        else:
            laid[name] = _take(kind, settings[name], name, faults)
    if net is None or len(faults) > before:
        return None
    layers = tuple(
        replace(
            layer, filters=laid["filters"].get(label, layer.filters), kernel=laid["kernel"].get(label, layer.kernel)
        )
        for label, layer in zip(net.convolutions, net.conv, strict=True)
    )
    loss = values["loss"]
    net = NetConfig(
        laid["input"] or net.input,
        layers,
        laid["fc"] or net.fc,
        channels=laid["channels"] or net.channels,
        activation=values["activation"],
        dropout=values["dropout"],
        distance=values["distance"],
        normalise=values["normalise"],
        head={"sigmoid": "weighted", "classes": "classes"}.get(loss, "none"),  # type: ignore[arg-type]
        classes=(values["classes"] or 0) if loss == "classes" else 0,
        norm=values["norm"],
    )
    if net.channels == 2:
        faults.append(Fault("channels", "must be 1 (grey) or 3 (colour)"))
    if fault := net.fault():
        faults.append(Fault("net", fault))
    return net if len(faults) == before else None


def _spelled_out(document: Mapping[str, Any], faults: list[Fault]) -> NetConfig | None:
    """{input: 28, channels: 1, conv: [{filters, kernel, pool: true | false | ceil}, ...], fc: 512 or a list}."""
    before = len(faults)
    _unknown(document, ("input", "channels", "conv", "fc"), "net", faults)
    side = _required(ARCHITECTURE["input"], document, "input", "net", faults)
    channels = _take(ARCHITECTURE["channels"], document.get("channels", 1), "net.channels", faults)
    fc = _required(ARCHITECTURE["fc"], document, "fc", "net", faults)
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
        filters = _required(ARCHITECTURE["filters"], layer, "filters", at, faults)
        kernel = _required(ARCHITECTURE["kernel"], layer, "kernel", at, faults)
        pool = layer.get("pool", False)
        if not isinstance(pool, bool) and pool != "ceil":
            faults.append(Fault(f"{at}.pool", "must be true, false or ceil"))
            pool = False
        layers.append(Conv(filters, kernel, _POOLS[pool]))
    return None if len(faults) > before else NetConfig(side, tuple(layers), fc, channels)


def _by_label(kind: Kind, value: Any, at: str, labels: Sequence[str] | None, faults: list[Fault]) -> dict[str, Any]:
    """{label: value}, from one value for all labels or a mapping of some. Labels go unchecked where they are None."""
    result: dict[str, Any] = {}
    if isinstance(value, Rest):
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
