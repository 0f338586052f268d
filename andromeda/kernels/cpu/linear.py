"""Products of few rows with a large matrix, by linear.cpp."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from andromeda.kernels.cpu.library import library
from andromeda.kernels.cpu.memory import in_large_pages
from andromeda.kernels.cpu.structures import N, P

WIDTH = 8  # outputs of a panel, as in linear.cpp
MOST_ROWS = 128  # of more, torch's product is as fast (benchmarked on a CPU with AVX2)


def in_panels(weight: Tensor) -> Tensor:
    """(N, K) -> (ceil(N / WIDTH), K, WIDTH) as the kernel reads it, padded with zeros."""
    outputs, inputs = weight.shape
    whole, rest = divmod(outputs, WIDTH)
    panels = in_large_pages(whole + bool(rest), inputs, WIDTH)
    with torch.no_grad():
        panels[:whole] = weight[: whole * WIDTH].view(whole, WIDTH, inputs).transpose(1, 2)
        if rest:
            panels[whole] = F.pad(weight[whole * WIDTH :].T, (0, WIDTH - rest))
    return panels


class PackedLinear:
    """`F.linear` with a fixed weight (N, K), which is held a second time, in panels. Inference only."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.panels = weight, in_panels(weight)
        kernels = library()
        assert kernels is not None
        self._call = kernels.andromeda_linear

    def __call__(self, x: Tensor) -> Tensor:
        """(rows, K) -> (rows, N)."""
        if len(x) > MOST_ROWS:
            return F.linear(x, self.weight)
        x = x.contiguous()
        outputs, inputs = self.weight.shape
        out = torch.empty(len(x), outputs)
        self._call(
            P(x.data_ptr()), N(inputs), P(self.panels.data_ptr()), P(out.data_ptr()), N(len(x)), N(outputs), N(inputs),
            N(torch.get_num_threads()),
        )  # fmt: skip
        return out
