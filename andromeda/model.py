"""The model. What departs from a textbook decoder:

* ALiBi on the first heads (local), none on the others (global); rotary positions with xPos on the local heads only.
* Queries and keys are L2-normalised, so logits are bounded; under that bound local heads have certified windows.
* Global heads see no positions; beyond the trained length their logits are sharpened (log-n temperature).
* One key/value head for all query heads. Token shift before every sub-layer.
* Attention and feed-forward in parallel, DeepNorm around both, squared ReLU, no biases.

Shapes: B batch, T tokens, H query heads, D dim_head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from andromeda import positions
from andromeda.cache import Cache, next_shift_state, shift_tokens
from andromeda.config import AndromedaConfig
from andromeda.context import Context
from andromeda.errors import AndromedaError
from andromeda.kernels import Geometry, QKNorm, attention, embed, linear_cross_entropy, normalised_attention

EMBEDDING_STD = 0.02
IGNORED = -100  # a target that is not predicted

EmbeddingProvider = Callable[[AndromedaConfig], nn.Module]
EMBEDDING_PROVIDERS: dict[str, EmbeddingProvider] = {}


def register_embedding(name: str) -> Callable[[EmbeddingProvider], EmbeddingProvider]:
    """Makes an embedding known by name: what it is given is the config, what it returns maps (B, T) to (B, T, dim).

    To be tied to the output (`tie_embeddings`), it must have a `weight` of (num_tokens, dim).
    """

    def register(provider: EmbeddingProvider) -> EmbeddingProvider:
        EMBEDDING_PROVIDERS[name] = provider
        return provider

    return register


@register_embedding("AndromedaEmbedding")
class AndromedaEmbedding(nn.Embedding):
    """Token embedding: ids (B, T) -> (B, T, dim)."""

    def __init__(self, config: AndromedaConfig) -> None:
        super().__init__(config.num_tokens, config.dim)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=EMBEDDING_STD)

    def forward(self, ids: Tensor) -> Tensor:
        return embed(ids, self.weight)


Certificate = tuple[Tensor | None, Tensor | None]  # a block's bounds and windows, (heads,) each


class Ragged(Protocol):
    """Tokens of many texts laid flat, each behind what a cache holds of its text: what knows which token is whose.

    Attributes:
        positions: (T,) where each token stands in its text.
        longest: no text is longer, with these tokens.
        certificates: of each block, computed when first needed.
    """

    positions: Tensor
    longest: int
    certificates: dict[int, Certificate]

    def shift(self, block: int, slot: int, x: Tensor) -> Tensor:
        """`cache.shift_tokens` within each text: (1, T, dim) -> (1, T, dim)."""

    def attention(self, block: int, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry) -> Tensor:
        """Keeps keys and values, and attends to all of each text: (1, T, heads, dim_head) -> the same."""


@dataclass(frozen=True)
class Pass:
    """What all blocks of one forward pass share."""

    geometry: Geometry  # without bounds and windows, which each block has of its own
    q_scale: Tensor | None  # (1 or B, T, H, 1) log-n temperature; None: 1 everywhere
    cache: Cache | None
    context: Context | None = None
    ragged: Ragged | None = None


class Attention(nn.Module):
    """Multi-query attention over normalised queries and keys: (B, T, dim) -> (B, T, dim)."""

    slopes: Tensor

    def __init__(self, config: AndromedaConfig, block: int) -> None:
        super().__init__()
        self.config, self.block = config, block
        heads, kv_heads, dim_head = config.heads, config.kv_heads, config.dim_head
        self.to_qkv = nn.Linear(config.dim, (heads + 2 * kv_heads) * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, config.dim, bias=False)
        if config.attn_qk_norm_dim_scale:
            self.q_gain = nn.Parameter(torch.ones(heads, dim_head))
            self.k_gain = nn.Parameter(torch.ones(kv_heads, dim_head))
        self.register_buffer("slopes", torch.empty(heads), persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Fills what is not in a checkpoint."""
        self.slopes = torch.tensor(positions.head_slopes(self.config), device=self.to_out.weight.device)

    def forward(self, x: Tensor, step: Pass) -> Tensor:
        config = self.config
        q, k, v, geometry = self.project(x, step)
        if step.cache is None and step.q_scale is None and step.context is None and step.ragged is None:
            out = normalised_attention(q, k, v, geometry, self.qk_norm, flash=config.attn_flash)
            return self.to_out(out.flatten(2))
        q, k = self.normalise(q, k, step)
        if step.ragged is not None:
            return self.to_out(step.ragged.attention(self.block, q, k, v, geometry).flatten(2))
        if step.context is not None:
            return self.to_out(self._attend_in_context(q, k, v, geometry, step.context, step.cache).flatten(2))
        if step.cache is not None:
            k, v = step.cache.append(self.block, k, v)
        return self.to_out(attention(q, k, v, geometry, flash=config.attn_flash).flatten(2))

    def project(self, x: Tensor, step: Pass) -> tuple[Tensor, Tensor, Tensor, Geometry]:
        """Queries, keys and values as they come out of the product, (B, T, heads or kv_heads, D), and the geometry."""
        config = self.config
        heads, kv_heads = config.heads, config.kv_heads
        q, k, v = self.to_qkv(x).unflatten(-1, (-1, config.dim_head)).split([heads, kv_heads, kv_heads], dim=2)
        bounds, windows = self._certificate(q.dtype, step.ragged or step.cache)
        if bounds is not None and step.q_scale is not None:
            bounds = bounds * step.q_scale.amax((0, 1))[:, 0]
        return q, k, v, replace(step.geometry, slopes=self.slopes, bounds=bounds, windows=windows)

    def normalise(self, q: Tensor, k: Tensor, step: Pass) -> tuple[Tensor, Tensor]:
        """What `project` gave, as attention takes it: QK norm, gains and temperatures."""
        q, k = self.qk_norm(q, k)
        return q if step.q_scale is None else q * step.q_scale.to(q.dtype), k

    def _attend_in_context(
        self, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, context: Context, cache: Cache | None
    ) -> Tensor:
        k, v = context.keys_and_values(k, v)
        if cache is not None:
            cache.append(self.block, k[:, : context.tokens], v[:, : context.tokens])
        return context.attention(q, k, v, geometry, flash=self.config.attn_flash)

    @property
    def qk_norm(self) -> QKNorm:
        """With the gains as they are now."""
        config = self.config
        gains = (self.q_gain, self.k_gain) if config.attn_qk_norm_dim_scale else (None, None)
        return QKNorm(config.qk_temperature, config.normalises_qk, *gains)

    def bounds(self, dtype: torch.dtype = torch.float64) -> Tensor | None:
        """(H,) B_h, with room for the rounding of q and k to `dtype`; None without QK norm."""
        config = self.config
        if not config.normalises_qk:
            return None
        with torch.no_grad():
            if config.attn_qk_norm_dim_scale:
                bounds = positions.logit_bounds(self.q_gain.double(), self.k_gain.double(), config.qk_temperature)
            else:
                bounds = self.slopes.new_full((config.heads,), config.qk_temperature, dtype=torch.float64)
            return bounds * (1 + 2 * torch.finfo(dtype).eps)

    def windows(self, dtype: torch.dtype = torch.float64) -> Tensor | None:
        """(H,) int64 tokens that each head sees, certified by `bounds`; None where nothing can be."""
        if not self.config.has_windows:
            return None
        bounds = self.bounds(dtype)
        assert bounds is not None
        return positions.certified_windows(bounds, self.slopes.double(), self.config.window_epsilon)

    def _certificate(self, dtype: torch.dtype, kept: Cache | Ragged | None) -> Certificate:
        """Bounds and windows, computed once for a cache."""
        if kept is None:
            return self.bounds(dtype), self.windows(dtype)
        if self.block not in kept.certificates:
            kept.certificates[self.block] = self.bounds(dtype), self.windows(dtype)
        return kept.certificates[self.block]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Attention:
        super()._apply(fn, recurse)
        self.reset_buffers()  # a change of precision is not to round the slopes
        return self


