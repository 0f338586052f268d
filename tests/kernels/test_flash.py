"""The Triton kernels under the interpreter, against the dense reference in float64: forward and every gradient."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from andromeda.config import preset
from andromeda.kernels import Geometry, QKNorm, Rotary, attention_backend, choose_backend, dispatch, rotation
from andromeda.kernels.reference import reference_attention, rotated_logits
from andromeda.kernels.rotation import xpos_chunk
from andromeda.model import Andromeda
from tests.quick import quick

flash = pytest.importorskip("andromeda.kernels.flash", reason="needs triton")
rotate = pytest.importorskip("andromeda.kernels.rotate", reason="needs triton")

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(not flash.INTERPRETED, reason="float32 is for the interpreter; test_flash_gpu.py has the rest"),
]
NO_LIMIT = 2**31 - 1


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of xPos, where it is steep, so that few tokens have several."""
    monkeypatch.setattr(rotation, "MIN_CHUNK", 32)


@dataclass(frozen=True)
class Case:
    """The default model's flags, in small; the tests flip them."""

    batch: int = 1
    queries: int = 43
    before: int = 0  # keys before the first query
    heads: int = 4
    kv_heads: int = 1
    dim_head: int = 32
    local: int = 2
    slope: float = 0.5  # the steepest
    rotated: int = 2
    xpos_scale: float | None = 20.0
    windowed: bool = True
    bound: float = 4.0
    known: bool = True  # bounds are given
    documents: int = 1

    def inputs(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.queries + self.before)
        keys = self.before + self.queries

        def unit(tokens: int, heads: int) -> Tensor:
            return F.normalize(torch.randn(self.batch, tokens, heads, self.dim_head, generator=generator), dim=-1)

        v = torch.randn(self.batch, keys, self.kv_heads, self.dim_head, generator=generator)
        xs = [unit(self.queries, self.heads) * self.bound, unit(keys, self.kv_heads), v]
        return [x.to(dtype).requires_grad_() for x in xs]

    def geometry(self) -> Geometry:
        keys, off = self.before + self.queries, self.heads - self.local
        slopes = self.slope * torch.tensor([1.0, 0.125, 0.5, 0.25][: self.local] + [0.0] * off)
        windows = torch.tensor([11, 25, 17, 38][: self.local] + [NO_LIMIT] * off)
        bounds = torch.full((self.heads,), self.bound, dtype=torch.float64)
        return Geometry(
            slopes=slopes if self.local else None,
            windows=windows if self.local and self.windowed else None,
            bounds=bounds if self.known else None,
            starts=self._starts(keys) if self.documents > 1 else None,
            rotary=Rotary(self.rotated, self.dim_head // 2, xpos_scale=self.xpos_scale) if self.rotated else None,
            local_heads=self.local,
        )

    def _starts(self, keys: int) -> Tensor:
        borders = torch.linspace(0, keys, self.documents + 1).long()[:-1]
        rows = torch.stack([borders + row * (borders > 0) for row in range(self.batch)])
        return torch.where(rows[:, :, None] <= torch.arange(keys), rows[:, :, None], 0).amax(1)


CASES = {
    "one token": Case(queries=1),
    "default": Case(batch=2),
    "several chunks of xPos": Case(queries=75, heads=1, local=0, rotated=1, xpos_scale=5.0),
    "several chunks of xPos and ALiBi": Case(
        queries=75, heads=1, local=1, rotated=1, xpos_scale=5.0, slope=1 / 64, windowed=False
    ),
    "the running maximum": Case(bound=50.0),
    "no bounds": Case(known=False),
    "no windows": Case(windowed=False, queries=63),
    "no ALiBi": Case(local=0),
    "all local": Case(heads=2, rotated=2),
    "no rotation": Case(rotated=0, xpos_scale=None),
    "plain rotary": Case(xpos_scale=None),
    "rotary on all heads": Case(rotated=4),
    "rotary and no ALiBi": Case(rotated=4, local=0),
    "a chunk of queries": Case(queries=37, before=32, xpos_scale=5.0),
    "one query of many": Case(queries=1, before=75, xpos_scale=5.0),
    "documents": Case(batch=2, queries=71, documents=4, xpos_scale=5.0),
    "documents, xPos on all heads, no maximum left out": Case(
        queries=71, documents=2, rotated=4, xpos_scale=5.0, bound=45.0
    ),
    "one k/v head a head": Case(kv_heads=4),
    "grouped k/v heads": Case(kv_heads=2, queries=40, before=31),
    "dim_head 64": Case(dim_head=64, heads=2, local=1, rotated=1),
    "dim_head 128": Case(dim_head=128, heads=2, local=1, rotated=1),
}


def relative_error(x: Tensor, truth: Tensor) -> float:
    assert not x.isnan().any()
    return float((x.detach().double() - truth).norm() / truth.norm().clamp(min=1e-12))


def outputs_and_gradients(attention: Any, xs: list[Tensor], geometry: Geometry) -> list[Tensor]:
    out = attention(*xs, geometry)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, xs, weight)]


