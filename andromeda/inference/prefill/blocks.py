"""What the blocks compute, stage by stage, with the kernels; nothing here waits for the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from andromeda import positions
from andromeda.cache import Cache
from andromeda.config import AndromedaConfig
from andromeda.inference.prefill.memory import Space
from andromeda.inference.prefill.weights import E4M3, E4M3_MAX, Layer, columns, norm_scale, up_scale
from andromeda.kernels import Geometry, pointwise
from andromeda.kernels.feed_forward import squared_relu_product
from andromeda.kernels.flash import prepared_attention
from andromeda.kernels.pointwise import from_delayed_rows, to_delayed_rows

LOG2_E = math.log2(math.e)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu2": lambda x: F.relu(x) ** 2, "gelu": F.gelu, "silu": F.silu,
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One pass through the blocks: `tokens` new ones a sequence behind `held` old ones, which the cache holds."""

    config: AndromedaConfig
    layers: Sequence[Layer]
    space: Space
    tokens: int
    held: int
    cache: Cache | None
    values: dict[int, Tensor] = field(default_factory=dict)  # block -> (B, S, kv_heads, D)

    def enter(self, x: Tensor) -> None:
        """The embedding x (B, T, dim), in delayed rows, where the first block looks for it."""
        space, shift, first = self.space, self.config.shift_tokens, self.layers[0]
        to_delayed_rows(x, shift, space.x)
        if space.h is not None:
            x = F.layer_norm(x, x.shape[-1:], first.norm.to(x.dtype), eps=first.eps)
            to_delayed_rows(x, shift, space.h)
        if space.h8 is not None:
            if self.config.deepnorm:  # an embedding has no bound
                space.h_scales[0].copy_((x.abs().amax().float() / E4M3_MAX).clamp(min=1e-30))
            to_delayed_rows(_bytes(self._in_e4m3(0, x)), shift, _bytes(space.h8))

    def block(self, n: int) -> None:
        for stage in self.stages(n).values():
            stage()

    def stages(self, n: int) -> dict[str, Callable[[], object]]:
        """What block n does, in this order."""
        activation = {} if self._apart(n) else {"activation": lambda: self._activation(n)}
        return {
            "product in": lambda: self._product_in(n),
            "prepare": lambda: self._keys_and_values(n, self._queries(n)),
            "attention": lambda: self._attention(n),
            **activation,
            "product out": lambda: self._product_out(n),
            "add, norm, shift": lambda: self._add(n),
        }

    def all_blocks(self) -> Tensor:
        """(B, T, dim): what comes out of the last block, before the norm at the end of a pre-norm model."""
        for n in range(self.config.depth):
            self.block(n)
        x = from_delayed_rows(self.space.x, self.config.shift_tokens, 0, self.tokens)
        return x if self.config.deepnorm else x + self.space.out[:, : self.tokens]

    def last_block(self) -> Tensor:
        """(B, 1, dim): the same for the last token, behind all blocks but the last."""
        config, space, n = self.config, self.space, self.config.depth - 1
        layer, (queries, inner, _) = self.layers[n], columns(config)
        h = self._input(n)
        self._pass_on(n, h)
        torch.mm(
            h.flatten(0, 1)[: self._rows], layer.inward.value[inner:].t(), out=self._of_rows(self._fused(n))[:, inner:]
        )
        self._keys_and_values(n, None)
        last = F.linear(h[:, self.tokens - 1 : self.tokens], layer.inward.value[:inner])
        q = last[..., :queries].unflatten(-1, (config.heads, -1)).contiguous()
        self._prepare(n, q, None, self.held + self.tokens - 1)
        attended = prepared_attention(q, space.keys, self.values[n], self._geometry(n), out=torch.empty_like(q))
        activated = ACTIVATIONS[config.ff_activation](last[..., queries:])
        o = F.linear(torch.cat([attended.flatten(2), activated], dim=-1), layer.outward.value)
        x = from_delayed_rows(space.x, config.shift_tokens, self.tokens - 1, 1)
        if not config.deepnorm:
            return x + o
        x = x.float() * config.deepnorm_alpha + o.float()
        return F.layer_norm(x, x.shape[-1:], layer.norm, eps=layer.eps)

    # ---- the stages ------------------------------------------------------------------------------

    def _product_in(self, n: int) -> None:
        h, space, layer = self._input(n), self.space, self.layers[n]
        self._pass_on(n, h)
        rows = self._of_rows(h)
        layer.inward.product(rows, self._of_rows(self._fused(n)), self._scale(n))
        if layer.up is not None:
            assert space.act8 is not None
            queries, _, _ = columns(self.config)
            squared_relu_product(rows, layer.up, self._of_rows(space.act8)[:, queries:], up_scale(self.config))

    def _keys_and_values(self, n: int, q: Tensor | None) -> None:
        """Prepares q and all keys as attention takes them; finds all values."""
        config, space, (_, inner, end) = self.config, self.space, self._columns(n)
        kv = self._fused(n)[:, : self.tokens, inner:end].unflatten(-1, (2 * config.kv_heads, config.dim_head))
        k, v = kv.split(config.kv_heads, dim=2)
        self._prepare(n, q, k, self.held)
        if self.cache is not None:
            all_k, all_v = self.cache.append(n, space.keys[0, :, :, self.held :].transpose(1, 2), v)
            if self.held > 0:
                self._prepare(n, None, all_k[:, : self.held], 0, raw=False)
                v = all_v
        self.values[n] = v

    def _prepare(self, n: int, q: Tensor | None, k: Tensor | None, offset: int, *, raw: bool = True) -> None:
        """q in place or to space.q8, keys into their slots. Not raw: normalised already, with their gains."""
        config, layer, space = self.config, self.layers[n], self.space
        cut, temperature = config.heads - layer.heads8, config.qk_temperature * LOG2_E
        q_gain, k_gain = (layer.q_gain, layer.k_gain) if raw else (None, None)
        prepare = partial(
            pointwise.prepare_queries_and_keys, k=k, k_gain=k_gain, offset=offset,
            normalise=raw and config.normalises_qk, trained_length=config.max_seq_len if self._sharpens else None,
        )  # fmt: skip
        prepare(
            None if q is None or cut == 0 else q[:, :, :cut], keys=space.keys, scale=temperature,
            q_gain=None if q_gain is None else q_gain[:cut], rotary=positions.rotary(config),
            local_heads=config.alibi_num_heads,
        )  # fmt: skip
        if cut < config.heads:
            shared = math.sqrt(temperature)
            prepare(
                None if q is None else q[:, :, cut:], keys=space.keys8, scale=shared, key_scale=shared,
                q_gain=None if q_gain is None else q_gain[cut:], rotary=None,
                local_heads=max(0, config.alibi_num_heads - cut), out=None if q is None else space.q8,
            )  # fmt: skip

    def _attention(self, n: int) -> None:
        """In place of the queries, or to e4m3; the heads in e4m3 apart."""
        config, space, q, geometry = self.config, self.space, self._queries(n), self._geometry(n)
        target = q
        if self._apart(n):
            assert space.act8 is not None
            target = space.act8[:, : self.tokens, : columns(config)[0]].unflatten(-1, (config.heads, -1))
        cut, group = config.heads - self.layers[n].heads8, config.heads // config.kv_heads
        for first, end, prepared, keys in (
            (0, cut, q[:, :, :cut], space.keys),
            (cut, config.heads, space.q8, space.keys8),
        ):
            if first < end:
                assert prepared is not None and keys is not None
                kv = slice(first // group, -(-end // group))
                prepared_attention(
                    prepared, keys[:, :, kv], self.values[n][:, :, kv], geometry.of_heads(first, end),
                    out=target[:, :, first:end], out_scale=self.layers[n].attention_scale,
                )  # fmt: skip

    def _activation(self, n: int) -> None:
        space, kind, (queries, inner, _) = self.space, self.config.ff_activation, columns(self.config)
        fused = self._of_rows(self._fused(n))
        if self.layers[n].outward.scale is None:
            pointwise.activate(fused[:, queries:inner], kind)
            return
        assert space.act8 is not None and space.act_scales is not None
        pointwise.activate_to_fp8(fused[:, :inner], queries, kind, self._of_rows(space.act8), space.act_scales)

    def _product_out(self, n: int) -> None:
        space, outward, (_, inner, _) = self.space, self.layers[n].outward, columns(self.config)
        out = self._of_rows(space.out)
        if outward.scale is None:
            outward.product(self._of_rows(self._fused(n))[:, :inner], out)
            return
        assert space.act8 is not None and space.act_scales is not None
        scale = self._scale(n) if self._apart(n) else space.act_scales[: self._rows]
        outward.product(self._of_rows(space.act8), out, scale)

    def _add(self, n: int) -> None:
        """Residual and LayerNorm; what comes out stands where block n + 1 looks for it."""
        config, space = self.config, self.space
        if n == config.depth - 1 and not config.deepnorm:
            return
        target, after = self._input(n + 1), self.layers[n if config.deepnorm else n + 1]
        pointwise.add_norm_shift(
            space.x, space.out, after.norm, shift=config.shift_tokens, eps=after.eps, post=config.deepnorm,
            alpha=config.deepnorm_alpha if config.deepnorm else 1.0,
            h=None if target is space.x else target,
            h_factor=1.0 / norm_scale(config) if target is space.h8 else None,
        )  # fmt: skip

    # ---- what the stages share -------------------------------------------------------------------

    @property
    def _rows(self) -> int:
        """Rows of all sequences, up to the last token of the last: what the products multiply."""
        batch, rows = self.space.x.shape[:2]
        return batch * rows - (rows - self.tokens)

    def _of_rows(self, x: Tensor) -> Tensor:
        """(B, R, columns) -> (_rows, columns)."""
        return x.flatten(0, 1)[: self._rows]

    def _scale(self, n: int) -> Tensor | None:
        """(_rows, 1) of what block n reads in e4m3."""
        return self.space.h_scales[n][: self._rows] if self.space.h_scales else None

    def _apart(self, n: int) -> bool:
        """Whether block n's feed-forward goes into act8 by a kernel of its own."""
        return self.layers[n].up is not None

    def _columns(self, n: int) -> tuple[int, int, int]:
        """Where queries, feed-forward, and keys and values end in `_fused(n)`."""
        return columns(self.config, ff=not self._apart(n))

    def _fused(self, n: int) -> Tensor:
        """(B, R, columns) at the beginning of space.fused: what block n's first product writes."""
        (batch, rows, _), width = self.space.fused.shape, self._columns(n)[-1]
        return self.space.fused.flatten()[: batch * rows * width].view(batch, rows, width)

    def _queries(self, n: int) -> Tensor:
        """(B, T, H, D) where they are."""
        queries, _, _ = columns(self.config)
        return self._fused(n)[:, : self.tokens, :queries].unflatten(-1, (self.config.heads, -1))

    def _input(self, n: int) -> Tensor:
        """(B, R, dim) in delayed rows: what block n reads."""
        space = self.space
        if space.h8 is not None and n < self.config.depth - 1:
            return space.h8
        return space.x if space.h is None else space.h

    def _pass_on(self, n: int, h: Tensor) -> None:
        """Token-shift states: the last tokens of h go to the cache, those before come from it."""
        cache, space, shift = self.cache, self.space, self.config.shift_tokens
        if cache is None or shift == 0:
            return
        before = cache.shift_state(n, 0)
        given, width = min(shift, self.tokens), self.config.dim // (shift + 1)
        if not self.config.deepnorm and h.dtype == E4M3:
            state = from_delayed_rows(_bytes(h), shift, self.tokens - given, given).view(E4M3)
            state = (state.float() * self._unit(n)).to(space.x.dtype)
        else:
            state = from_delayed_rows(space.x if self.config.deepnorm else h, shift, self.tokens - given, given)
        if given < shift:
            older = state.new_zeros(len(state), shift, self.config.dim) if before is None else before.to(state.dtype)
            state = torch.cat([older, state], dim=1)[:, -shift:]
        cache.set_shift_state(n, 0, state)
        if before is None:
            return
        if h.dtype == E4M3:
            before = self._in_e4m3(n, before)
        for i in range(1, shift + 1):  # row t < i lacks part i, which is that of token t - i
            part = slice(i * width, (i + 1) * width)
            rows = min(i, h.shape[1])
            _bytes(h)[:, :rows, part.start * h.element_size() : part.stop * h.element_size()] = _bytes(
                before[:, shift - i : shift - i + rows, part].contiguous()
            )

    def _unit(self, n: int) -> Tensor:
        """What 1 in space.h8 is, a number for all channels or each."""
        reads, scale = self.layers[n].reads, self.space.h_scales[n][0]
        return scale if reads is None else scale * reads

    def _in_e4m3(self, n: int, h: Tensor) -> Tensor:
        """What block n reads, as it stands in space.h8: 0 where the LayerNorm's weight is, of which h is a multiple."""
        unit = self._unit(n)
        return (h / unit.where(unit != 0, math.inf)).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)

    @property
    def _sharpens(self) -> bool:
        return self.config.log_n_temperature and self.held + self.tokens > self.config.max_seq_len

    def _geometry(self, n: int) -> Geometry:
        config, layer, bounds = self.config, self.layers[n], self.layers[n].bounds
        if bounds is not None and self._sharpens:
            sharpest = math.log(self.held + self.tokens) / math.log(config.max_seq_len)
            is_global = torch.arange(config.heads, device=bounds.device) >= config.alibi_num_heads
            bounds = torch.where(is_global, bounds * sharpest, bounds)
        return Geometry(
            slopes=layer.slopes, windows=layer.windows, bounds=bounds, rotary=positions.rotary(config),
            local_heads=config.num_local_heads,
        )  # fmt: skip


def _bytes(x: Tensor) -> Tensor:
    """e4m3 has no copies of parts on every device; bytes have."""
    return x.view(torch.uint8)
