"""Prefill: from a prompt to the logits of its last token, and a cache, as fast as the device allows.

A parallel block is two matrix products (queries, feed-forward, keys and values as one; both ways out as another),
attention, and three passes of `kernels.pointwise`. The last block computes keys and values for all tokens, and the rest
for the last token alone. In fp8 the products of all blocks but the last multiply e4m3 numbers:

* Weights have one scale a matrix. e4m3 is a floating-point format, so a scale only has to keep values in its range of
  17 binary orders, not to fit them closely.
* What LayerNorm gives has a certain bound, sqrt(dim) * max|weight|, hence a fixed scale that cannot overflow.
* Attention's output and the activation have a scale a row, measured; it is multiplied in after the product.
* Normalised queries and keys need no measuring. Of the global heads, which do most of attention's work in a long
  prompt, q.k multiplies e4m3 numbers too, with the temperature shared among both sides; xPos's decay would leave
  e4m3's range.

Shapes: B batch, T tokens, H query heads, D dim_head, R = T + shift_tokens rows a sequence (see `kernels.pointwise`).
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from andromeda import positions
from andromeda.cache import Cache
from andromeda.config import AndromedaConfig
from andromeda.errors import AndromedaError
from andromeda.kernels import Geometry
from andromeda.model import Andromeda, Block

PRECISIONS = ("fp32", "bf16", "fp8")
E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class _Matrix:
    """(out, in) weights; in e4m3 to be multiplied by `scale`."""

    value: Tensor
    scale: Tensor | None = None

    def product(self, a: Tensor, out: Tensor, a_scale: Tensor | None = None) -> None:
        """out = a @ value.T, with a (rows, in) in e4m3 if the weights are."""
        if self.scale is None:
            torch.mm(a, self.value.t(), out=out)
            return
        assert a_scale is not None
        torch._scaled_mm(
            a, self.value.t(), scale_a=a_scale, scale_b=self.scale, out_dtype=out.dtype, use_fast_accum=True, out=out
        )


@dataclass(frozen=True)
class _Layer:
    """A block's weights, as the runner reads them."""

    inward: _Matrix  # rows: queries, feed-forward, keys, values
    outward: _Matrix  # columns: attention, feed-forward
    norm: Tensor  # (dim,) float32
    q_gain: Tensor | None  # (H, D) float32
    k_gain: Tensor | None  # (kv_heads, D)
    bounds: Tensor | None  # (H,) without log-n
    windows: Tensor | None


@dataclass(frozen=True)
class _Space:
    """Memory that all blocks share."""

    x: Tensor  # (B, R, dim) residual, in delayed rows
    h: Tensor | None  # the same, normalised, where that is not the residual
    h8: Tensor | None  # the same in e4m3
    h_scales: list[Tensor]  # () a block
    fused: Tensor  # (B, R, columns): queries, then attention's output | feed-forward | keys | values
    keys: Tensor  # (1 or 2, B, kv_heads, S, D)
    q8: Tensor | None  # (B, T, global heads, D) in e4m3
    keys8: Tensor | None  # (1, B, kv_heads, S, D) in e4m3
    out: Tensor  # (B, R, dim)
    act8: Tensor | None  # (B * R, H * D + ff) attention's output and the activation in e4m3
    act_scales: Tensor | None  # (B, R)
    one: Tensor  # () 1.0


