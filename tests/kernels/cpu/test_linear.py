"""Products of few rows against torch's."""

from __future__ import annotations

import pytest
import torch

from andromeda.kernels.cpu.linear import MOST_ROWS, PackedLinear
from andromeda.kernels.cpu.memory import LARGE_PAGE, in_large_pages

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("rows", [*range(1, 18), MOST_ROWS, MOST_ROWS + 1])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (7, 33), (24, 64), (61, 24), (1000, 99)])
def test_it_is_torchs(rows: int, outputs: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(outputs, inputs, generator=generator)
    x = torch.randn(rows, inputs, generator=generator)
    out, exact = PackedLinear(weight)(x), x.double() @ weight.double().T
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 20])
def test_threads_and_weights_in_large_pages(rows: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    weight, x = torch.randn(1003, 2099), torch.randn(rows, 2 * 2099)[:, ::2]
    out = PackedLinear(weight)(x)
    torch.set_num_threads(before)
    torch.testing.assert_close(out.double(), x.double() @ weight.double().T, rtol=1e-4, atol=1e-4)


def test_large_pages_begin_where_pages_do() -> None:
    memory = in_large_pages(3, LARGE_PAGE // 4)
    assert memory.shape == (3, LARGE_PAGE // 4) and memory.data_ptr() % LARGE_PAGE == 0
    memory.fill_(1.0)
    assert memory.sum() == memory.numel()