@pytest.mark.parametrize("name", quick(CASES, set(CASES) - {"rotary and no ALiBi", "dim_head 64"}))
def test_equals_the_reference(name: str) -> None:
    case = CASES[name]
    truth = outputs_and_gradients(reference_attention, case.inputs(torch.float64), case.geometry())
    ours = outputs_and_gradients(flash.flash_attention, case.inputs(), case.geometry())
    for what, x, t in zip(("out", "dq", "dk", "dv"), ours, truth, strict=True):
        # a query that sees one key has no gradient but rounding's
        assert relative_error(x, t) < 3e-6 or (case.queries == 1 and x.abs().max() < 1e-5), what


@pytest.mark.parametrize("documents", [1, 2])
def test_logits_of_hundreds_need_the_running_maximum(documents: int) -> None:
    """Their powers are no float32; nor are logits as exact as smaller ones."""
    case = Case(bound=300.0, documents=documents, queries=37)
    truth = outputs_and_gradients(reference_attention, case.inputs(torch.float64), case.geometry())
    ours = outputs_and_gradients(flash.flash_attention, case.inputs(), case.geometry())
    assert max(relative_error(x, t) for x, t in zip(ours, truth, strict=True)) < 1e-4


@pytest.mark.parametrize("documents", [1, 3])
def test_half_precision_has_at_most_twice_the_error_of_plain_pytorch(documents: int) -> None:
    case = Case(documents=documents)
    xs = [x.detach().half() for x in case.inputs()]

    def run(attention: Any, dtype: torch.dtype) -> list[Tensor]:
        return outputs_and_gradients(attention, [x.to(dtype).requires_grad_() for x in xs], case.geometry())

    truth = run(reference_attention, torch.float64)
    ours, plain = run(flash.flash_attention, torch.float16), run(reference_attention, torch.float16)
    for x, p, t in zip(ours, plain, truth, strict=True):
        assert relative_error(x, t) <= 2 * relative_error(p, t) + 1e-5


def test_half_precision_has_the_range_for_the_largest_logits() -> None:
    """A query along one key, at the default bound: e^11.3 is more than float16 holds."""
    case = Case(queries=80, bound=11.3137, local=0, rotated=0, xpos_scale=None)
    q, k, v = (x.detach() for x in case.inputs())
    q[:, 70] = 11.3137 * k[:, 5]
    truth = reference_attention(q.double(), k.double(), v.double(), case.geometry())
    assert relative_error(flash.flash_attention(q.half(), k.half(), v.half(), case.geometry()), truth) < 0.01


