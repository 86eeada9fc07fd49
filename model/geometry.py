"""The shape of a Siamese network: its layers, what each one leaves of an image, its parameters and its cost.

Needs no torch, so a coordinator can refuse a network that runs out of pixels before anybody trains it. A convolution
has stride 1 and no padding (Koch et al. 2015, section 3.1): an image of side s leaves it at s - kernel + 1. Pooling is
2 x 2 with stride 2; "floor" drops an odd last row and column, "ceil" pools what is there of them.
Invariant: the labels name the layers that hold weights, in order: conv1 .. convN, fc (or fc1 .. fcM where there are
several), and output where there is a head with weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Literal

Pool = Literal["none", "floor", "ceil"]
Activation = Literal["sigmoid", "relu", "tanh", "none"]
Distance = Literal["l1", "l2", "squared", "cosine"]
Head = Literal["weighted", "classes", "none"]
Norm = Literal["none", "batch"]


@dataclass(frozen=True)
class Conv:
    """One convolution, its ReLU, and the pooling between the two if there is one."""

    filters: int
    kernel: int
    pool: Pool = "none"


@dataclass(frozen=True)
class NetConfig:
    """A network for square images of `input` pixels a side, and how it compares two of them.

    `fc` holds the sizes of the fully connected layers: ReLU and `dropout` after each but the last, which is the
    embedding and goes through `activation`. Similarities come from a `weighted` head (alpha over componentwise
    differences) or, with head none or classes, from a distance between embeddings, on the unit sphere with `normalise`.
    `classes` is the number of outputs of a head that classifies. With norm batch a convolution's output is normalised
    over the batch (Ioffe and Szegedy 2015), here after its pooling and ReLU.
    """

    input: int
    conv: tuple[Conv, ...]
    fc: tuple[int, ...]
    channels: int = 1
    activation: Activation = "sigmoid"
    dropout: float = 0.0
    distance: Distance = "l1"
    normalise: bool = False
    head: Head = "weighted"
    classes: int = 0
    norm: Norm = "none"

    @property
    def convolutions(self) -> tuple[str, ...]:
        """("conv1", ..., "convN")."""
        return tuple(f"conv{i}" for i in range(1, len(self.conv) + 1))

    @property
    def connected(self) -> tuple[str, ...]:
        """("fc",), or ("fc1", ..., "fcM") where there are several."""
        return ("fc",) if len(self.fc) == 1 else tuple(f"fc{i}" for i in range(1, len(self.fc) + 1))

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the layers that have weights: ("conv1", ..., "fc", "output")."""
        return (*self.convolutions, *self.connected, *(() if self.head == "none" else ("output",)))

    @property
    def embedding(self) -> int:
        """Number of values by which an image is compared."""
        return self.fc[-1]

    @property
    def outputs(self) -> int:
        """Units of the head."""
        return {"weighted": 1, "classes": self.classes, "none": 0}[self.head]

    @property
    def sides(self) -> tuple[int, ...]:
        """Side in pixels of what each convolution, with its pooling, leaves. Zero or less: it ran out of pixels."""
        return tuple(pooled for _, _, pooled in self._walk())

    @property
    def features(self) -> int:
        """Number of values that the last convolution hands to the fully connected layer."""
        return self.conv[-1].filters * self.sides[-1] ** 2

    @property
    def parameters(self) -> int:
        """Number of weights and biases: 38,951,745 for the paper's network."""
        channels = (self.channels, *(layer.filters for layer in self.conv))
        each = 1 if self.norm == "none" else 3  # a bias, and the normalisation's scale and shift
        convs = sum(c.filters * (before * c.kernel**2 + each) for before, c in zip(channels, self.conv, strict=False))
        sizes = (self.features, *self.fc, *(() if self.head == "none" else (self.outputs,)))
        return int(convs + sum(after * (before + 1) for before, after in pairwise(sizes)))

    @property
    def activations(self) -> int:
        """Number of values that training keeps of one image for the way back: what each layer and pooling leaves."""
        total = self.channels * self.input**2
        for layer, side, pooled in self._walk():
            total += layer.filters * (side**2 + (0 if layer.pool == "none" else pooled**2))
        return total + sum(self.fc)

    @property
    def flops(self) -> int:
        """Floating-point operations to embed one image, a multiplication and an addition counting two."""
        channels, total = self.channels, 0
        for layer, side, _ in self._walk():
            total += 2 * side**2 * layer.filters * channels * layer.kernel**2
            channels = layer.filters
        return total + sum(2 * before * after for before, after in pairwise((self.features, *self.fc)))

    def fault(self) -> str | None:
        """Say which layer runs out of pixels, or that the network is too large to be meant; None if it can be built."""
        before = self.input
        for number, (layer, side, pooled) in enumerate(self._walk(), start=1):
            if side < 1:
                return (
                    f"conv{number} runs out of pixels: its {layer.kernel} x {layer.kernel} kernel does not fit "
                    f"the {before} x {before} pixels that reach it (input {self.input})"
                )
            if pooled < 1:
                return f"the pooling after conv{number} runs out of pixels: {side} x {side} reaches it, it needs 2 x 2"
            before = pooled
        if self.parameters > MAX_PARAMETERS:
            return f"the network would have {self.parameters:,} parameters, more than {MAX_PARAMETERS:,}"
        return None

    def document(self) -> dict[str, Any]:
        """The layers as the setting `net` spells them; how images are compared are settings of their own."""
        pools: dict[Pool, bool | str] = {"none": False, "floor": True, "ceil": "ceil"}
        conv = [{"filters": c.filters, "kernel": c.kernel, "pool": pools[c.pool]} for c in self.conv]
        fc = self.fc[0] if len(self.fc) == 1 else list(self.fc)
        return {"input": self.input, "channels": self.channels, "conv": conv, "fc": fc}

    def _walk(self) -> Iterator[tuple[Conv, int, int]]:
        """Each convolution with the side after it and the side after its pooling."""
        side = self.input
        for layer in self.conv:
            out = side - layer.kernel + 1
            side = {"none": out, "floor": out // 2, "ceil": (out + 1) // 2}[layer.pool]
            yield layer, out, side


MAX_PARAMETERS = 1_000_000_000

LARGEST_INPUT = 420
"""Pixels a side of the largest image: four times Omniglot's own."""

PAPER = NetConfig(
    input=105,
    conv=(Conv(64, 10, "floor"), Conv(128, 7, "floor"), Conv(128, 4, "floor"), Conv(256, 4)),
    fc=(4096,),
)
"""Koch et al. 2015, figure 4: 38,951,745 parameters."""

MINI = NetConfig(
    input=28,
    conv=(Conv(32, 5, "floor"), Conv(64, 3, "floor"), Conv(64, 2), Conv(128, 2, "ceil")),
    fc=(512,),
)
"""Its sister of 331,841 parameters, which learns on one CPU core in a minute."""

NETS: Mapping[str, NetConfig] = MappingProxyType({"paper": PAPER, "mini": MINI})