class _SquaredReLU(torch.autograd.Function):
    """relu(x)^2 (So et al. 2021). The plain form's backward takes two passes more over the widest tensor of a block."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        x = F.relu(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return (grads[0] * F.relu(ctx.saved_tensors[0])).mul_(2)


class FeedForward(nn.Module):
    """(B, T, dim) -> (B, T, dim) through ff_mult * dim channels."""

    def __init__(self, config: AndromedaConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.dim, config.ff_mult * config.dim, bias=False)
        self.down = nn.Linear(config.ff_mult * config.dim, config.dim, bias=False)
        self.activation = config.ff_activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.activation == "relu2":
            x = _SquaredReLU.apply(x)
        else:
            x = F.gelu(x) if self.activation == "gelu" else F.silu(x)
        return self.down(x)


class Block(nn.Module):
    """Attention and feed-forward, parallel or in sequence, with DeepNorm or pre-norm: (B, T, dim) -> (B, T, dim)."""

    def __init__(self, config: AndromedaConfig, index: int) -> None:
        super().__init__()
        self.config, self.index = config, index
        self.attention = Attention(config, index)
        self.feed_forward = FeedForward(config)
        self.norm = nn.LayerNorm(config.dim, bias=False)
        if not config.parallel_blocks:
            self.ff_norm = nn.LayerNorm(config.dim, bias=False)

    def forward(self, x: Tensor, step: Pass) -> Tensor:
        def attend(h: Tensor) -> Tensor:
            return self.attention(h, step)

        if self.config.parallel_blocks:
            return self._residual(x, self.norm, 0, step, lambda h: attend(h) + self.feed_forward(h))
        x = self._residual(x, self.norm, 0, step, attend)
        return self._residual(x, self.ff_norm, 1, step, self.feed_forward)

    def _residual(
        self, x: Tensor, norm: nn.Module, slot: int, step: Pass, sublayer: Callable[[Tensor], Tensor]
    ) -> Tensor:
        if self.config.deepnorm:
            return norm(torch.add(sublayer(self._shift(x, slot, step)), x, alpha=self.config.deepnorm_alpha))
        return x + sublayer(self._shift(norm(x), slot, step))

    def _shift(self, x: Tensor, slot: int, step: Pass) -> Tensor:
        amount, cache = self.config.shift_tokens, step.cache
        if amount == 0:
            return x
        if step.ragged is not None:
            return step.ragged.shift(self.index, slot, x)
        if step.context is not None:
            shifted, state = step.context.shift(x, amount, step.geometry.starts)
            if cache is not None:
                cache.set_shift_state(self.index, slot, state.detach())
            return shifted
        before = None
        if cache is not None:
            before = cache.shift_state(self.index, slot)
            cache.set_shift_state(self.index, slot, next_shift_state(x, amount, before))
        return shift_tokens(x, amount, before, step.geometry.starts)


class Andromeda(nn.Module):
    """The language model: token ids (B, T) -> logits (B, T, num_tokens).

    Args:
        config: the parameter table.
        embedding_provider: a module that turns ids (B, T) into vectors (B, T, dim), in place of the registered one
            that config.embedding_provider names.

    Raises:
        AndromedaError: an embedding that is not registered, or that cannot be tied.
    """

    blocks: Sequence[Block]

    def __init__(self, config: AndromedaConfig, embedding_provider: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = embedding_provider if embedding_provider is not None else _build_embedding(config)
        if config.use_abs_pos_emb:
            self.position_embedding = nn.Embedding(config.max_seq_len, config.dim)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.depth))  # type: ignore[assignment]
        self.norm = nn.Identity() if config.deepnorm else nn.LayerNorm(config.dim, bias=False)
        if not config.tie_embeddings:
            self.to_logits = nn.Linear(config.dim, config.num_tokens, bias=False)
        elif getattr(self.embedding, "weight", torch.empty(0)).shape != (config.num_tokens, config.dim):
            raise AndromedaError(
                f"model: tie_embeddings=True needs an embedding with a weight of ({config.num_tokens}, {config.dim}), "
                f"which {type(self.embedding).__name__} does not have; set tie_embeddings=False"
            )
        self.reset_parameters()

    def forward(
        self,
        ids: Tensor,
        *,
        cache: Cache | None = None,
        documents: Tensor | None = None,
        context: Context | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits (B, T, num_tokens), or (B, 1, num_tokens) of the last token with `last_only`.

        Args:
            ids: (B, T) token ids.
            cache: what came before; it is extended by these tokens.
            documents: (B, T) integers, equal within a document of a packed sequence, which sees only itself; not
                together with a cache.
            context: how one sequence is split over processes; what is given and returned are then this one's tokens,
                T = context.local_tokens of them, as of `context.split`. With `last_only` the process that has the last
                token returns its logits, and the others (B, 0, num_tokens). An empty cache is filled on each.

        Raises:
            AndromedaError: a token id out of range (on CPU), a position beyond a learned table, or a context that does
                not fit what is given with it.
        """
        hidden = self.hidden(ids, cache=cache, documents=documents, context=context)
        if last_only:
            hidden = hidden[:, -1:] if context is None else hidden[:, context.last]
        return self.logits(hidden)

    def hidden(
        self,
        ids: Tensor,
        *,
        cache: Cache | None = None,
        documents: Tensor | None = None,
        context: Context | None = None,
        ragged: Ragged | None = None,
        blocks: Sequence[Callable[[Tensor, Pass], Tensor]] | None = None,
    ) -> Tensor:
        """Output of the last block, normalised: (B, T, dim). Arguments as in `forward`.

        With `ragged`, ids are (1, T), of many texts, and known to be in range; it goes with nothing else. `blocks` take
        the place of the model's own.
        """
        if ragged is None:
            self._check_ids(ids)
        held = 0 if cache is None else cache.length
        if documents is not None and cache is not None:
            raise AndromedaError("model: a cache holds one document; give it none together with documents")
        if context is not None:
            _check_context(context, ids, documents, held)
            documents = None if documents is None else context.gather(documents)
        tokens = ids.shape[1] if context is None else context.tokens
        starts = None if documents is None else document_starts(documents)
        x = self.embedding(ids)
        if self.config.use_abs_pos_emb:
            x = x + self._position_embeddings(held, tokens, starts, context, ragged)
        step = self._pass(tokens, held, starts, cache, x.device, context, ragged)
        for block in self.blocks if blocks is None else blocks:
            x = block(x, step)
        if cache is not None:
            cache.advance(tokens)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., dim) -> (..., num_tokens)."""
        return F.linear(hidden, self.output_weight)

    @property
    def output_weight(self) -> Tensor:
        """(num_tokens, dim): the projection to the vocabulary."""
        return cast(Tensor, self.embedding.weight if self.config.tie_embeddings else self.to_logits.weight)

    def token_losses(
        self, ids: Tensor, targets: Tensor, *, documents: Tensor | None = None, context: Context | None = None
    ) -> Tensor:
        """Cross-entropy in nats of each target, (B, T); 0 where the target is IGNORED.

        Float32, or float64 of a float64 model. Of many tokens, the logits of only a part are held at a time; the
        backward pass computes them again. With a context these are the losses of this process's tokens, 0 where the
        sequence has ended.
        """
        hidden = self.hidden(ids, documents=documents, context=context).flatten(0, 1)
        if context is not None:
            context.check(targets)
            targets = context.fill(targets, IGNORED)
        return linear_cross_entropy(hidden, self.output_weight, targets.flatten(), IGNORED).view(ids.shape)

    def _check_ids(self, ids: Tensor) -> None:
        if ids.dim() != 2 or ids.shape[1] == 0:
            raise AndromedaError(
                f"model: token ids must be (batch, tokens), at least one token; got {tuple(ids.shape)}"
            )
        if ids.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere a look would wait for the device
            check_range(self.config, *(int(x) for x in torch.aminmax(ids)))

    def _position_embeddings(
        self, held: int, tokens: int, starts: Tensor | None, context: Context | None, ragged: Ragged | None
    ) -> Tensor:
        last = (held + tokens if ragged is None else ragged.longest) - 1
        if last >= self.config.max_seq_len:
            raise AndromedaError(
                f"model: position {last} is beyond max_seq_len={self.config.max_seq_len}, "
                "a hard limit with use_abs_pos_emb=True"
            )
        device = self.position_embedding.weight.device
        return self.position_embedding(_positions(held, tokens, starts, context, device, ragged))

    def _pass(
        self, tokens: int, held: int, starts: Tensor | None, cache: Cache | None, device: torch.device,
        context: Context | None = None, ragged: Ragged | None = None,
    ) -> Pass:  # fmt: skip
        """Of `tokens` behind `held`, all of the sequence's with a context."""
        config, q_scale = self.config, None
        longest = held + tokens if ragged is None else ragged.longest
        if config.log_n_temperature and longest > config.max_seq_len:
            index = _positions(held, tokens, starts, context, device, ragged)
            factor = positions.log_n_temperature(index, config.max_seq_len)[..., None, None]
            is_global = torch.arange(config.heads, device=device)[:, None] >= config.alibi_num_heads
            q_scale = torch.where(is_global, factor, 1.0)
        geometry = Geometry(rotary=positions.rotary(config), starts=starts, local_heads=config.num_local_heads)
        return Pass(geometry, q_scale, cache, context, ragged)

    def reset_parameters(self) -> None:
        """Initialises all weights but the embedding's.

        With DeepNorm's gains (Wang et al. 2022, section 3); for pre-norm what is added to the residual is scaled down
        by its depth, as GPT-2's.
        """
        config = self.config
        beta = config.deepnorm_beta if config.deepnorm else (2 * config.depth) ** -0.5
        for block in self.blocks:
            q_and_k = (config.heads + config.kv_heads) * config.dim_head
            weight = block.attention.to_qkv.weight
            nn.init.xavier_normal_(weight[:q_and_k])
            nn.init.xavier_normal_(weight[q_and_k:], gain=beta if config.deepnorm else 1.0)
            nn.init.xavier_normal_(block.attention.to_out.weight, gain=beta)
            nn.init.xavier_normal_(block.feed_forward.up.weight, gain=beta if config.deepnorm else 1.0)
            nn.init.xavier_normal_(block.feed_forward.down.weight, gain=beta)
        if config.use_abs_pos_emb:
            nn.init.normal_(self.position_embedding.weight, std=EMBEDDING_STD)
        if not config.tie_embeddings:
            nn.init.normal_(self.to_logits.weight, std=EMBEDDING_STD)


