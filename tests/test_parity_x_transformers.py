"""Against a peer's own code: with the same weights x-transformers gives the same numbers where definitions coincide.

Where they do not, a test of `TestWhereTheirsDiffers` says how. Two conventions are translated throughout: their rotary
pairs are channels (2p, 2p + 1), ours (p, p + D/2); their LayerNorm stores the gain less 1.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from andromeda.cache import Cache, shift_tokens
from andromeda.config import AndromedaConfig
from andromeda.model import Andromeda, Attention, FeedForward

x_transformers = pytest.importorskip("x_transformers")
theirs_code = pytest.importorskip("x_transformers.x_transformers")

DIM, DIM_HEAD, HEADS, TOKENS = 40, 8, 6, 50
PLAIN: dict[str, Any] = {
    "num_tokens": 17, "max_seq_len": 64, "dim": DIM, "depth": 2, "dim_head": DIM_HEAD, "heads": HEADS,
    "alibi_num_heads": 5, "alibi_pos_bias": False, "rotary_heads": "none", "rotary_xpos": False, "shift_tokens": 0,
    "attn_one_kv_head": False, "qk_norm": False, "attn_qk_norm": False, "attn_qk_norm_dim_scale": False,
    "deepnorm": False, "parallel_blocks": False, "xpos_scale_base": 512.0, "window_epsilon": 0.0,
    "log_n_temperature": False,
}  # fmt: skip
OURS: dict[str, dict[str, Any]] = {
    "multi_head": {},
    "multi_query": {"attn_one_kv_head": True},
    "alibi_on_five_of_six": {"alibi_pos_bias": True},
    "rotary": {"rotary_heads": "all"},
    "rotary_of_another_base": {"rotary_heads": "all", "rotary_base": 10000 * 4 ** (DIM_HEAD / (DIM_HEAD - 2))},
    "rotary_interpolated": {"rotary_heads": "all", "position_interpolation": 2.0},
    "xpos": {"rotary_heads": "all", "rotary_xpos": True},
    "qk_norm": {"qk_norm": True},
    "attn_qk_norm": {"attn_qk_norm": True},
    "attn_qk_norm_dim_scale": {"attn_qk_norm": True, "attn_qk_norm_dim_scale": True},
}
THEIRS: dict[str, dict[str, Any]] = {
    "multi_head": {},
    "multi_query": {"attn_one_kv_head": True},
    "alibi_on_five_of_six": {"alibi_pos_bias": True, "alibi_num_heads": 5},
    "rotary": {"rotary_pos_emb": True},
    "rotary_of_another_base": {"rotary_pos_emb": True, "rotary_base_rescale_factor": 4.0},
    "rotary_interpolated": {"rotary_pos_emb": True, "rotary_interpolation_factor": 2.0},
    "xpos": {"rotary_xpos": True, "rotary_xpos_scale_base": 512},
    "qk_norm": {"attn_qk_norm": True, "attn_qk_norm_scale": 10},
    "attn_qk_norm": {"attn_qk_norm": True, "attn_qk_norm_scale": math.sqrt(DIM_HEAD)},
    "attn_qk_norm_dim_scale": {"attn_qk_norm": True, "attn_qk_norm_dim_scale": True},
}
COMBINATIONS = [
    *[(name,) for name in OURS],
    ("multi_query", "alibi_on_five_of_six", "xpos"),
    ("multi_query", "alibi_on_five_of_six", "qk_norm"),
    ("alibi_on_five_of_six", "xpos", "attn_qk_norm_dim_scale"),
    ("multi_query", "alibi_on_five_of_six", "xpos", "attn_qk_norm_dim_scale"),  # all that the default model has
]
EVERY_COMBINATION = pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)


def merged(table: dict[str, dict[str, Any]], names: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for name in names for key, value in table[name].items()}


def our_model(**overrides: Any) -> Andromeda:
    """With gains, norms and embeddings away from 1 and 0, in float32."""
    torch.manual_seed(0)
    model = Andromeda(AndromedaConfig(**{**PLAIN, **overrides}))
    for name, parameter in model.named_parameters():
        if "gain" in name or "norm" in name:
            parameter.data.normal_(1, 0.3)
        elif "embedding" in name or "to_logits" in name:
            parameter.data.normal_()
        elif "to_qkv" in name:
            parameter.data.mul_(3)  # logits that tell the keys apart
    return model


def their_decoder(**overrides: Any) -> Any:
    defaults = {
        "dim": DIM, "depth": 2, "heads": HEADS, "attn_dim_head": DIM_HEAD, "rotary_emb_dim": DIM_HEAD,
        "ff_no_bias": True, "ff_relu_squared": True, "verbose": False,
    }  # fmt: skip
    return x_transformers.Decoder(**{**defaults, **overrides}).eval()


def interleaved(weight: Tensor) -> Tensor:
    """(..., D) channels, pairs (p, p + D/2), in their order."""
    return weight.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


@torch.no_grad()
def copy_attention(ours: Attention, theirs: Any) -> None:
    config = ours.config
    sizes = [config.heads * DIM_HEAD, config.kv_heads * DIM_HEAD, config.kv_heads * DIM_HEAD]
    q, k, v = ours.to_qkv.weight.split(sizes)
    for target, weight in ((theirs.to_q, q), (theirs.to_k, k)):
        channels_last = weight.unflatten(0, (-1, DIM_HEAD)).transpose(1, 2)
        target.weight.copy_(interleaved(channels_last).transpose(1, 2).flatten(0, 1))
    theirs.to_v.weight.copy_(v)
    theirs.to_out.weight.copy_(ours.to_out.weight)
    if config.attn_qk_norm_dim_scale:  # logit = theirs/sqrt(D) * q.k, ours sqrt(D) * q.k
        for gain, target in ((ours.q_gain, theirs.qk_norm_q_scale), (ours.k_gain, theirs.qk_norm_k_scale)):
            target.copy_(interleaved(gain)[:, None] * math.sqrt(DIM_HEAD))


@torch.no_grad()
def copy_feed_forward(ours: FeedForward, theirs: nn.Module) -> None:
    up, down = (layer for layer in theirs.modules() if isinstance(layer, nn.Linear))
    up.weight.copy_(ours.up.weight)
    down.weight.copy_(ours.down.weight)


@torch.no_grad()
def copy_model(ours: Andromeda, theirs: Any) -> None:
    """All blocks of a sequential model, pre-norm or post-norm, into their Decoder."""
    layers = iter(theirs.layers)
    blocks: Any = ours.blocks
    for block in blocks:
        for part, norm, copy in (
            (block.attention, block.norm, copy_attention), (block.feed_forward, block.ff_norm, copy_feed_forward)
        ):  # fmt: skip
            norms, layer, _ = next(layers)
            before, _, after = norms
            (before if before is not None else after).gamma.copy_(norm.weight - 1)
            copy(part, layer.fn if isinstance(layer, theirs_code.ShiftTokens) else layer)
    if not ours.config.deepnorm:
        theirs.final_norm.gamma.copy_(ours.state_dict()["norm.weight"] - 1)


def first_block(ours: Andromeda) -> Any:
    return ours.blocks[0]


def attend(ours: Andromeda, x: Tensor) -> Tensor:
    out: Tensor = first_block(ours).attention(x, ours._pass(x.shape[1], 0, None, None, x.device))
    return out


def their_attention(decoder: Any, x: Tensor) -> Tensor:
    """The first layer alone, with the positions that the decoder would give it."""
    position = torch.arange(x.shape[1])
    rotary = None if decoder.rotary_pos_emb is None else decoder.rotary_pos_emb(position)
    out: Tensor = decoder.layers[0][1](x, rel_pos=decoder.rel_pos, rotary_pos_emb=rotary)
    return out


@torch.no_grad()
def attention_of_both(ours: Andromeda, theirs: Any) -> tuple[Tensor, Tensor]:
    copy_attention(first_block(ours).attention, theirs.layers[0][1])
    x = torch.randn(2, TOKENS, DIM, generator=torch.Generator().manual_seed(1))
    return attend(ours, x), their_attention(theirs, x)


@torch.no_grad()
def hidden_of_both(ours: Andromeda, theirs: Any) -> tuple[Tensor, Tensor]:
    copy_model(ours, theirs)
    ids = torch.randint(17, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    return ours.hidden(ids), theirs(ours.embedding(ids))


def their_wrapper(decoder: Any, **options: bool) -> Any:
    options = {"use_abs_pos_emb": False, **options}
    return x_transformers.TransformerWrapper(num_tokens=17, max_seq_len=64, attn_layers=decoder, **options).eval()


@torch.no_grad()
def logits_of_both(ours: Andromeda, theirs: Any) -> tuple[Tensor, Tensor]:
    copy_model(ours, theirs.attn_layers)
    theirs.token_emb.emb.weight.copy_(ours.state_dict()["embedding.weight"])
    if not ours.config.tie_embeddings:
        theirs.to_logits.weight.copy_(ours.to_logits.weight)
    ids = torch.randint(17, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    return ours(ids), theirs(ids)


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


def assert_differs(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).abs().max() > 0.01 * theirs.abs().max()


class TestTheSame:
    @EVERY_COMBINATION
    @pytest.mark.parametrize("flash", [True, False], ids=["tiled", "dense"])
    def test_attention(self, names: tuple[str, ...], flash: bool) -> None:
        ours, theirs = our_model(**merged(OURS, names), attn_flash=flash), their_decoder(**merged(THEIRS, names))
        assert_same(*attention_of_both(ours, theirs))

    @EVERY_COMBINATION
    def test_gradients_of_attention(self, names: tuple[str, ...]) -> None:
        """Of the input, with the same output gradient."""
        ours, theirs = our_model(**merged(OURS, names)), their_decoder(**merged(THEIRS, names))
        copy_attention(first_block(ours).attention, theirs.layers[0][1])
        x, weight = torch.randn(2, 1, TOKENS, DIM, generator=torch.Generator().manual_seed(1))
        y = x.clone().requires_grad_()
        x.requires_grad_()
        (attend(ours, x) * weight).sum().backward()
        (their_attention(theirs, y) * weight).sum().backward()
        assert x.grad is not None
        assert y.grad is not None
        assert_same(x.grad, y.grad)

    def test_rotary_on_some_heads(self) -> None:
        """Multi-head only, and theirs rotates the last heads where ours rotates the first."""
        ours = our_model(alibi_num_heads=2, rotary_heads="alibi", rotary_xpos=True)
        theirs = their_decoder(rotary_xpos=True, rotary_xpos_scale_base=512, rotate_num_heads=2)
        x = torch.randn(1, TOKENS, DIM, generator=torch.Generator().manual_seed(1))
        attention = first_block(ours).attention
        with torch.no_grad():
            expected = attend(ours, x)
            for weight, axis in ((attention.to_qkv.weight, 0), (attention.to_out.weight, 1)):  # reverse the heads
                weight.copy_(weight.unflatten(axis, (-1, HEADS, DIM_HEAD)).flip(axis + 1).flatten(axis, axis + 2))
            copy_attention(attention, theirs.layers[0][1])
            assert_same(expected, their_attention(theirs, x))

    @pytest.mark.parametrize("shift", [1, 2, 3, 6])
    def test_token_shift(self, shift: int) -> None:
        """In channels that the shift divides, and in those it leaves over."""
        x = torch.randn(2, TOKENS, DIM)
        theirs = theirs_code.ShiftTokens(range(shift + 1), nn.Identity())
        assert torch.equal(shift_tokens(x, shift), theirs(x))

    @pytest.mark.parametrize(
        ("activation", "theirs"),
        [("relu2", {"relu_squared": True}), ("gelu", {}), ("silu", {"swish": True})],
        ids=["relu2", "gelu", "silu"],
    )
    def test_feed_forward(self, activation: str, theirs: dict[str, bool]) -> None:
        ours = first_block(our_model(ff_activation=activation)).feed_forward
        module = theirs_code.FeedForward(DIM, no_bias=True, **theirs)
        copy_feed_forward(ours, module)
        x = torch.randn(2, TOKENS, DIM)
        with torch.no_grad():
            assert_same(ours(x), module(x))

    @EVERY_COMBINATION
    @pytest.mark.parametrize("shift", [0, 1])
    def test_a_pre_norm_model(self, names: tuple[str, ...], shift: int) -> None:
        """Two blocks, attention then feed-forward, and the last norm."""
        ours = our_model(**merged(OURS, names), shift_tokens=shift)
        assert_same(*hidden_of_both(ours, their_decoder(**merged(THEIRS, names), shift_tokens=shift)))

    @pytest.mark.parametrize("shift", [0, 1])
    def test_a_deepnorm_model(self, shift: int) -> None:
        """Theirs post-norm, with a constant on the residual: alpha = (2 * 2)^(1/4)."""
        names = COMBINATIONS[-1]
        ours = our_model(**merged(OURS, names), shift_tokens=shift, deepnorm=True)
        theirs = their_decoder(
            **merged(THEIRS, names), shift_tokens=shift, pre_norm=False, scale_residual_constant=math.sqrt(2)
        )
        assert_same(*hidden_of_both(ours, theirs))

    def test_logits(self) -> None:
        ours = our_model(tie_embeddings=False, **merged(OURS, COMBINATIONS[-1]))
        decoder = their_decoder(**merged(THEIRS, COMBINATIONS[-1]))
        assert_same(*logits_of_both(ours, their_wrapper(decoder)))


class TestWhereTheirsDiffers:
    def test_they_rotate_half_of_a_heads_channels_unless_told(self) -> None:
        ours, theirs = our_model(rotary_heads="all"), their_decoder(rotary_pos_emb=True, rotary_emb_dim=None)
        assert theirs.rotary_pos_emb.inv_freq.numel() == DIM_HEAD // 4
        assert_differs(*attention_of_both(ours, theirs))

    def test_they_interpolate_the_rotation_but_not_the_decay(self) -> None:
        """Ours divides the distance, in both; so theirs is ours with a decay as many times as steep."""
        theirs = their_decoder(rotary_xpos=True, rotary_xpos_scale_base=64, rotary_interpolation_factor=4.0)
        xpos = {"rotary_heads": "all", "rotary_xpos": True, "position_interpolation": 4.0}
        assert_differs(*attention_of_both(our_model(**xpos, xpos_scale_base=64.0), theirs))
        assert_same(*attention_of_both(our_model(**xpos, xpos_scale_base=16.0), theirs))

    def test_their_gains_begin_at_a_temperature_of_one(self) -> None:
        """dim_head^(1/4) each, over sqrt(dim_head): the logit begins as the cosine. Ours begins at sqrt(dim_head)."""
        theirs = their_decoder(attn_qk_norm=True, attn_qk_norm_dim_scale=True)
        as_built = [theirs.layers[0][1].qk_norm_q_scale.clone(), theirs.layers[0][1].qk_norm_k_scale.clone()]
        ours = our_model(attn_qk_norm=True, attn_qk_norm_dim_scale=True)
        with torch.no_grad():
            first_block(ours).attention.q_gain.fill_(1)
            first_block(ours).attention.k_gain.fill_(1)
            assert_same(*attention_of_both(ours, theirs))  # with our gains in theirs
            for target, value in zip(("qk_norm_q_scale", "qk_norm_k_scale"), as_built, strict=True):
                getattr(theirs.layers[0][1], target).copy_(value)
            x = torch.randn(2, TOKENS, DIM)
            assert_differs(attend(ours, x), their_attention(theirs, x))
            first_block(ours).attention.q_gain.fill_(DIM_HEAD**-0.5)
            assert_same(attend(ours, x), their_attention(theirs, x))

    def test_their_tied_logits_are_scaled_down(self) -> None:
        """By dim^(-1/2); ours are the products with the embedding as they are."""
        ours, theirs = logits_of_both(
            our_model(tie_embeddings=True), their_wrapper(their_decoder(), tie_embedding=True)
        )
        assert_differs(ours, theirs)
        assert_same(ours, theirs * math.sqrt(DIM))

    def test_their_learned_positions_are_scaled_down(self) -> None:
        """By dim^(-1/2); ours are added as they are."""
        ours = our_model(use_abs_pos_emb=True, tie_embeddings=False)
        theirs = their_wrapper(their_decoder(), use_abs_pos_emb=True)
        with torch.no_grad():
            theirs.pos_emb.emb.weight.copy_(ours.state_dict()["position_embedding.weight"])
            assert_differs(*logits_of_both(ours, theirs))
            theirs.pos_emb.emb.weight.mul_(math.sqrt(DIM))
        assert_same(*logits_of_both(ours, theirs))

    def test_they_cannot_rotate_some_heads_of_multi_query_attention(self) -> None:
        """Ours can, and does by default."""
        with pytest.raises(AssertionError, match="partial rotate heads"):
            their_decoder(rotary_pos_emb=True, rotate_num_heads=2, attn_one_kv_head=True)
        assert attend(our_model(rotary_heads="alibi", attn_one_kv_head=True), torch.randn(1, 5, DIM)).isfinite().all()

    def test_their_xpos_is_not_finite_far_out(self) -> None:
        """They scale q by zeta^i and k by zeta^-j, in float32; ours decays by the distance between them."""
        far = torch.tensor([0, 1, 199_998, 199_999])
        freqs, scale = theirs_code.RotaryEmbedding(DIM_HEAD, use_xpos=True, scale_base=512)(far)
        q, k = torch.randn(2, 1, 1, 4, DIM_HEAD)
        q, k = (theirs_code.apply_rotary_pos_emb(x, freqs, s) for x, s in ((q, scale), (k, scale**-1.0)))
        assert not (q @ k.transpose(-1, -2))[0, 0].tril().isfinite().all()
        cache = Cache()
        with torch.no_grad():
            ours = our_model(rotary_heads="all", rotary_xpos=True, attn_one_kv_head=True)
            for block in range(2):
                cache.append(block, *torch.randn(2, 1, 199_996, 1, DIM_HEAD))
            cache.advance(199_996)
            assert ours(torch.tensor([[1, 2, 3, 4]]), cache=cache).isfinite().all()

    def test_their_cached_decode_forgets_the_token_shift(self) -> None:
        """A cached step shifts in zeros, so it says something else than the whole sequence; ours says the same."""
        ours = our_model(shift_tokens=1)
        decoder = their_decoder(shift_tokens=1)
        copy_model(ours, decoder)
        ids, cache = torch.randint(17, (1, TOKENS)), Cache()
        with torch.no_grad():
            x = ours.embedding(ids)
            _, memory = decoder(x[:, :-1], return_hiddens=True)
            cached, _ = decoder(x, cache=memory, return_hiddens=True)
            assert_same(ours.hidden(ids), decoder(x))
            assert_differs(cached[:, -1], decoder(x)[:, -1])
            ours.hidden(ids[:, :-1], cache=cache)
            assert_same(ours.hidden(ids[:, -1:], cache=cache), decoder(x)[:, -1:])

    def test_their_cached_decode_of_alibi_with_rotary_raises(self) -> None:
        """Theirs makes the bias for all positions where one query is left; ours decodes."""
        ours = our_model(alibi_pos_bias=True, rotary_heads="all", rotary_xpos=True)
        decoder = their_decoder(alibi_pos_bias=True, alibi_num_heads=5, rotary_xpos=True)
        copy_model(ours, decoder)
        ids, cache = torch.randint(17, (1, TOKENS)), Cache()
        with torch.no_grad():
            x = ours.embedding(ids)
            _, memory = decoder(x[:, :-1], return_hiddens=True)
            with pytest.raises(RuntimeError, match="size"):
                decoder(x, cache=memory, return_hiddens=True)
            ours.hidden(ids[:, :-1], cache=cache)
            assert_same(ours.hidden(ids[:, -1:], cache=cache), decoder(x)[:, -1:])
