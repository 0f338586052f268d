"""The loss, its units and its precision."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from andromeda.model import IGNORED, Andromeda
from andromeda.training.objective import Batch, NextToken, bits_per_byte, total_nats

CPU = torch.device("cpu")


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(64, (3, 16), generator=generator)
    targets = torch.randint(64, (3, 16), generator=generator)
    targets[1, 10:] = IGNORED
    return ids, targets, (torch.arange(16) >= 7).long().expand(3, 16).contiguous()


def test_losses_are_those_of_the_logits(model: Andromeda, batch: Batch) -> None:
    ids, targets, documents = batch
    logits = model(ids, documents=documents)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    torch.testing.assert_close(NextToken(model, CPU)(batch), expected.view(3, 16))


def test_bits_per_byte_by_hand(model: Andromeda, batch: Batch) -> None:
    ids, targets, documents = batch
    probabilities = model(ids, documents=documents).double().softmax(-1)
    bits = 0.0
    for row in range(3):
        for column in range(16):
            if targets[row, column] != IGNORED:
                bits -= math.log2(probabilities[row, column, targets[row, column]].item())
    first = (ids[:2], targets[:2], None if documents is None else documents[:2])
    last = (ids[2:], targets[2:], None if documents is None else documents[2:])
    assert bits_per_byte(total_nats(NextToken(model, CPU), [first, last]).item(), num_bytes=70) == pytest.approx(
        bits / 70, rel=1e-6
    )


def test_a_uniform_model_costs_the_logarithm_of_its_vocabulary(model: Andromeda, batch: Batch) -> None:
    with torch.no_grad():
        model.output_weight.zero_()
    targets = int((batch[1] != IGNORED).sum())
    assert bits_per_byte(total_nats(NextToken(model, CPU), [batch]).item(), num_bytes=targets) == pytest.approx(
        6.0
    )  # log2(64)


def test_bfloat16_is_finite_and_close(model: Andromeda, batch: Batch) -> None:
    gradients = {}
    for precision in (torch.float32, torch.bfloat16):
        losses = NextToken(model, CPU, precision)(batch)
        assert losses.dtype == torch.float32
        losses.sum().backward()
        gradients[precision] = [
            parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None
        ]
        model.zero_grad()
        if precision is torch.float32:
            exact = losses.detach()
    assert losses.isfinite().all()
    assert not torch.equal(losses, exact)  # it did compute in bfloat16
    torch.testing.assert_close(losses.detach(), exact, rtol=0.02, atol=0.02)
    for rough, full in zip(gradients[torch.bfloat16], gradients[torch.float32], strict=True):
        assert rough.dtype == torch.float32 and rough.isfinite().all()
        assert (rough - full).norm() <= 0.05 * full.norm() + 1e-3
