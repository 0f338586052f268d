"""Others' models of about a preset's size: transformers' Qwen3 and Llama, and x-transformers with the same flags."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

from andromeda.config import AndromedaConfig

QWEN3, X_TRANSFORMERS, X_WITHOUT_ALIBI = "transformers Qwen3", "x-transformers", "x-transformers without ALiBi"
LLAMA = "transformers Llama"
PEERS = (QWEN3, X_TRANSFORMERS, X_WITHOUT_ALIBI)


def installed(name: str) -> bool:
    """Whether a peer's package is there."""
    return find_spec(name.split()[0].replace("-", "_")) is not None


def build(name: str, config: AndromedaConfig, length: int) -> nn.Module:
    """A model with random weights, on the current default device."""
    return _qwen3(config, length) if name == QWEN3 else _x_transformer(config, length, alibi=name == X_TRANSFORMERS)


def last_logits(name: str, model: Any) -> Callable[[Tensor], Tensor]:
    """ids (B, T) -> logits of the last token (B, 1, num_tokens)."""
    if name == QWEN3:
        return lambda ids: model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
    return lambda ids: model.to_logits(model(ids, return_embeddings=True)[:, -1:])


def _qwen3(config: AndromedaConfig, length: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=config.num_tokens, hidden_size=config.dim, num_hidden_layers=config.depth,
            intermediate_size=round(config.dim * 8 / 3 / 64) * 64,  # of a gated feed-forward of the same size
            num_attention_heads=config.heads, num_key_value_heads=1, head_dim=config.dim_head,
            max_position_embeddings=length, tie_word_embeddings=True, attn_implementation="sdpa",
        )
    )  # fmt: skip


def llama(config: AndromedaConfig, length: int) -> Any:
    """Of a preset's width, depth and heads, with one key/value head; it never ends a text by itself."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.num_tokens, hidden_size=config.dim, num_hidden_layers=config.depth,
            intermediate_size=round(config.dim * config.ff_mult * 2 / 3),  # gated: as many weights as two matrices
            num_attention_heads=config.heads, num_key_value_heads=1, head_dim=config.dim_head,
            max_position_embeddings=length, tie_word_embeddings=config.tie_embeddings, attn_implementation="sdpa",
            bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )
    )  # fmt: skip


def _x_transformer(config: AndromedaConfig, length: int, alibi: bool) -> Any:
    from x_transformers import Decoder, TransformerWrapper

    bias = {"alibi_pos_bias": True, "alibi_num_heads": config.alibi_num_heads} if alibi else {}
    layers = Decoder(
        dim=config.dim, depth=config.depth, heads=config.heads, attn_dim_head=config.dim_head, attn_flash=True,
        rotary_xpos=True, shift_tokens=1, attn_one_kv_head=True, attn_qk_norm=True, attn_qk_norm_dim_scale=True,
        ff_relu_squared=True, **bias,
    )  # fmt: skip
    return TransformerWrapper(
        num_tokens=config.num_tokens, max_seq_len=length, attn_layers=layers, use_abs_pos_emb=False
    )
