"""Whatever a block keeps for its backward pass the gradients are the same, and in eight bits they are near."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from andromeda.errors import AndromedaError
from andromeda.model import Andromeda
from andromeda.training import fp8
from andromeda.training.engines import Engine, build_engine
from andromeda.training.processes import Processes
from andromeda.training.recipe import DataRecipe, Recipe
from tests.training.conftest import TINY

CPU = torch.device("cpu")


def engine_of(**keys: Any) -> Engine:
    torch.manual_seed(0)
    recipe = Recipe(data=DataRecipe(train="a.txt"), model={"preset": "nano"}, **keys)
    return build_engine(recipe, Andromeda(TINY), Processes(0, 1, CPU))


def gradients(engine: Engine) -> dict[str, Tensor]:
    """Of two batches, one after the other."""
    ids = torch.randint(TINY.num_tokens, (2, 3, 40), generator=torch.Generator().manual_seed(1))
    for number, part in enumerate(ids):
        engine.accumulate((part, part.roll(-1, 1), None), part.numel(), last=number == 1)
    return {name: p.grad for name, p in engine.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("how", ["selective", "full"])
def test_what_is_computed_again_is_the_same(how: str, precision: str) -> None:
    expected = gradients(engine_of(precision=precision))
    found = gradients(engine_of(precision=precision, checkpointing=how))
    assert found.keys() == expected.keys() == dict(Andromeda(TINY).named_parameters()).keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def operations_and_kept(how: str) -> tuple[int, int]:
    """Of the matrix products of a step, and bytes that the graph of a forward pass holds."""
    engine = engine_of(checkpointing=how)
    ids = torch.randint(TINY.num_tokens, (1, 64), generator=torch.Generator().manual_seed(1))
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = engine.objective((ids, ids.roll(-1, 1), None)).sum()
        loss.backward()
    return counter.get_flop_counts()["Global"][torch.ops.aten.mm], sum(kept.values())


def test_selective_computes_no_product_again_and_full_keeps_the_least() -> None:
    none, selective, full = map(operations_and_kept, ("none", "selective", "full"))
    assert selective[0] == none[0] < full[0]
    assert full[1] < none[1] and selective[1] < none[1]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["none", "selective", "full"])
def test_compiled_blocks_compute_the_same(how: str) -> None:
    expected = gradients(engine_of())
    for name, gradient in gradients(engine_of(compile=True, checkpointing=how)).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


class TestFp8:
    def test_gradients_are_near_and_weights_keep_their_names(self) -> None:
        pytest.importorskip("torchao")
        exact, near = engine_of(), engine_of(precision="fp8")
        assert near.weights().keys() == exact.weights().keys()
        assert all(torch.equal(x, near.weights()[name]) for name, x in exact.weights().items())
        expected, found = gradients(exact), gradients(near)
        for name, gradient in expected.items():
            error = (found[name] - gradient).norm() / gradient.norm()
            assert 0 < error < 0.2, name

    def test_the_products_of_blocks_alone(self) -> None:
        pytest.importorskip("torchao")
        model = engine_of(precision="fp8").model
        names = {type(module).__name__ for block in model.blocks for module in block.modules()}
        assert "Float8Linear" in names and "Linear" not in names
        assert type(model.to_logits).__name__ == "Linear"

    def test_an_old_gpu(self) -> None:
        with (
            mock.patch("torch.cuda.is_available", return_value=True),
            mock.patch("torch.cuda.get_device_capability", return_value=(8, 0)),
            mock.patch("torch.cuda.get_device_name", return_value="A100"),
            pytest.raises(AndromedaError, match="needs a GPU of Ada, Hopper or later; A100"),
        ):
            fp8.check_fp8()

    def test_torchao_is_missing(self) -> None:
        missing = mock.patch.object(fp8, "find_spec", return_value=None)
        with missing, pytest.raises(AndromedaError, match="needs torchao"):
            fp8.check_fp8()
