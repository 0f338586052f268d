"""The blocks of a step in which texts are written, on a CPU: one call of the C++ kernels."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from andromeda.config import AndromedaConfig
from andromeda.inference.engine.memory import has_room
from andromeda.inference.engine.packed import PackedBlock
from andromeda.inference.engine.pages import Pages
from andromeda.kernels import Geometry
from andromeda.kernels.cpu.attention import slopes_of, takes, windows_of
from andromeda.kernels.cpu.blocks import Blocks, OfBlock, Shape
from andromeda.kernels.paged import MAX_NEW
from andromeda.model import Andromeda
from andromeda.positions import rotary

LOG = logging.getLogger(__name__)


def cpu_blocks(model: Andromeda, blocks: Sequence[PackedBlock], pages: Pages) -> Blocks | None:
    """None where the kernels are not for this model, or the machine has none, or no memory for the weights again."""
    config, first = model.config, blocks[0]
    if not takes(first.way_in.dtype, first.way_in.device, config.dim_head, MAX_NEW, rotary(config)):
        return None
    again = model.output_weight.nbytes + sum(block.way_in.nbytes + block.way_out.nbytes for block in blocks)
    if not has_room(again):
        LOG.warning(
            "texts are written by the slower path: %.1f GiB of weights fit into memory once only", again / 2**30
        )
        return None
    shape = Shape(
        config.dim, first.inner, config.heads, config.kv_heads, config.dim_head, config.ff_activation,
        config.shift_tokens, config.deepnorm_alpha if config.deepnorm else None, first.norm.eps, config.normalises_qk,
        rotary(config),
    )  # fmt: skip
    return Blocks(shape, [_of_block(config, block, pages) for block in blocks])


def _of_block(config: AndromedaConfig, block: PackedBlock, pages: Pages) -> OfBlock:
    attention, index = block.attention, block.index
    geometry = Geometry(slopes=attention.slopes, windows=attention.windows(block.way_in.dtype))
    return OfBlock(
        block.way_in, block.way_out, block.factor, block.norm.weight.detach(), slopes_of(geometry, config.heads),
        windows_of(geometry, config.heads), pages.keys_of[index], pages.values_of[index],
        pages.shifts_of[index][0] if pages.shifts is not None else None,
    )  # fmt: skip
