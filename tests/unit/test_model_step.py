"""An update is the same in however many pieces it is worked off, and one that is broken off leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from model import optim
from model.init import initialise
from model.net import SiameseNet
from model.spec import config
from model.step import Interrupted, Updates
from tests.unit.siamese import POINT, TINY, drawings

DRAWINGS = drawings(1)
PXK = {"batches": "pxk", "characters": 6, "drawings": 3, "alphabets": 2, "negatives": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "sigmoid pxk": PXK,
    "contrastive": {"loss": "contrastive"},
    "triplet": {"loss": "triplet"},
    "triplet pxk": {"loss": "triplet", **PXK},
    "semi-hard": {"loss": "triplet", "mining": "semi-hard"},
    "semi-hard pxk": {"loss": "triplet", "mining": "semi-hard", **PXK},
    "softmax": {"loss": "softmax", **PXK},
    "classes": {"loss": "classes", "classes": 21},
    "classes pxk": {"loss": "classes", "classes": 21, **PXK},
    "fixed": {"fixed_pairs": 20, "distorted_copies": 1},
}
LIVELY = {"norm": "batch", "fc": [10, 8], "dropout": 0.5}


def updates(pieces: int, **settings: Any) -> Updates:
    recipe = config(POINT, {**TINY, **settings}, 0)
    net = SiameseNet(recipe.net)
    initialise(net, "he", torch.Generator().manual_seed(0))
    net.on("cpu")
    made = optim.optimizer(net, recipe)
    optim.schedule(made, recipe, 1)

    def stream(purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(len(purpose))

    result = Updates(net, made, DRAWINGS, recipe, stream, bf16=False)
    result.pieces = pieces
    return result


def everything(made: Updates) -> dict[str, Tensor]:
    """All that an update changes."""
    kept = {f"net.{name}": tensor for name, tensor in made.net.state_dict().items()}
    kept |= optim.memory(made.optim, made.net, made.config)
    kept["generator"] = made.generator.get_state()
    return {name: tensor.clone() for name, tensor in kept.items()}


def never() -> bool:
    return False


def after(questions: int) -> Callable[[], bool]:
    left = questions

    def interrupt() -> bool:
        nonlocal left
        left -= 1
        return left < 0

    return interrupt


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pieces", [2, 3, 5])
def test_a_batch_in_pieces_takes_the_step_of_a_whole_one(shape: str, pieces: int) -> None:
    whole, parts = updates(1, **SHAPES[shape]), updates(pieces, **SHAPES[shape])
    for step in range(3):
        one, other = whole.make(step, never), parts.make(step, never)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert one.dtype == torch.float64
    expected = everything(whole)
    for name, tensor in everything(parts).items():
        torch.testing.assert_close(tensor, expected[name], rtol=2e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("shape", ["sigmoid", "softmax", "semi-hard", "fixed"])
@pytest.mark.parametrize("lively", [False, True])
def test_an_update_broken_off_at_any_question_leaves_no_trace(shape: str, lively: bool) -> None:
    settings = {**SHAPES[shape], **(LIVELY if lively else {})}
    straight, broken = updates(3, **settings), updates(3, **settings)
    straight.make(0, never)
    broken.make(0, never)
    before = everything(broken)
    assert lively is any("running_mean" in name for name in before)
    questions = 0
    while True:
        try:
            broken.make(1, after(questions))
            break
        except Interrupted:
            now = everything(broken)
            assert now.keys() == before.keys()
            for name, tensor in now.items():
                assert torch.equal(tensor, before[name]), (name, questions)
        questions += 1
    assert questions >= 2
    straight.make(1, never)
    expected = everything(straight)
    for name, tensor in everything(broken).items():
        assert torch.equal(tensor, expected[name]), name


def test_an_update_in_one_piece_asks_nobody() -> None:
    made = updates(1)
    made.make(0, after(0))


def test_l2_acts_on_weights_and_leaves_biases_and_norms_alone() -> None:
    """Without a slope only L2 moves a weight."""
    made = updates(1, norm="batch")
    before = {name: parameter.clone() for name, parameter in made.net.named_parameters()}
    for group in made.optim.param_groups:
        decays = any(parameter.dim() > 1 for parameter in group["params"])
        assert (group["weight_decay"] > 0) is decays
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    made.optim.step()
    for name, parameter in made.net.named_parameters():
        assert torch.equal(parameter, before[name]) is (parameter.dim() == 1), name
    updated = {id(parameter) for group in made.optim.param_groups for parameter in group["params"]}
    assert updated == {id(parameter) for parameter in made.net.parameters()}
