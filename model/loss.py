"""What training minimises: five losses over the embeddings of a batch.

sigmoid      cross-entropy of "the same character" (Koch et al. 2015, section 3.2)
contrastive  half the squared distance of same pairs, and of what different ones lack to the margin, the "spring" loss
             (Hadsell, Chopra and LeCun 2006, "Dimensionality Reduction by Learning an Invariant Mapping", eq. 4)
triplet      max(d(anchor, positive) - d(anchor, negative) + margin, 0), negatives given or semi-hard (Schroff,
             Kalenichenko and Philbin 2015, "FaceNet", section 3.2)
softmax      cross-entropy of a drawing's own character against all drawings of others in the batch, by similarity over
             temperature (Sohn 2016, "Improved Deep Metric Learning with Multi-class N-pair Loss Objective")
classes      cross-entropy of a classifier of the training characters, for its convolutions' sake

Promise: each is a mean, so that eta means the same whatever the batch, and is in fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.batch import Batch
from model.net import SiameseNet
from model.spec import TrainConfig


def loss(net: SiameseNet, embeddings: Tensor, batch: Batch, config: TrainConfig, drawers: int) -> Tensor:
    """Scalar loss of a batch whose images have these embeddings (n, E). `drawers` tells flat indices apart."""
    with torch.autocast(embeddings.device.type, enabled=False):
        match config.loss:
            case "sigmoid":
                logits = net.compare(*_pairs(embeddings, batch))
                return F.binary_cross_entropy_with_logits(logits, batch.same, weight=batch.weight, reduction="sum")
            case "contrastive":
                apart = net.distance(*_pairs(embeddings, batch))
                lack = (config.margin - apart).clamp_min(0.0)
                return (0.5 * batch.weight * torch.where(batch.same > 0, apart, lack).square()).sum()
            case "classes":
                # Of a part of a batch the mean counts for no more than the part's share of it.
                share = batch.weight.sum()
                return F.cross_entropy(net.classify(embeddings), batch.images // drawers) * share
        character = batch.images // drawers
        alike = character[:, None] == character[None, :]  # (n, n)
        if config.loss == "softmax":
            return _softmax(_apart(net, embeddings), alike, config.temperature)
        assert config.loss == "triplet", config.loss
        return _triplet(net, embeddings, batch, config, alike)


def _pairs(embeddings: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    # The gradient of index_select takes a third of the time that the one of embeddings[...] does.
    return embeddings.index_select(0, batch.first), embeddings.index_select(0, batch.second)


def _triplet(net: SiameseNet, embeddings: Tensor, batch: Batch, config: TrainConfig, alike: Tensor) -> Tensor:
    if config.mining == "none":
        anchor, positive, negative = (embeddings.index_select(0, of) for of in _triplets(batch))
        near, far = net.distance(anchor, positive), net.distance(anchor, negative)
    else:
        apart = _apart(net, embeddings)
        if batch.triplets is not None:
            anchors, positives = batch.triplets[:, 0], batch.triplets[:, 1]
        else:
            anchors, positives = batch.first[: batch.positives], batch.second[: batch.positives]
        near = apart[anchors, positives]
        far = apart.index_select(0, anchors).gather(1, _semi_hard(apart, alike, anchors, near)[:, None])[:, 0]
    return (near - far + config.margin).clamp_min(0.0).mean()


def _apart(net: SiameseNet, embeddings: Tensor) -> Tensor:
    """(n, n) distances of everything from everything."""
    if net.config.distance == "l1":
        return torch.cdist(embeddings, embeddings, p=1.0)
    if net.config.distance == "cosine" or net.config.normalise:
        unit = embeddings if net.config.normalise else F.normalize(embeddings, dim=1, eps=1e-6)
        cosine = unit @ unit.T
        if net.config.distance == "cosine":
            return 1.0 - cosine
        squared = 2.0 - 2.0 * cosine
    else:
        length = embeddings.square().sum(1)
        squared = length[:, None] + length[None, :] - 2.0 * embeddings @ embeddings.T
    squared = squared.clamp_min(1e-12)
    return squared if net.config.distance == "squared" else squared.sqrt()


def _softmax(apart: Tensor, alike: Tensor, temperature: float) -> Tensor:
    """For each drawing and each other one of its character: -log of its share among it and all of other characters."""
    scores = -apart / temperature
    others = scores.masked_fill(alike, -torch.inf).logsumexp(1)  # (n,)
    itself = torch.eye(len(apart), dtype=torch.bool, device=apart.device)
    losses = F.softplus(others[:, None] - scores)  # -log(e^s / (e^s + sum of e^others))
    wanted = (alike & ~itself).to(losses.dtype)
    return (losses * wanted).sum() / wanted.sum()


def _triplets(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of anchors, positives and negatives, as the batch was drawn."""
    if batch.triplets is not None:
        anchor, positive, negative = batch.triplets.unbind(1)
        return anchor, positive, negative
    count = batch.positives  # each of these pairs has the same number of negatives, which follow in its order
    times = (len(batch.first) - count) // count
    return batch.first[count:], batch.second[:count].repeat_interleave(times), batch.second[count:]


def _semi_hard(apart: Tensor, alike: Tensor, anchors: Tensor, near: Tensor) -> Tensor:
    """(T,) positions: the nearest negative farther than the positive; where none is, the farthest of all."""
    others, to_all = ~alike[anchors], apart.detach()[anchors]  # (T, n)
    farther = others & (to_all > near.detach()[:, None])
    semi_hard = torch.where(farther, to_all, torch.inf).argmin(1)
    mildest = torch.where(others, to_all, -torch.inf).argmax(1)
    return torch.where(farther.any(1), semi_hard, mildest)
