"""The embedding's kernels, interpreted where there is no GPU, against plain PyTorch and exact sums."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from andromeda.kernels import embedding as module
from andromeda.kernels.embedding import embed, embedding, embedding_backward

pytestmark = pytest.mark.usefixtures("poisoned_memory")
ROWS, DIM = 23, 20
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles and pieces at small sizes that do not divide each other."""
    monkeypatch.setattr(module, "GATHER_TILE", (4, 16))
    monkeypatch.setattr(module, "SUM_TILE", (2, 16))
    monkeypatch.setattr(module, "PIECE", 8)


def sums(ids: Tensor, grad: Tensor, rows: int = ROWS) -> Tensor:
    """The gradient, exactly."""
    return torch.zeros(rows, grad.shape[-1], dtype=torch.float64, device=grad.device).index_add_(
        0, ids.flatten().long(), grad.flatten(0, -2).double()
    )


def whole_numbers(*shape: int) -> Tensor:
    """Whose sums are exact in float32."""
    return torch.randint(-99, 100, shape, device=DEVICE).float()


def runs(*lengths: int) -> Tensor:
    """Token v occurs lengths[v] times, at random places."""
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
    return ids[torch.randperm(len(ids))].to(DEVICE)


@pytest.mark.usefixtures("small_tiles")
class TestForward:
    @pytest.mark.parametrize(("kind", "dtype"), [(torch.int32, torch.float16), (torch.int64, torch.float32)])
    @pytest.mark.parametrize("shape", [(0,), (1,), (3, 0), (9,), (2, 7), (2, 3, 2)])
    def test_is_the_rows(self, shape: tuple[int, ...], kind: torch.dtype, dtype: torch.dtype) -> None:
        weight = torch.randn(ROWS, DIM, device=DEVICE, dtype=dtype)
        ids = torch.randint(ROWS, shape, device=DEVICE, dtype=kind)
        assert torch.equal(embedding(ids, weight), weight[ids.long()])

    @pytest.mark.parametrize("dim", [1, 16, 17, 64])
    def test_at_any_width(self, dim: int) -> None:
        weight, ids = torch.randn(ROWS, dim, device=DEVICE), torch.randint(ROWS, (11,), device=DEVICE)
        assert torch.equal(embedding(ids, weight), weight[ids])

    def test_of_strided_memory(self) -> None:
        weight = torch.randn(DIM, ROWS, device=DEVICE).t()
        ids = torch.randint(ROWS, (6, 4), device=DEVICE).t()
        assert torch.equal(embedding(ids, weight), weight[ids])

    def test_an_unknown_id_is_not_a_number(self) -> None:
        weight = torch.randn(ROWS, DIM, device=DEVICE)
        ids = torch.tensor([0, ROWS, -1, ROWS - 1], device=DEVICE)
        out = embedding(ids, weight)
        assert out[1:3].isnan().all()
        assert torch.equal(out[[0, 3]], weight[[0, ROWS - 1]])


@pytest.mark.usefixtures("small_tiles")
class TestBackward:
    # around pieces of 8: none whole, one aligned, one whole between others, several, everything one token
    LENGTHS = (
        (), (1,), (7,), (8,), (9,), (3, 8), (8, 8, 8), (3, 15, 2), (3, 16, 2), (5, 3, 8), (1,) * 23, (0, 0, 40, 0, 5),
        (50,), (4, 29, 0, 1, 17, 9),
    )  # fmt: skip

    @pytest.mark.parametrize("lengths", LENGTHS, ids=str)
    def test_is_the_sum_of_each_tokens_places(self, lengths: tuple[int, ...]) -> None:
        ids = runs(*lengths)
        grad = whole_numbers(len(ids), DIM)
        assert torch.equal(embedding_backward(grad, ids, ROWS).double(), sums(ids, grad))

    def test_rows_never_seen_get_zero(self) -> None:
        ids = torch.tensor([5, 5, 7], device=DEVICE)
        grad = embedding_backward(whole_numbers(3, DIM), ids, ROWS)
        unseen = [v for v in range(ROWS) if v not in (5, 7)]
        assert (grad[unseen] == 0).all()
        assert (grad[[5, 7]] != 0).any(1).all()

    @pytest.mark.parametrize("kind", [torch.int32, torch.int64])
    def test_through_autograd(self, kind: torch.dtype) -> None:
        weight = torch.randn(ROWS, DIM, device=DEVICE, requires_grad=True)
        ids = torch.randint(ROWS, (5, 7), device=DEVICE, dtype=kind)
        grad = whole_numbers(DIM, 7, 5).permute(2, 1, 0)  # strided
        (found,) = torch.autograd.grad(embedding(ids, weight), weight, grad)
        assert torch.equal(found.double(), sums(ids, grad))

    def test_an_unknown_id_has_no_gradient(self) -> None:
        ids = torch.tensor([-1, 3, ROWS, 3, 2**31 - 1], device=DEVICE)
        grad = whole_numbers(5, DIM)
        known = torch.tensor([1, 3], device=DEVICE)
        expected = sums(ids[known], grad[known])
        assert torch.equal(embedding_backward(grad, ids, ROWS).double(), expected)

    def test_is_repeatable(self) -> None:
        ids = runs(4, 29, 0, 1, 17, 9)
        grad = torch.randn(len(ids), DIM, device=DEVICE)
        assert torch.equal(embedding_backward(grad, ids, ROWS), embedding_backward(grad, ids, ROWS))

    def test_a_long_segment_is_summed_in_pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of a token's 60 places the last pass reads the two ends alone, and for the others the sums of the pieces."""
        from andromeda.kernels import embedding_kernels as kernels

        ids = torch.cat([torch.zeros(3), torch.ones(60)]).long().to(DEVICE)  # whole pieces: places 8..55
        grad = whole_numbers(len(ids), DIM)
        expected, pieces, launcher = sums(ids, grad), [], kernels.segment_kernel

        class Watched:
            def __getitem__(self, grid):
                def launch(*args, **kwargs):
                    pieces.append(args[3])
                    grad[8:56] = torch.nan
                    launcher[grid](*args, **kwargs)

                return launch

        monkeypatch.setattr(kernels, "segment_kernel", Watched())
        assert torch.equal(embedding_backward(grad, ids, ROWS).double(), expected)
        assert len(pieces[0]) == len(ids) // 8
        assert pieces[0][0].isnan().all(), "the first piece is of two tokens, and of no use"