def check_range(config: AndromedaConfig, low: int, high: int) -> None:
    """Raises AndromedaError where the lowest or the highest of some token ids is none of the model's."""
    if low < 0 or high >= config.num_tokens:
        raise AndromedaError(
            f"model: token id {low if low < 0 else high} is out of range for num_tokens={config.num_tokens}; "
            "does the tokenizer belong to this model?"
        )


def _check_context(context: Context, ids: Tensor, documents: Tensor | None, held: int) -> None:
    """Raises AndromedaError where these do not belong together."""
    context.check(ids)
    if documents is not None:
        context.check(documents)
    if held:
        raise AndromedaError(
            f"model: a context splits a whole sequence, but the cache holds {held} tokens; give it an empty cache"
        )


def _positions(
    held: int, tokens: int, starts: Tensor | None, context: Context | None, device: torch.device,
    ragged: Ragged | None = None,
) -> Tensor:  # fmt: skip
    """(1 or B, T): where in its document each token stands that this process has of `tokens` behind `held`."""
    if ragged is not None:
        return ragged.positions[None]
    if context is None:
        index = torch.arange(held, held + tokens, device=device)
        return index[None] if starts is None else index - starts
    index = context.positions(device)
    return index[None] if starts is None else index - starts[:, index]


def document_starts(documents: Tensor) -> Tensor:
    """(B, T) document numbers -> (B, T) the position at which each token's document begins."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    new = torch.ones_like(documents, dtype=torch.bool)
    new[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return torch.where(new, index, 0).cummax(1).values


def _build_embedding(config: AndromedaConfig) -> nn.Module:
    if config.embedding_provider not in EMBEDDING_PROVIDERS:
        raise AndromedaError(
            f"model: embedding_provider={config.embedding_provider!r} is not one of {', '.join(EMBEDDING_PROVIDERS)}; "
            "register it with andromeda.model.register_embedding, or pass the module"
        )
    return EMBEDDING_PROVIDERS[config.embedding_provider](config)