@pytest.mark.parametrize("slope", [1.0, 4.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_no_logit_leaves_the_range(sign: int, slope: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 or -40 at the query's own key, tiles as large as a GPU's; the most that does without a maximum; steeper."""
    plan = flash.INTERPRETED_PLAN
    monkeypatch.setattr(flash, "INTERPRETED_PLAN", replace(plan, forward=replace(plan.forward, queries=64)))
    case = Case(queries=128, bound=40.0, slope=slope, heads=1, local=1, rotated=0, xpos_scale=None, windowed=False)
    xs = case.inputs()
    xs[0] = (sign * 40.0 * xs[1].detach()).requires_grad_()
    doubles = [x.detach().double().requires_grad_() for x in xs]
    truth = outputs_and_gradients(reference_attention, doubles, case.geometry())
    ours = outputs_and_gradients(flash.flash_attention, xs, case.geometry())
    for which in (0, 3):  # out and dv; those of q and k are nothing but rounding where one key has all the weight
        assert relative_error(ours[which], truth[which]) < 1e-5


@pytest.mark.parametrize("heads", quick(itertools.product([2, 4], [1, 3]), [(2, 3), (4, 1)]), ids=str)
def test_heads_that_share_a_program_add_up(heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the gradients of keys and values, over several chunks of xPos; short sequences share nothing otherwise."""
    share, documents = heads
    monkeypatch.setattr(flash, "_share", lambda count, _: min(count, share))
    case = Case(
        batch=2, queries=47, before=31 * (documents == 1), local=4, rotated=4, documents=documents, xpos_scale=5.0
    )
    truth = outputs_and_gradients(reference_attention, case.inputs(torch.float64), case.geometry())
    for x, t in zip(outputs_and_gradients(flash.flash_attention, case.inputs(), case.geometry()), truth, strict=True):
        assert relative_error(x, t) < 3e-6


@settings(max_examples=10)
@given(
    queries=st.integers(1, 50), before=st.integers(0, 50), documents=st.integers(1, 4), local=st.integers(0, 3),
    xpos=st.sampled_from([None, 5.0, 300.0]), bound=st.sampled_from([3.0, 60.0]),
)  # fmt: skip
def test_any_shape(queries: int, before: int, documents: int, local: int, xpos: float | None, bound: float) -> None:
    case = Case(
        queries=queries, before=before, documents=documents, local=local, rotated=local,
        heads=3, xpos_scale=xpos, bound=bound,
    )  # fmt: skip
    with torch.no_grad():
        q, k, v = case.inputs(torch.float64)
        truth = reference_attention(q, k, v, case.geometry())
        assert relative_error(flash.flash_attention(*case.inputs(), case.geometry()), truth) < 1e-5


def test_strided_inputs_and_a_given_output() -> None:
    """As the fused projection gives them: views into one buffer, the output in the place of the queries."""
    case = Case()
    with torch.no_grad():
        q, k, v = case.inputs()
        buffer = torch.cat([q.flatten(2), k.flatten(2), v.flatten(2)], dim=-1)
        columns = buffer.unflatten(-1, (6, 32))
        q, k, v = columns[:, :, :4], columns[:, :, 4:5], columns[:, :, 5:]
        geometry = case.geometry()
        expected = flash.flash_attention(q, k, v, geometry)
        prepared = rotate.rotate_queries(q, geometry.rotary, 0, flash.LOG2_E)
        result = flash.prepared_attention(prepared, rotate.stack_keys(k, geometry.rotary), v, geometry, out=q)
        assert result.data_ptr() == buffer.data_ptr()
        torch.testing.assert_close(buffer[..., :128].unflatten(-1, (4, 32)), expected, rtol=0, atol=0)


def test_an_output_in_e4m3_is_multiplied_first() -> None:
    case = Case()
    with torch.no_grad():
        q, k, v = case.inputs()
        geometry = case.geometry()
        expected = flash.flash_attention(q, k, v, geometry)
        prepared, keys = (
            rotate.rotate_queries(q, geometry.rotary, 0, flash.LOG2_E),
            rotate.stack_keys(k, geometry.rotary),
        )
        out = torch.full(q.shape, math.nan).to(torch.float8_e4m3fn)
        for out_scale in (16.0, 1e6):
            flash.prepared_attention(prepared, keys, v, geometry, out=out, out_scale=out_scale)
            wanted = (expected * out_scale).clamp(-448, 448)
            assert ((out.float() - wanted).abs() <= (wanted.abs() * 2**-4).clamp(min=2**-10) * 1.01).all()


def test_what_no_window_reaches_is_not_read() -> None:
    case = Case(queries=100, heads=2, local=2)
    q, k, v = (x.detach() for x in case.inputs())
    geometry = replace(case.geometry(), windows=torch.tensor([11, 20]))
    k[:, :32], v[:, :32] = math.nan, math.nan
    out = flash.flash_attention(q, k, v, geometry)
    assert out[:, 64:].isfinite().all()  # a row sees 20 keys back, in blocks of 16
    assert out[:, :32].isnan().all()


def test_two_runs_are_bit_identical() -> None:
    case = Case(documents=2)
    first, second = (outputs_and_gradients(flash.flash_attention, case.inputs(), case.geometry()) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("share", quick([1, 2], [2]))  # 1 is what so short sequences have
def test_key_gradients_do_not_depend_on_how_heads_are_grouped(share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    expected = outputs_and_gradients(reference_attention, case.inputs(torch.float64), case.geometry())
    monkeypatch.setattr(flash, "_share", lambda count, programs: share)
    for x, t in zip(
        outputs_and_gradients(flash.flash_attention, case.inputs(), case.geometry()), expected, strict=True
    ):
        assert relative_error(x, t) < 3e-6


@pytest.mark.parametrize("position", [0, 2047, 131_072, 1_000_000])
def test_stored_queries_and_keys_have_the_right_product(position: int) -> None:
    """At any position, over chunks: what is left between their anchors is a factor per channel."""
    rotary = Rotary(1, 16, xpos_scale=32.0)
    chunk = xpos_chunk(rotary)
    i = torch.arange(position, position + 300, 37)
    q, k = torch.randn(1, len(i), 1, 32), torch.randn(1, len(i), 1, 32)
    stored_q = torch.cat(
        [rotate._rotate(q[:, [n]], 1, 10000.0, 1.0, 32.0, int(p), 1.0, 1, False) for n, p in enumerate(i)], 1
    )
    stored_k = torch.cat(
        [rotate._rotate(k[:, [n]], 1, 10000.0, 1.0, 32.0, int(p), 1.0, -1, False) for n, p in enumerate(i)], 1
    )
    distance = i[:, None] - i
    truth = rotated_logits(q.double().transpose(1, 2), k.double().transpose(1, 2), rotary, distance)[0, 0]
    between = (i // chunk)[:, None] - i // chunk
    factor = torch.exp(rotary.log_decay() * chunk * between[..., None]).repeat(1, 1, 2)
    product = torch.einsum("id,ijd,jd->ij", stored_q[0, :, 0].double(), factor, stored_k[0, :, 0].double())
    seen = distance >= 0
    torch.testing.assert_close(product[seen], truth[seen], rtol=0, atol=2e-5)


def test_operators_are_registered_well() -> None:
    case = Case(queries=5)
    q, k, v = case.inputs()
    g = case.geometry()
    prepared = rotate.rotate_queries(q, g.rotary, 0, 1.0).detach().requires_grad_()
    keys = rotate.stack_keys(k, g.rotary).detach().requires_grad_()
    arguments = (prepared, keys, v, g.slopes, g.windows, g.bounds, g.starts, 2, 2, 40.0, 1.0)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(flash._attend, arguments, test_utils=checks)
    torch.library.opcheck(rotate._rotate, (q, 2, 10000.0, 1.0, 40.0, 3, 1.0, 1, False), test_utils=checks)


MHA = {"attn_one_kv_head": False, "alibi_pos_bias": False}


@pytest.mark.parametrize("changes", quick([{}, {"rotary_heads": "all"}, MHA], [{}, MHA]))
def test_the_model_has_the_same_gradients_through_the_kernels(changes: dict[str, Any]) -> None:
    """All of them, the gains' too, beyond the trained length and with packed documents."""
    model = Andromeda(
        preset("nano", num_tokens=50, max_seq_len=16, depth=2, dim=64, heads=4, alibi_num_heads=2, **changes)
    )
    ids, documents = torch.randint(50, (2, 35)), torch.arange(35).expand(2, -1) // 20
    ours, expected = (losses_and_gradients(model, ids, documents, path) for path in ("triton", "reference"))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


ONE_PASS: dict[str, dict[str, Any]] = {
    "default": {},
    "MHA, no gains": {"attn_one_kv_head": False, "attn_qk_norm_dim_scale": False},
    "no xPos": {"rotary_heads": "all", "rotary_xpos": False},
    "MHA, no rotation": {"rotary_heads": "none", "rotary_xpos": False, "attn_one_kv_head": False},
    "tau of ten": {"attn_qk_norm": False},
    "no QK norm": {"qk_norm": False, "attn_qk_norm": False, "attn_qk_norm_dim_scale": False},
}
QUICK = [
    ("default", True), ("MHA, no gains", False), ("no xPos", False), ("MHA, no rotation", True), ("tau of ten", False),
    ("no QK norm", True),
]  # fmt: skip


@pytest.mark.parametrize("case", quick(itertools.product(ONE_PASS, (True, False)), QUICK), ids=str)
def test_the_model_prepares_queries_and_keys_in_one_pass(
    case: tuple[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the trained length, with gains that are not 1; of packed documents positions count from the row's start."""
    name, packed = case
    flags: dict[str, Any] = {"depth": 1, "dim": 32, "heads": 2, "alibi_num_heads": 1, "xpos_scale_base": 20.0}
    model = Andromeda(preset("nano", num_tokens=50, max_seq_len=64, **flags, **ONE_PASS[name]))
    for parameter_name, parameter in model.named_parameters():
        if "gain" in parameter_name:
            parameter.data.normal_(1, 0.3)
    ids, documents = torch.randint(50, (2, 35)), torch.tensor([[17], [30]]) <= torch.arange(35)
    expected = losses_and_gradients(model, ids, documents if packed else None, "reference")
    monkeypatch.delattr(QKNorm, "__call__")  # what plain PyTorch takes
    for a, b in zip(losses_and_gradients(model, ids, documents if packed else None, "triton"), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def losses_and_gradients(model: Andromeda, ids: Tensor, documents: Tensor | None, path: str) -> list[Tensor]:
    with attention_backend(path):
        losses = model.token_losses(ids, ids.roll(-1, 1), documents=documents)
    return [losses.detach(), *torch.autograd.grad(losses.mean(), list(model.parameters()))]


@pytest.mark.parametrize("parallel", quick([True, False], [True]))
def test_the_model_compiles_without_graph_breaks(parallel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(QKNorm, "__call__")  # queries and keys are prepared in one pass
    flags: dict[str, Any] = {"depth": 1, "dim": 64, "heads": 2, "alibi_num_heads": 1, "parallel_blocks": parallel}
    model, ids = Andromeda(preset("nano", num_tokens=50, **flags)), torch.randint(50, (1, 9))
    with attention_backend("triton"):
        compiled = torch.compile(lambda ids: model.token_losses(ids, ids), backend="aot_eager", fullgraph=True)
        gradients = [
            torch.autograd.grad(f.mean(), list(model.parameters()))
            for f in (compiled(ids), model.token_losses(ids, ids))
        ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_few_keys_are_weighed_exactly() -> None:
    """Where one key has all the weight the output is its value, bit for bit, in half precision too."""
    q, k, v = (x.detach().half() for x in Case(queries=1).inputs())
    out = flash.flash_attention(q, k, v, Case(queries=1).geometry())
    assert torch.equal(out, v.expand_as(out))


def test_choice_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, geometry = torch.device("cuda"), Geometry(rotary=Rotary(2, 64, xpos_scale=512.0))
    monkeypatch.setattr(dispatch, "has_flash_kernels", lambda device: device.type == "cuda")
    assert choose_backend(cuda, torch.bfloat16, 128, 10, geometry) == "triton"
    assert choose_backend(cuda, torch.float16, 64, 100_000, geometry) == "triton"
    assert choose_backend(cuda, torch.float32, 128, 10_000, geometry) == "tiled"
    assert choose_backend(cuda, torch.bfloat16, 80, 10_000, geometry) == "tiled"
    assert choose_backend(cuda, torch.bfloat16, 128, 10, geometry, flash=False) == "reference"
    assert choose_backend(torch.device("cpu"), torch.bfloat16, 128, 10_000, geometry) == "tiled"
    steep = Geometry(rotary=Rotary(2, 64, xpos_scale=2.0))  # stored keys would overflow float16
    assert choose_backend(cuda, torch.float16, 128, 10_000, steep) == "tiled"


def test_the_choice_of_the_kernels_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a constant: what it asks must not be traced, which torch 2.11 refuses."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", torch.compiler.disable(lambda device: (9, 0)))

    def chosen(x: Tensor) -> Tensor:
        name = choose_backend(torch.device("cuda"), torch.bfloat16, 128, 10, Geometry())
        return x + (1 if name == "triton" else 0)

    assert torch.compile(chosen, fullgraph=True, backend="eager")(torch.zeros(())) == 1
