"""What a model is: the parameter table, the presets, and every figure that follows from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

from andromeda.errors import AndromedaError

ACTIVATIONS = ("relu2", "gelu", "silu")
ROTARY_HEADS = ("alibi", "all", "none")


class Flops(NamedTuple):
    """Floating-point operations (a multiply-add counts two), matrix products and attention apart."""

    products: float
    attention: float

    @property
    def total(self) -> float:
        return self.products + self.attention


@dataclass(frozen=True)
class AndromedaConfig:
    """The specification's parameter table, with its names and defaults. It checks itself when built.

    Raises:
        AndromedaError: a value out of range, or a combination that makes no sense.
    """

    num_tokens: int = 50432  # vocabulary size
    max_seq_len: int = 8192  # trained length; a hard limit only with use_abs_pos_emb
    dim: int = 2560  # residual width
    depth: int = 32  # blocks
    dim_head: int = 128  # width of one head
    heads: int = 24  # query heads
    use_abs_pos_emb: bool = False  # learned absolute positions
    alibi_pos_bias: bool = True  # ALiBi on the first alibi_num_heads heads
    alibi_num_heads: int = 12  # the local heads; the others are global
    rotary_xpos: bool = True  # xPos decay on the rotated heads (False: plain rotary)
    attn_flash: bool = True  # tiled kernels (False: the dense reference)
    shift_tokens: int = 1  # token shift
    attn_one_kv_head: bool = True  # multi-query attention (False: one key/value head a query head)
    qk_norm: bool = True  # L2-normalise q and k; logit = 10 * cosine
    attn_qk_norm: bool = True  # the same with temperature sqrt(dim_head)
    attn_qk_norm_dim_scale: bool = True  # learned per-channel gains on the normalised q and k
    embedding_provider: str = "AndromedaEmbedding"  # registered name of the module that embeds ids

    deepnorm: bool = True  # post-norm with DeepNorm's alpha and beta (False: pre-norm)
    parallel_blocks: bool = True  # attention and feed-forward side by side
    ff_mult: int = 4
    ff_activation: str = "relu2"
    tie_embeddings: bool = False  # True: the output projection is the embedding (saves memory, learns worse)
    xpos_scale_base: float | None = None  # tokens; None: max(512, max_seq_len / 16)
    rotary_base: float = 10000.0
    position_interpolation: float = 1.0  # rotary distances are divided by it
    window_epsilon: float = 1e-4  # softmax mass that a certified window may leave out; 0: no windows
    rotary_heads: str = "alibi"  # which heads are rotated: 'alibi' (the local ones), 'all' or 'none'
    log_n_temperature: bool = True  # sharpen global heads beyond max_seq_len

    def __post_init__(self) -> None:
        self._check_types()
        for name in ("num_tokens", "dim", "depth", "dim_head", "heads", "ff_mult"):
            self._require(getattr(self, name) >= 1, name, "must be at least 1")
        self._require(self.max_seq_len >= 2, "max_seq_len", "must be at least 2")
        self._require(
            0 <= self.alibi_num_heads <= self.heads, "alibi_num_heads", f"must lie between 0 and heads={self.heads}"
        )
        self._require(
            0 <= self.shift_tokens < self.dim, "shift_tokens", f"must lie between 0 and dim - 1 = {self.dim - 1}"
        )
        self._require(0.0 <= self.window_epsilon < 1.0, "window_epsilon", "must lie in [0, 1)")
        for name in ("rotary_base", "position_interpolation"):
            self._require(math.isfinite(getattr(self, name)) and getattr(self, name) > 0, name, "must be positive")
        self._require(self.xpos_scale_base is None or self.xpos_scale_base > 0, "xpos_scale_base", "must be positive")
        self._require(self.ff_activation in ACTIVATIONS, "ff_activation", f"must be one of {', '.join(ACTIVATIONS)}")
        self._require(self.rotary_heads in ROTARY_HEADS, "rotary_heads", f"must be one of {', '.join(ROTARY_HEADS)}")
        self._check_combinations()

    def _check_types(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), str(field.type)
            if kind == "bool":
                good = isinstance(value, bool)
            elif kind == "int":
                good = isinstance(value, int) and not isinstance(value, bool)
            elif kind == "str":
                good = isinstance(value, str)
            else:  # float, float | None
                good = (isinstance(value, int | float) and not isinstance(value, bool)) or (
                    value is None and "None" in kind
                )
            self._require(good, field.name, f"must be of type {kind}")

    def _check_combinations(self) -> None:
        self._require(
            not self.alibi_pos_bias or self.alibi_num_heads > 0,
            "alibi_num_heads", "must be at least 1 with alibi_pos_bias=True; set alibi_pos_bias=False for none",
        )  # fmt: skip
        self._require(
            not self.attn_qk_norm_dim_scale or self.qk_norm or self.attn_qk_norm,
            "attn_qk_norm_dim_scale", "scales normalised queries and keys: it needs qk_norm or attn_qk_norm",
        )  # fmt: skip
        self._require(
            not self.rotary_xpos or self.num_rotated_heads > 0,
            "rotary_xpos", f"needs rotated heads, but rotary_heads={self.rotary_heads!r} with "
            f"alibi_num_heads={self.alibi_num_heads} rotates none",
        )  # fmt: skip
        self._require(
            self.num_rotated_heads == 0 or self.dim_head % 2 == 0, "dim_head", "must be even for rotary positions"
        )

    def _require(self, holds: bool, name: str, what: str) -> None:
        if not holds:
            raise AndromedaError(f"config: {name}={getattr(self, name)!r} {what}")

    # ---- what follows from the table -------------------------------------------------------------

    @property
    def kv_heads(self) -> int:
        return 1 if self.attn_one_kv_head else self.heads

    @property
    def normalises_qk(self) -> bool:
        return self.qk_norm or self.attn_qk_norm

    @property
    def qk_temperature(self) -> float:
        """tau in logit = tau * q.k; without QK norm the usual 1/sqrt(dim_head)."""
        if self.attn_qk_norm:
            return math.sqrt(self.dim_head)
        return 10.0 if self.qk_norm else 1.0 / math.sqrt(self.dim_head)

    @property
    def num_local_heads(self) -> int:
        """How many heads, counted from the first, carry ALiBi."""
        return self.alibi_num_heads if self.alibi_pos_bias else 0

    @property
    def num_rotated_heads(self) -> int:
        """How many heads, counted from the first, are rotated."""
        return {"alibi": self.alibi_num_heads, "all": self.heads, "none": 0}[self.rotary_heads]

    @property
    def has_windows(self) -> bool:
        """Certified windows need a bound (QK norm) and a bias that grows with distance (ALiBi)."""
        return self.normalises_qk and self.alibi_pos_bias and self.window_epsilon > 0

    @property
    def xpos_scale(self) -> float:
        """S, tokens over which channel pair p decays by zeta_p."""
        return self.xpos_scale_base or max(512.0, self.max_seq_len / 16)

    @property
    def deepnorm_alpha(self) -> float:
        """DeepNorm's residual weight for a decoder (Wang et al. 2022, table 1)."""
        return (2 * self.depth) ** 0.25

    @property
    def deepnorm_beta(self) -> float:
        """DeepNorm's gain on the initialisation of v, out and the feed-forward."""
        return (8 * self.depth) ** -0.25

    def num_parameters(self, embedding: bool = True) -> int:
        """Parameters of the model, with or without the vocabulary's matrices (and learned positions)."""
        attention = self._attention_weights + (self.heads + self.kv_heads) * self.dim_head * self.attn_qk_norm_dim_scale
        norms = (1 if self.parallel_blocks else 2) * self.dim
        total = self.depth * (attention + self._ff_weights + norms) + (0 if self.deepnorm else self.dim)
        if embedding:
            total += self.num_tokens * self.dim * (1 if self.tie_embeddings else 2)
            total += self.max_seq_len * self.dim if self.use_abs_pos_emb else 0
        return total

    @property
    def _attention_weights(self) -> int:
        return 2 * self.dim * self.dim_head * (self.heads + self.kv_heads)

    @property
    def _ff_weights(self) -> int:
        return 2 * self.ff_mult * self.dim * self.dim

    def flops_per_token(self, context: int, windows: Sequence[float] | None = None, logits: bool = True) -> Flops:
        """Forward operations for one token, averaged over a causal sequence of `context` tokens.

        Args:
            context: tokens in the sequence; token i attends to the i + 1 tokens up to itself.
            windows: tokens each head reaches back (`positions.initial_windows`); None: all reach everywhere.
            logits: count the projection to the vocabulary (in a prefill only the last token needs it).
        """
        products = 2.0 * self.depth * (self._attention_weights + self._ff_weights)
        if logits:
            products += 2.0 * self.dim * self.num_tokens
        reaches = [math.inf] * self.heads if windows is None else list(windows)
        keys = sum(_mean_keys(context, reach) for reach in reaches)
        return Flops(products, 4.0 * self.depth * self.dim_head * keys)

    def kv_bytes_per_token(self, bytes_per_element: int = 2) -> int:
        """Cache bytes one token occupies: a key and a value in every block."""
        return 2 * self.depth * self.kv_heads * self.dim_head * bytes_per_element

    # ---- to and from plain data ------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AndromedaConfig:
        """Raises AndromedaError for an unknown key."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise AndromedaError(f"config: unknown key {unknown[0]!r}; known keys: {', '.join(sorted(known))}")
        return cls(**values)


def _mean_keys(context: int, reach: float) -> float:
    """Mean over i < context of min(i + 1, reach)."""
    if reach >= context:
        return (context + 1) / 2
    return (reach * (reach + 1) / 2 + (context - reach) * reach) / context


PRESETS: dict[str, AndromedaConfig] = {
    "nano": AndromedaConfig(
        num_tokens=2048, max_seq_len=256, dim=192, depth=4, dim_head=32, heads=6, alibi_num_heads=3
    ),
    "150m": AndromedaConfig(dim=768, depth=12, heads=8, alibi_num_heads=4),
    "400m": AndromedaConfig(dim=1024, depth=24, heads=8, alibi_num_heads=4),
    "700m": AndromedaConfig(dim=2048, depth=16, heads=8, alibi_num_heads=6),
    "2b": AndromedaConfig(),
    "7b": AndromedaConfig(dim=4096, depth=32, heads=32, alibi_num_heads=16),
}  # fmt: skip


def preset(name: str, **overrides: Any) -> AndromedaConfig:
    """A preset by name, with some of its values replaced.

    Raises:
        AndromedaError: no such preset, or no such key.
    """
    if name not in PRESETS:
        raise AndromedaError(f"config: no preset {name!r}; presets: {', '.join(PRESETS)}")
    return AndromedaConfig.from_dict(PRESETS[name].to_dict() | overrides)