class Prefill:
    """A runner of one model's prompts. Weights are packed once: after a change of the model build a new one.

    Where its kernels cannot run (no CUDA device, a configuration that they do not cover) the model itself does the
    work; `reason` says why.

    Args:
        model: its parameters stay as they are.
        precision: 'bf16', or 'fp8' (products in e4m3, the rest in bf16); 'fp32' for tests under Triton's interpreter.
        graph: without a cache, record a prompt length's kernels as a CUDA graph and replay them: it saves the time
            to launch them, which counts for short prompts.

    Raises:
        AndromedaError: no such precision.
    """

    def __init__(self, model: Andromeda, precision: str = "bf16", *, graph: bool = False) -> None:
        if precision not in PRECISIONS:
            raise AndromedaError(f"prefill: precision={precision!r} is not one of {', '.join(PRECISIONS)}")
        self.model, self.config, self.precision = model, model.config, precision
        self.device = model.output_weight.device
        self.reason = why_not(self.config, precision, self.device)
        self.graph = graph and self.device.type == "cuda"
        self.heads8 = heads_in_fp8(self.config) if precision == "fp8" else 0
        self._space: tuple[tuple[int, int, int], _Space] | None = None
        self._recorded: tuple[tuple[int, int], torch.cuda.CUDAGraph, Tensor, Tensor, _Space] | None = None
        if self.reason is None:
            on_gpu = self.device.type == "cuda" and precision != "fp32"
            self.dtype = torch.bfloat16 if on_gpu or precision == "bf16" else torch.float32
            with torch.no_grad():
                self._layers = [self._pack(block) for block in model.blocks]

    @torch.no_grad()
    def __call__(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits (B, 1, num_tokens) of the last of the tokens ids (B, T).

        Args:
            ids: token ids.
            cache: what came before; it is extended by these tokens.
        """
        if self.reason is not None:
            return self.model(ids, cache=cache, last_only=True)
        self.model._check_ids(ids)
        with self._on_device():
            if self.graph and cache is None:
                return self._replay(ids)
            return self._run(ids, cache)

    @torch.no_grad()
    def hidden(self, ids: Tensor) -> Tensor:
        """Output of the last block for all tokens, normalised: (B, T, dim). For measures of quality."""
        if self.reason is not None:
            return self.model.hidden(ids)
        from andromeda.kernels.pointwise import from_delayed_rows

        with self._on_device():
            step = self._begin(ids, None)
            for n in range(self.config.depth):
                self._block(n, step)
            x = from_delayed_rows(step.space.x, self.config.shift_tokens, 0, step.tokens)
            if not self.config.deepnorm:
                x = x + step.space.out[:, : step.tokens]
            return self.model.norm(x.to(self.model.output_weight.dtype))

    # ---- weights ---------------------------------------------------------------------------------

    def _pack(self, block: Block) -> _Layer:
        attention, ff, config = block.attention, block.feed_forward, self.config
        queries = config.heads * config.dim_head
        qkv = attention.to_qkv.weight
        exact = self._is_exact(block.index)
        gained = config.attn_qk_norm_dim_scale
        return _Layer(
            inward=self._matrix(torch.cat([qkv[:queries], ff.up.weight, qkv[queries:]]), exact),
            outward=self._matrix(torch.cat([attention.to_out.weight, ff.down.weight], dim=1), exact),
            norm=block.norm.weight.detach().float(),
            q_gain=attention.q_gain.detach().float() if gained else None,
            k_gain=attention.k_gain.detach().float() if gained else None,
            bounds=attention.bounds(self.dtype),
            windows=attention.windows(self.dtype),
        )

    def _is_exact(self, n: int) -> bool:
        """Whether block n keeps its precision: the last, whose large product is keys and values, the rest one row."""
        return n == self.config.depth - 1

    def _matrix(self, weight: Tensor, exact: bool) -> _Matrix:
        if self.precision != "fp8" or exact:
            return _Matrix(weight.to(self.dtype))
        scale = weight.abs().amax().float() / E4M3_MAX
        return _Matrix((weight.float() / scale).to(E4M3), scale)

    # ---- one prompt ------------------------------------------------------------------------------

    def _run(self, ids: Tensor, cache: Cache | None) -> Tensor:
        step = self._begin(ids, cache)
        for n in range(self.config.depth - 1):
            self._block(n, step)
        hidden = self._last_block(step)
        if cache is not None:
            cache.advance(step.tokens)
        return self.model.logits(hidden.to(self.model.output_weight.dtype))

    def _begin(self, ids: Tensor, cache: Cache | None) -> _Step:
        held, (batch, tokens) = 0 if cache is None else cache.length, ids.shape
        step = _Step(self._memory(batch, tokens, held), tokens, held, cache)
        self._enter(ids, step)
        return step

    def _memory(self, batch: int, tokens: int, held: int) -> _Space:
        shape = batch, tokens, held
        if self._space is None or self._space[0] != shape:
            self._space = None  # gives the old one's memory back first
            self._space = shape, self._allocate(batch, tokens, held)
        return self._space[1]

    def _allocate(self, batch: int, tokens: int, held: int) -> _Space:
        config, fp8 = self.config, self.precision == "fp8"
        rows, sorts = tokens + config.shift_tokens, 2 if config.num_rotated_heads else 1
        inner, columns = self._columns

        def new(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=self.device)

        residual = batch, rows, config.dim
        bounds = [self._norm_bound(n) for n in range(config.depth)] if fp8 else []
        return _Space(
            x=new(*residual).zero_(),
            h=None if config.deepnorm else new(*residual).zero_(),
            h8=new(*residual, dtype=torch.uint8).zero_().view(E4M3) if fp8 else None,
            h_scales=[bound / E4M3_MAX for bound in bounds],
            fused=new(batch, rows, columns),
            keys=new(sorts, batch, config.kv_heads, held + tokens, config.dim_head),
            q8=new(batch, tokens, self.heads8, config.dim_head, dtype=E4M3) if self.heads8 else None,
            keys8=new(1, batch, config.kv_heads, held + tokens, config.dim_head, dtype=E4M3) if self.heads8 else None,
            out=new(*residual),
            act8=new(batch * rows, inner, dtype=E4M3) if fp8 else None,
            act_scales=new(batch, rows, dtype=torch.float32) if fp8 else None,
            one=torch.ones((), device=self.device),
        )

    @property
    def _columns(self) -> tuple[int, int]:
        """Columns of queries and feed-forward, and of these with keys and values."""
        config = self.config
        inner = config.heads * config.dim_head + config.ff_mult * config.dim
        return inner, inner + 2 * config.kv_heads * config.dim_head

    def _norm_bound(self, n: int) -> Tensor:
        """() the largest magnitude of what block n reads; 1 where it is to be measured."""
        from andromeda.kernels.pointwise import norm_bound

        source = n - 1 if self.config.deepnorm else n
        if source < 0:
            return torch.ones((), device=self.device)
        return norm_bound(self._layers[source].norm, self.config.dim)

    def _enter(self, ids: Tensor, step: _Step) -> None:
        """The embedding, in delayed rows, where the first block looks for it."""
        from andromeda.kernels.pointwise import to_delayed_rows

        space, shift = step.space, self.config.shift_tokens
        x = self.model.embedding(ids).to(self.dtype)
        to_delayed_rows(x, shift, space.x)
        if space.h is not None:
            x = F.layer_norm(x, x.shape[-1:], self._layers[0].norm.to(x.dtype), eps=self.model.blocks[0].norm.eps)
            to_delayed_rows(x, shift, space.h)
        if space.h8 is not None and self.config.depth > 1:
            if self.config.deepnorm:  # an embedding has no bound
                space.h_scales[0].copy_((x.abs().amax().float() / E4M3_MAX).clamp(min=1e-30))
            to_delayed_rows((x / space.h_scales[0]).to(E4M3).view(torch.uint8), shift, space.h8.view(torch.uint8))

    def _stages(self, n: int, step: _Step) -> dict[str, Callable[[], object]]:
        """What block n does, in this order."""
        return {
            "product in": lambda: self._product_in(n, step),
            "prepare": lambda: self._keys(n, self._queries(step), step),
            "attention": lambda: self._attention(n, step),
            "activation": lambda: self._activate(n, step),
            "product out": lambda: self._product_out(n, step),
            "add, norm, shift": lambda: self._add(n, step),
        }

    def _block(self, n: int, step: _Step) -> None:
        for stage in self._stages(n, step).values():
            stage()

    def _product_in(self, n: int, step: _Step) -> None:
        h, layer, space = self._input(n, step.space), self._layers[n], step.space
        self._pass_on(n, h, step)
        layer.inward.product(h.flatten(0, 1)[: step.rows], step.fused, space.h_scales[n] if space.h_scales else None)

    def _queries(self, step: _Step) -> Tensor:
        """(B, T, H, D) where they are."""
        config = self.config
        return step.space.fused[:, : step.tokens, : config.heads * config.dim_head].unflatten(-1, (config.heads, -1))

    def _attention(self, n: int, step: _Step) -> None:
        q, keys, v, geometry = self._queries(step), step.space.keys, step.values[n], self._geometry(n, step)
        if step.space.q8 is None or step.space.keys8 is None or self._is_exact(n):
            _attend(q, keys, v, geometry, q)
            return
        heads, cut = self.config.heads, self.config.heads - self.heads8
        if cut > 0:
            kv = self._kv_heads(0, cut)
            _attend(q[:, :, :cut], keys[:, :, kv], v[:, :, kv], geometry.of_heads(0, cut), q[:, :, :cut])
        kv, reaching = self._kv_heads(cut, heads), geometry.of_heads(cut, heads)
        _attend(step.space.q8, step.space.keys8[:, :, kv], v[:, :, kv], reaching, q[:, :, cut:])

    def _kv_heads(self, first: int, end: int) -> slice:
        """Those of query heads first..end - 1."""
        group = self.config.heads // self.config.kv_heads
        return slice(first // group, -(-end // group))

    def _activate(self, n: int, step: _Step) -> None:
        from andromeda.kernels import pointwise

        config, space, (inner, _) = self.config, step.space, self._columns
        plain = config.heads * config.dim_head
        if self._layers[n].outward.scale is None:
            pointwise.activate(step.fused[:, plain:inner], config.ff_activation)
            return
        assert space.act8 is not None and space.act_scales is not None
        pointwise.activate_to_fp8(
            step.fused[:, :inner], plain, config.ff_activation, space.act8[: step.rows], space.act_scales.flatten()
        )

    def _product_out(self, n: int, step: _Step) -> None:
        space, outward, out = step.space, self._layers[n].outward, step.space.out.flatten(0, 1)[: step.rows]
        a = (
            step.fused[:, : self._columns[0]]
            if outward.scale is None or space.act8 is None
            else space.act8[: step.rows]
        )
        outward.product(a, out, space.one)  # the scales of rows wait for `_add`

    def _add(self, n: int, step: _Step) -> None:
        """Residual and LayerNorm; what comes out stands where block n + 1 looks for it."""
        from andromeda.kernels import pointwise

        config, space = self.config, step.space
        if n == config.depth - 1 and not config.deepnorm:
            return
        target, scaled = self._input(n + 1, space), self._layers[n].outward.scale is not None
        pointwise.add_norm_shift(
            space.x, space.out, self._layers[n if config.deepnorm else n + 1].norm,
            shift=config.shift_tokens, alpha=config.deepnorm_alpha if config.deepnorm else 1.0,
            eps=self.model.blocks[n].norm.eps, post=config.deepnorm, o_scale=space.act_scales if scaled else None,
            h=None if target is space.x else target, h_scale=space.h_scales[n + 1] if target is space.h8 else None,
        )  # fmt: skip

    def _input(self, n: int, space: _Space) -> Tensor:
        """(B, R, dim) in delayed rows: what block n reads."""
        if space.h8 is not None and n < self.config.depth - 1:
            return space.h8
        return space.x if space.h is None else space.h

    def _pass_on(self, n: int, h: Tensor, step: _Step) -> None:
        """Token-shift states: the last tokens go to the cache, those before come from it."""
        from andromeda.kernels.pointwise import from_delayed_rows

        cache, shift, width = step.cache, self.config.shift_tokens, self.config.dim // (self.config.shift_tokens + 1)
        if cache is None or shift == 0:
            return
        before = cache.shift_state(n, 0)
        given = min(shift, step.tokens)
        if not self.config.deepnorm and h.dtype == E4M3:
            state = from_delayed_rows(h.view(torch.uint8), shift, step.tokens - given, given).view(E4M3)
            state = (state.float() * step.space.h_scales[n]).to(self.dtype)
        else:
            state = from_delayed_rows(step.space.x if self.config.deepnorm else h, shift, step.tokens - given, given)
        if given < shift:
            older = state.new_zeros(len(state), shift, self.config.dim) if before is None else before.to(state.dtype)
            state = torch.cat([older, state], dim=1)[:, -shift:]
        cache.set_shift_state(n, 0, state)
        if before is None:
            return
        if h.dtype == E4M3:
            before = (before.float() / step.space.h_scales[n]).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
        for i in range(1, shift + 1):  # row t < i lacks part i, which is that of token t - i
            part = slice(i * width, (i + 1) * width)
            rows = min(i, h.shape[1])
            _bytes(h)[:, :rows, part.start * h.element_size() : part.stop * h.element_size()] = _bytes(
                before[:, shift - i : shift - i + rows, part].contiguous()
            )

    def _keys(self, n: int, q: Tensor | None, step: _Step) -> None:
        """Prepares q in place and all keys as the kernel takes them; finds all values."""
        config, layer, exact = self.config, self._layers[n], self._is_exact(n)
        inner, columns = self._columns
        kv = step.space.fused[:, : step.tokens, inner:columns].unflatten(-1, (2 * config.kv_heads, config.dim_head))
        k, v = kv.split(config.kv_heads, dim=2)
        self._prepare(q, k, layer, step.held, step, exact)
        step.values[n] = v
        if step.cache is None:
            return
        all_k, all_v = step.cache.append(n, step.space.keys[0, :, :, step.held :].transpose(1, 2), v)
        if step.held > 0:
            self._prepare(None, all_k[:, : step.held], None, 0, step, exact)
            step.values[n] = all_v

    def _prepare(
        self, q: Tensor | None, k: Tensor | None, layer: _Layer | None, offset: int, step: _Step, exact: bool
    ) -> None:
        """Without a layer: keys that are normalised already. `exact`: nothing in e4m3."""
        from andromeda.kernels.pointwise import prepare_queries_and_keys as prepare

        config, space = self.config, step.space
        q_gain, k_gain = (None, None) if layer is None else (layer.q_gain, layer.k_gain)
        cut = config.heads - (0 if exact else self.heads8)
        scale, rotary = config.qk_temperature * LOG2_E, positions.rotary(config)
        normalise = layer is not None and config.normalises_qk
        trained_length = config.max_seq_len if self._sharpens(step) else None
        prepare(
            None if q is None or cut == 0 else q[:, :, :cut], k, space.keys, rotary=rotary, offset=offset, scale=scale,
            q_gain=None if q_gain is None else q_gain[:cut], k_gain=k_gain, normalise=normalise,
            local_heads=config.alibi_num_heads, trained_length=trained_length,
        )  # fmt: skip
        if cut < config.heads:
            prepare(
                None if q is None else q[:, :, cut:], k, space.keys8, rotary=None, offset=offset,
                scale=math.sqrt(scale), key_scale=math.sqrt(scale), q_gain=None if q_gain is None else q_gain[cut:],
                k_gain=k_gain, normalise=normalise, local_heads=max(0, config.alibi_num_heads - cut),
                trained_length=trained_length, out=None if q is None else space.q8,
            )  # fmt: skip

    def _sharpens(self, step: _Step) -> bool:
        return self.config.log_n_temperature and step.held + step.tokens > self.config.max_seq_len

    def _geometry(self, n: int, step: _Step) -> Geometry:
        config, layer, bounds = self.config, self._layers[n], self._layers[n].bounds
        if bounds is not None and self._sharpens(step):
            sharpest = math.log(step.held + step.tokens) / math.log(config.max_seq_len)
            is_global = torch.arange(config.heads, device=bounds.device) >= config.alibi_num_heads
            bounds = torch.where(is_global, bounds * sharpest, bounds)
        slopes = self.model.blocks[n].attention.slopes if config.alibi_pos_bias else None
        return Geometry(
            slopes=slopes, windows=layer.windows, bounds=bounds, rotary=positions.rotary(config),
            local_heads=config.num_local_heads,
        )  # fmt: skip

    def _last_block(self, step: _Step) -> Tensor:
        """(B, 1, dim): the last token's output, normalised."""
        from andromeda.kernels.pointwise import from_delayed_rows

        config, space, n = self.config, step.space, self.config.depth - 1
        layer, (inner, _), plain = self._layers[n], self._columns, config.heads * config.dim_head
        h = self._input(n, space)
        self._pass_on(n, h, step)
        torch.mm(h.flatten(0, 1)[: step.rows], layer.inward.value[inner:].t(), out=step.fused[:, inner:])
        self._keys(n, None, step)
        last = F.linear(h[:, step.tokens - 1 : step.tokens], layer.inward.value[:inner])
        q = last[..., :plain].unflatten(-1, (config.heads, -1)).contiguous()
        self._prepare(q, None, layer, step.held + step.tokens - 1, step, exact=True)
        attended = _attend(q, space.keys, step.values[n], self._geometry(n, step), torch.empty_like(q)).flatten(2)
        o = F.linear(torch.cat([attended, _activation(config)(last[..., plain:])], dim=-1), layer.outward.value)
        x = from_delayed_rows(space.x, config.shift_tokens, step.tokens - 1, 1)
        if not config.deepnorm:
            return self.model.norm((x + o).to(self.model.output_weight.dtype))
        x = x.float() * config.deepnorm_alpha + o.float()
        return F.layer_norm(x, x.shape[-1:], layer.norm, eps=self.model.blocks[n].norm.eps)

    # ---- the device ------------------------------------------------------------------------------

    def _on_device(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _replay(self, ids: Tensor) -> Tensor:
        shape = ids.shape[0], ids.shape[1]
        if self._recorded is None or self._recorded[0] != shape:
            self._recorded = None
            self._recorded = shape, *self._record(ids)
        _, graph, source, result, _ = self._recorded
        source.copy_(ids)
        graph.replay()
        return result.clone()

    def _record(self, ids: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor, _Space]:
        source, graph, side = ids.clone(), torch.cuda.CUDAGraph(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, and lets libraries set up what cannot be recorded
            self._run(source, None)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            result = self._run(source, None)
        return graph, source, result, self._memory(len(ids), ids.shape[1], 0)  # which has to live as long as the graph


@dataclass(frozen=True)
class _Step:
    """One call: `tokens` new ones behind `held` old ones."""

    space: _Space
    tokens: int
    held: int
    cache: Cache | None
    values: dict[int, Tensor] = field(default_factory=dict)  # block -> (B, S, kv_heads, D)

    @property
    def fused(self) -> Tensor:
        """(rows, columns) of space.fused."""
        return self.space.fused.flatten(0, 1)[: self.rows]

    @property
    def rows(self) -> int:
        """Rows of all sequences, up to the last token of the last: what the products multiply."""
        batch, rows = self.space.x.shape[:2]
        return batch * rows - (rows - self.tokens)


def heads_in_fp8(config: AndromedaConfig) -> int:
    """How many heads, the last ones, multiply q and k in e4m3: the global ones, if normalised and not rotated."""
    local = config.num_local_heads
    divides_groups = config.kv_heads == 1 or local % (config.heads // config.kv_heads) == 0
    if config.normalises_qk and config.num_rotated_heads <= local and divides_groups:
        return config.heads - local
    return 0


def why_not(config: AndromedaConfig, precision: str, device: torch.device) -> str | None:
    """Why the kernels cannot run a model there; None: they can."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda" and not interpreted:
        return f"the model is on {device.type}, and the kernels need a CUDA device"
    if precision == "fp32" and not interpreted:
        return "precision='fp32' is for Triton's interpreter"
    if precision == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return "precision='fp8' needs a GPU of compute capability 8.9 or later"
    return _not_covered(config, precision)


def _not_covered(config: AndromedaConfig, precision: str) -> str | None:
    if not config.parallel_blocks:
        return "parallel_blocks=False is not covered"
    if config.use_abs_pos_emb:
        return "use_abs_pos_emb=True is not covered"
    if not config.attn_flash:
        return "attn_flash=False asks for the reference"
    if config.dim_head not in (32, 64, 128):
        return f"dim_head={config.dim_head} is not covered: 32, 64 and 128 are"
    inner = config.heads * config.dim_head + config.ff_mult * config.dim
    if config.dim % 16 or inner % 16:
        return f"dim={config.dim} is not a multiple of 16"
    if precision == "fp8" and config.depth < 2:
        return "precision='fp8' needs two blocks"
    return None


def _activation(config: AndromedaConfig) -> Callable[[Tensor], Tensor]:
    named: dict[str, Callable[[Tensor], Tensor]] = {
        "relu2": lambda x: F.relu(x) ** 2, "gelu": F.gelu, "silu": F.silu,
    }  # fmt: skip
    return named[config.ff_activation]


def _attend(q: Tensor, keys: Tensor, v: Tensor, geometry: Geometry, out: Tensor) -> Tensor:
    from andromeda.kernels.flash import prepared_attention

    return prepared_attention(q, keys, v, geometry, out=out)


def _bytes(x: Tensor) -> Tensor:
    """e4m3 has no copies of parts on every device; bytes have."""
    return x.view(torch.uint8)
