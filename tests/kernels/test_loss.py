"""The loss head against float64: plain PyTorch in chunks, and the kernels (interpreted where there is no GPU).

The bar: at most twice the error of F.cross_entropy(F.linear(...)) in the same precision.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from andromeda.kernels import loss as module
from andromeda.kernels.loss import chunk_rows, chunked_cross_entropy, fused_cross_entropy, linear_cross_entropy

pytestmark = pytest.mark.usefixtures("poisoned_memory")
Loss = Callable[..., Tensor]

VOCABULARY, DIM, IGNORED = 37, 16, -100
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOTH = pytest.mark.parametrize("loss", [chunked_cross_entropy, fused_cross_entropy])


@pytest.fixture(autouse=True)
def _small_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 tokens at a time, and 16 logits of a row."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(module, "LOSS_CHUNK", 8 * VOCABULARY)
        monkeypatch.setattr(module, "ROW_MULTIPLE", 4)
        monkeypatch.setattr(module, "BLOCK", 16)
        monkeypatch.setattr(module, "_budget", lambda _: module.LOSS_CHUNK)


def plain_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = IGNORED, smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:  # fmt: skip
    """By the formulas: the mean of -log p takes `smoothing` of the target's place; z_loss (log Z)^2 is added."""
    logits = F.linear(hidden, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    log_p, log_z = logits.log_softmax(-1), logits.logsumexp(-1)
    counts = targets != ignore_index
    hit = -log_p.gather(-1, targets.where(counts, 0)[:, None])[:, 0]
    losses = (1 - smoothing) * hit + smoothing * -log_p.mean(-1) + z_loss * log_z**2
    return losses.where(counts, 0.0)


def inputs(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and weights that learn, targets of which some are ignored."""
    hidden, weight = torch.randn(tokens, DIM, device=DEVICE), torch.randn(VOCABULARY, DIM, device=DEVICE)
    targets = torch.randint(VOCABULARY, (tokens,), device=DEVICE)
    targets[1::5] = IGNORED
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def results(
    loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor, **extra: float
) -> list[Tensor]:
    """Losses and both gradients for any gradient of the losses."""
    losses = loss(hidden, weight, targets, IGNORED, **extra)
    assert losses.shape == targets.shape
    return [losses.detach(), *torch.autograd.grad(losses, (hidden, weight), upstream.to(losses.dtype))]


def check(loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor, **extra: float) -> None:
    upstream = torch.randn(len(targets), device=hidden.device)
    found = results(loss, hidden, weight, targets, upstream, **extra)
    plain = results(plain_cross_entropy, hidden, weight, targets, upstream, **extra)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = results(plain_cross_entropy, exact[0], exact[1], targets, upstream, **extra)
    assert found[0].dtype == (torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    assert found[1].dtype == found[2].dtype == hidden.dtype
    for x, bar, t in zip(found, plain, truth, strict=True):
        allowed = 2 * (bar.double() - t).norm() + 3e-7 * t.norm()
        assert (x.double() - t).norm() <= allowed


class TestPrecision:
    @pytest.mark.parametrize("tokens", [0, 1, 7, 8, 9, 20])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @BOTH
    def test_is_near_the_truth(self, loss: Loss, dtype: torch.dtype, tokens: int) -> None:
        check(loss, *inputs(tokens, dtype))

    @pytest.mark.parametrize("extra", [{"smoothing": 0.1}, {"z_loss": 1e-2}, {"smoothing": 0.3, "z_loss": 0.1}])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @BOTH
    def test_smoothed_and_with_the_log_sum_exp(self, loss: Loss, dtype: torch.dtype, extra: dict[str, float]) -> None:
        hidden, weight, targets = inputs(11, dtype)
        check(loss, hidden, weight, targets, **extra)

    @pytest.mark.parametrize("tokens", [7, 20])
    def test_in_bfloat16(self, tokens: int) -> None:
        """The interpreter cuts bfloat16 short, so the kernels have this test on a GPU."""
        check(chunked_cross_entropy, *inputs(tokens, torch.bfloat16))

    @BOTH
    def test_of_large_logits(self, loss: Loss) -> None:
        hidden, weight, targets = inputs(9)
        check(loss, (hidden.detach() * 300).requires_grad_(), weight, targets)

    @BOTH
    def test_of_strided_memory(self, loss: Loss) -> None:
        hidden, weight, targets = inputs(9)
        hidden, weight = hidden.detach().t().contiguous().t(), weight.detach().t().contiguous().t()
        check(loss, hidden.requires_grad_(), weight.requires_grad_(), targets.repeat_interleave(2)[::2])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_what_the_model_calls(self, dtype: torch.dtype) -> None:
        check(linear_cross_entropy, *inputs(20, dtype))


class TestTargets:
    @BOTH
    def test_ignored_ones_count_nothing(self, loss: Loss) -> None:
        hidden, weight, _ = inputs(9)
        targets = torch.full((9,), 7, device=DEVICE)
        targets[3] = 8
        losses = loss(hidden, weight, targets, 7)
        assert (losses != 0).nonzero().flatten().tolist() == [3]
        d_hidden, d_weight = torch.autograd.grad(losses, (hidden, weight), torch.ones_like(losses))
        assert (d_hidden != 0).any(1).nonzero().flatten().tolist() == [3]
        (alone,) = torch.autograd.grad(plain_cross_entropy(hidden, weight, targets)[3], weight)
        torch.testing.assert_close(d_weight, alone)

    @pytest.mark.filterwarnings("ignore:All-NaN")  # of the interpreter
    def test_a_token_that_is_ignored_may_be_anything(self) -> None:
        hidden, weight, targets = inputs(9)
        with torch.no_grad():
            hidden[1] = torch.inf
        losses = fused_cross_entropy(hidden, weight, targets)
        assert losses[1] == 0
        (d_hidden,) = torch.autograd.grad(losses, hidden, torch.ones_like(losses))
        assert (d_hidden[1] == 0).all()
        assert d_hidden.isfinite().all()

    @pytest.mark.parametrize("wrong", [VOCABULARY, -1, 2**40])
    def test_one_that_does_not_exist_is_not_a_number(self, wrong: int) -> None:
        hidden, weight, targets = inputs(9)
        targets[4] = wrong
        losses = fused_cross_entropy(hidden, weight, targets)
        assert losses.isnan().nonzero().flatten().tolist() == [4]
        (d_hidden,) = torch.autograd.grad(losses, hidden, torch.ones_like(losses))
        assert d_hidden.isnan().any(1).nonzero().flatten().tolist() == [4]
        if not hidden.is_cuda:
            with pytest.raises(IndexError):
                linear_cross_entropy(hidden, weight, targets)

    def test_shapes_that_do_not_fit(self) -> None:
        hidden, weight, targets = inputs(9)
        for given_ in (
            (hidden, weight[:, 1:], targets),
            (hidden, weight, targets[1:]),
            (hidden[None], weight, targets),
        ):
            with pytest.raises(ValueError, match=r"loss: .*do not fit"):
                linear_cross_entropy(*given_)


class TestGradients:
    @pytest.mark.parametrize("learning", [0, 1])
    @pytest.mark.parametrize("tokens", [5, 20])
    @BOTH
    def test_of_one_alone(self, loss: Loss, tokens: int, learning: int) -> None:
        """A frozen vocabulary, or hidden states of a frozen model."""
        hidden, weight, targets = inputs(tokens)
        both = results(loss, hidden, weight, targets, torch.ones(tokens, device=DEVICE))[1:]
        frozen = [x.detach() for x in (hidden, weight)]
        frozen[learning].requires_grad_()
        losses = loss(frozen[0], frozen[1], targets, IGNORED)
        (found,) = torch.autograd.grad(losses.sum(), frozen[learning])
        assert torch.equal(found, both[learning])

    @pytest.mark.parametrize("tokens", [5, 20])
    def test_twice(self, tokens: int) -> None:
        hidden, weight, targets = inputs(tokens)
        losses = fused_cross_entropy(hidden, weight, targets)
        first, second = (torch.autograd.grad(losses.sum(), (hidden, weight), retain_graph=True) for _ in range(2))
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))

    def test_nothing_is_kept_where_nothing_learns(self) -> None:
        hidden, weight, targets = inputs(20)
        for keep, rows in ((True, 4), (False, 0)):  # three chunks of 8 or fewer
            kept = torch.ops.andromeda.linear_cross_entropy(hidden, weight, targets, IGNORED, 0.0, 0.0, keep)[2]
            assert kept.shape == (rows, VOCABULARY)
        with torch.no_grad():
            assert not fused_cross_entropy(hidden, weight, targets).requires_grad

    @BOTH
    def test_by_autocast(self, loss: Loss) -> None:
        """As if hidden states and weights had been given in float16; gradients in their own precision."""
        hidden, weight, targets = inputs(20)
        upstream = torch.ones(20, device=DEVICE)
        with torch.autocast(DEVICE, torch.float16):
            found = results(loss, hidden, weight, targets, upstream)
        halves = [x.detach().half().requires_grad_() for x in (hidden, weight)]
        expected = results(loss, halves[0], halves[1], targets, upstream)
        assert torch.equal(found[0], expected[0])
        for x, y in zip(found[1:], expected[1:], strict=True):
            assert x.dtype == torch.float32
            torch.testing.assert_close(x.half(), y, rtol=2e-3, atol=2e-3)


class _Largest(TorchDispatchMode):
    """Of all tensors that operations put out: how many elements the largest has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
        return out


class TestChunks:
    @given(st.integers(0, 300_000), st.integers(1, 300_000), st.integers(0, 2**31))
    def test_rows(self, tokens: int, vocabulary: int, budget: int) -> None:
        rows = chunk_rows(tokens, vocabulary, budget)
        assert rows % module.ROW_MULTIPLE == 0
        assert rows * vocabulary <= max(budget, module.ROW_MULTIPLE * vocabulary)
        most = max(1, budget // vocabulary // module.ROW_MULTIPLE) * module.ROW_MULTIPLE
        assert -(-tokens // max(1, rows)) == -(-tokens // most), "as few chunks as the budget allows"

    @BOTH
    def test_logits_of_all_tokens_are_never_held(self, loss: Loss, monkeypatch: pytest.MonkeyPatch) -> None:
        made: list[int] = []

        def linear(hidden: Tensor, weight: Tensor) -> Tensor:
            made.append(len(hidden))
            return F.linear(hidden, weight)

        monkeypatch.setattr(module, "F", SimpleNamespace(linear=linear, cross_entropy=F.cross_entropy))
        results(loss, *inputs(20), torch.ones(20, device=DEVICE))
        assert max(made) <= 8
        kept = 4 if loss is fused_cross_entropy else 0  # of the last chunk of 8, 8, 4
        assert sum(made) == 40 - kept, "once forward and once backward"

    def test_nothing_is_as_large_as_all_logits(self) -> None:
        """No tensor that is made, nor all together that the backward pass is kept."""

        def largest(loss: Loss) -> int:
            hidden, weight, targets = inputs(100)
            kept: dict[int, int] = {}

            def keep(x: Tensor) -> Tensor:
                storage = x.untyped_storage()
                kept[storage.data_ptr()] = storage.nbytes() // x.element_size()
                return x

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), _Largest() as made:
                results(loss, hidden, weight, targets, torch.ones(100, device=DEVICE))
            return max(made.elements, sum(kept.values()))

        assert largest(linear_cross_entropy) < 100 * VOCABULARY <= largest(plain_cross_entropy)

    @pytest.mark.slow
    def test_memory(self) -> None:
        """16,384 x 8,192 logits take 512 MiB in float32; plain PyTorch holds them at least once.

        What Python held at its peak before does not count, which is why more than half of them must show.
        """
        code = """
import resource, sys, torch, torch.nn.functional as F
from andromeda.kernels import loss
torch.set_num_threads(1)
loss.LOSS_CHUNK = 2**20
hidden, weight = (torch.randn(rows, 16, requires_grad=True) for rows in (16384, 8192))
targets = torch.randint(8192, (16384,))
def run(n):
    if sys.argv[1] == "plain":
        return F.cross_entropy(F.linear(hidden[:n], weight), targets[:n], reduction="none").sum().backward()
    loss.linear_cross_entropy(hidden[:n], weight, targets[:n]).sum().backward()
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
run(256)  # in two chunks: what is loaded then is not counted
before = peak()
run(16384)
print(peak() - before)
"""

        def mebibytes(which: str) -> int:
            call = [sys.executable, "-c", code, which]
            env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "100000"}  # what is freed goes back at once
            return int(subprocess.run(call, capture_output=True, text=True, check=True, env=env).stdout)

        assert mebibytes("plain") >= 300  # it is seen where it happens
        assert mebibytes("ours") < 64


class TestOperator:
    @pytest.mark.parametrize("tokens", [0, 9])
    def test_opcheck(self, tokens: int) -> None:
        hidden, weight, targets = inputs(tokens)
        torch.library.opcheck(module.forward, (hidden, weight, targets, IGNORED, 0.1, 1e-3, True))
        _, lse, kept = module.forward(hidden.detach(), weight.detach(), targets, IGNORED, 0.1, 1e-3, True)
        for needs in ((True, True), (False, False)):
            arguments = (torch.randn(tokens, device=DEVICE), hidden.detach(), weight.detach(), targets, lse, kept)
            torch.library.opcheck(module.backward, (*arguments, IGNORED, 0.1, 1e-3, *needs))

    def test_compiles_without_a_break(self) -> None:
        hidden, weight, targets = inputs(20)
        compiled = torch.compile(fused_cross_entropy, backend="aot_eager", fullgraph=True)
        upstream = torch.randn(20, device=DEVICE)
        found = results(lambda h, w, t, _: compiled(h, w, t), hidden, weight, targets, upstream)
        expected = results(fused_cross_entropy, hidden, weight, targets, upstream)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.gpu
class TestOnGPU:
    VOCABULARY, DIM = 50432, 2560

    def inputs(self, tokens: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
        hidden = torch.randn(tokens, self.DIM, device="cuda", dtype=dtype)
        weight = torch.randn(self.VOCABULARY, self.DIM, device="cuda", dtype=dtype) * 0.02
        targets = torch.randint(self.VOCABULARY, (tokens,), device="cuda")
        targets[1::7] = IGNORED
        return hidden.requires_grad_(), weight.requires_grad_(), targets

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("tokens", [1, 127, 1000, 4096])
    def test_parity(self, tokens: int, dtype: torch.dtype) -> None:
        check(linear_cross_entropy, *self.inputs(tokens, dtype))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_parity_of_many_chunks(self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_budget", lambda _: 512 * self.VOCABULARY)
        check(linear_cross_entropy, *self.inputs(4000, dtype))

    def test_two_runs_are_identical(self) -> None:
        arguments = self.inputs(20_000)
        upstream = torch.randn(20_000, device="cuda")
        first, second = (results(linear_cross_entropy, *arguments, upstream) for _ in range(2))
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))

    def test_memory_of_102_400_tokens(self) -> None:
        """Their logits alone would take 9.6 GiB in bfloat16: we hold two chunks of them, and the weight's gradient."""
        arguments = self.inputs(102_400)
        results(linear_cross_entropy, *self.inputs(1000), torch.ones(1000, device="cuda"))  # cuBLAS's workspace
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results(linear_cross_entropy, *arguments, torch.ones(102_400, device="cuda"))
        chunk = torch.cuda.get_device_properties(0).total_memory // module.SHARE
        wide = 4 * self.VOCABULARY * self.DIM
        allowed = 2 * chunk + 3 * wide + 2 * arguments[0].nbytes
        assert torch.cuda.max_memory_allocated() - before < allowed

    def test_never_waits_for_the_device(self) -> None:
        arguments, upstream = self.inputs(3000), torch.ones(3000, device="cuda")
        results(linear_cross_entropy, *arguments, upstream)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            results(linear_cross_entropy, *arguments, upstream)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_opcheck(self) -> None:
        hidden, weight, targets = (x.detach()[:1000] for x in self.inputs(1000))
        targets = targets.clamp(max=len(weight) - 1)
        torch.library.opcheck(module.forward, (hidden.requires_grad_(), weight, targets, IGNORED, 0.1, 1e-3, True))