def test_sums_in_float32() -> None:
    """In float16 a sum of ones stops at 2,048."""
    ids = runs(4096, 2049)
    grad = embedding_backward(torch.ones(len(ids), 3, dtype=torch.float16, device=DEVICE), ids, ROWS)
    assert grad.dtype == torch.float16
    assert (grad[0] == 4096).all()


class TestOperator:
    def test_opcheck(self, small_tiles: None) -> None:
        weight = torch.randn(ROWS, DIM, device=DEVICE, requires_grad=True)
        for ids in (torch.randint(ROWS, (2, 9), device=DEVICE), torch.randint(ROWS, (0,), device=DEVICE)):
            torch.library.opcheck(embedding, (ids, weight))
            grad = torch.randn(*ids.shape, DIM, device=DEVICE)
            torch.library.opcheck(embedding_backward, (grad, ids, ROWS))

    def test_compiles_without_a_break(self, small_tiles: None) -> None:
        weight = torch.randn(ROWS, DIM, device=DEVICE, requires_grad=True)
        ids = torch.randint(ROWS, (2, 9), device=DEVICE)
        compiled = torch.compile(lambda i, w: embedding(i, w) * 2, backend="aot_eager", fullgraph=True)
        (found,) = torch.autograd.grad(compiled(ids, weight).sum(), weight)
        assert torch.equal(found.double(), sums(ids, torch.full((18, DIM), 2.0, device=DEVICE)))

    def test_off_cuda_it_is_pytorchs(self) -> None:
        weight = torch.randn(ROWS, DIM, dtype=torch.float64, requires_grad=True)
        ids = torch.randint(ROWS, (2, 9))
        assert torch.equal(embed(ids, weight), F.embedding(ids, weight))
        assert "EmbeddingBackward0" in str(embed(ids, weight).grad_fn)
        with pytest.raises(IndexError):
            embed(torch.tensor([ROWS]), weight)

    def test_without_triton(self) -> None:
        code = """
import sys
sys.modules["triton"] = None
import torch
from andromeda.kernels.embedding import embed
from andromeda.kernels.loss import linear_cross_entropy
out = embed(torch.tensor([1, 0]), torch.eye(2))
print(linear_cross_entropy(out, torch.eye(2), torch.tensor([1, 0])))
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "0.3133" in done.stdout


@pytest.mark.gpu
class TestOnGPU:
    ROWS, DIM = 50432, 2560

    def ids(self, tokens: int) -> Tensor:
        """Zipf's law, and one token 10,000 times more."""
        odds = 1 / torch.arange(1, self.ROWS + 1, device="cuda", dtype=torch.float64)
        ids = torch.multinomial(odds, tokens, replacement=True)
        if tokens > 10_000:
            ids[torch.randperm(tokens, device="cuda")[:10_000]] = 31
        return ids

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("tokens", [1, 127, 1000, 32768])
    def test_parity_with_pytorch(self, tokens: int, dtype: torch.dtype) -> None:
        weight = torch.randn(self.ROWS, self.DIM, device="cuda", dtype=dtype, requires_grad=True)
        ids = self.ids(tokens)[None]
        out, plain = embed(ids, weight), F.embedding(ids, weight)
        assert torch.equal(out, plain)
        grad = torch.randn_like(out)
        (found,) = torch.autograd.grad(out, weight, grad)
        (theirs,) = torch.autograd.grad(plain, weight, grad)
        truth = sums(ids, grad, self.ROWS)
        error, bar = ((x.double() - truth).norm() / truth.norm() for x in (found, theirs))
        assert error <= 2 * bar + 1e-7
        seen = torch.zeros(self.ROWS, dtype=torch.bool, device="cuda").index_fill_(0, ids[0], True)
        assert (found[~seen] == 0).all()

    def test_two_runs_are_identical(self) -> None:
        weight = torch.randn(self.ROWS, self.DIM, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        ids = self.ids(102_400)
        grad = torch.randn(102_400, self.DIM, device="cuda", dtype=torch.bfloat16)
        first, second = (torch.autograd.grad(embed(ids, weight), weight, grad)[0] for _ in range(2))
        assert torch.equal(first, second)

    def test_never_waits_for_the_device(self) -> None:
        """Nor do its shapes depend on the ids: a CUDA graph holds it."""
        weight = torch.randn(self.ROWS, self.DIM, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        ids, grad = self.ids(8192), torch.randn(8192, self.DIM, device="cuda", dtype=torch.bfloat16)

        def run() -> Tensor:
            return torch.autograd.grad(embed(ids, weight), weight, grad)[0]

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        ids.copy_(self.ids(8192))
        graph.replay()
        assert torch.equal(captured, run())

    def test_opcheck(self) -> None:
        weight = torch.randn(1000, 640, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        torch.library.opcheck(embedding, (torch.randint(1000, (4, 500), device="cuda"), weight))
