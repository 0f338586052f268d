"""andromeda.checkpoint: what is loaded is what was saved, bit for bit, or one clear line."""

import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from andromeda import atomic
from andromeda.checkpoint import is_checkpoint, load_checkpoint, load_config, resolve, run_checkpoints, save_checkpoint
from andromeda.config import AndromedaConfig
from andromeda.errors import AndromedaError
from andromeda.model import EMBEDDING_PROVIDERS, Andromeda

SMALL = AndromedaConfig(num_tokens=16, max_seq_len=16, dim=8, depth=2, dim_head=4, heads=2, alibi_num_heads=1)
SHARDED = 1000  # bytes: some ten shards of SMALL


def same(one: Andromeda, other: Andromeda) -> bool:
    """Bit for bit, in the same order, buffers that no checkpoint holds included."""
    tensors = [dict(itertools.chain(model.named_parameters(), model.named_buffers())) for model in (one, other)]
    return list(tensors[0]) == list(tensors[1]) and all(
        a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)
        for a, b in zip(tensors[0].values(), tensors[1].values(), strict=True)
    )


def raw(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def fill(model: Andromeda, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def version(directory: Path, verify: bool = True) -> int:
    """The one number that all weights hold, as the file beside them does; fails on a mix."""
    values = torch.cat([weight.flatten() for weight in load_checkpoint(directory, verify=verify).parameters()]).unique()
    assert len(values) == 1
    return int(values)


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def edit_json(path: Path, **changes: object) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def edit_weights(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """As another tool would: without a checksum."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.fixture
def model() -> Andromeda:
    torch.manual_seed(0)
    return Andromeda(SMALL)


@pytest.fixture
def saved(tmp_path: Path, model: Andromeda) -> Path:
    save_checkpoint(tmp_path / "model", model)
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path, model: Andromeda) -> Path:
    save_checkpoint(tmp_path / "model", model, max_shard_bytes=SHARDED)
    return tmp_path / "model"


# ---- round trips ---------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    config=st.builds(
        lambda **values: replace(SMALL, **values),
        tie_embeddings=st.booleans(),
        parallel_blocks=st.booleans(),
        deepnorm=st.booleans(),
        use_abs_pos_emb=st.booleans(),
        attn_one_kv_head=st.booleans(),
        attn_qk_norm_dim_scale=st.booleans(),
        depth=st.integers(1, 3),
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    max_shard_bytes=st.integers(1, 20_000),
)
def test_comes_back_bit_for_bit(
    tmp_path: Path, config: AndromedaConfig, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    model = Andromeda(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    save_checkpoint(tmp_path / "model", model, max_shard_bytes=max_shard_bytes)
    loaded = load_checkpoint(tmp_path / "model")
    assert loaded.config == load_config(tmp_path / "model") == config
    assert same(loaded, model)


def test_the_loaded_model_computes_and_learns_the_same(saved: Path, model: Andromeda) -> None:
    loaded = load_checkpoint(saved)
    ids = torch.arange(12)[None] % SMALL.num_tokens
    assert torch.equal(loaded(ids), model(ids))
    for each in (loaded, model):
        each.token_losses(ids, ids).sum().backward()
    assert same(loaded, model)
    for ours, theirs in zip(loaded.parameters(), model.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)


def test_special_values_survive(tmp_path: Path, model: Andromeda) -> None:
    with torch.no_grad():
        next(model.parameters())[0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])
    save_checkpoint(tmp_path / "model", model)
    assert same(load_checkpoint(tmp_path / "model"), model)


def test_the_files_and_nothing_that_runs(saved: Path, model: Andromeda) -> None:
    assert set(files_of(saved)) == {"config.json", "model.safetensors"}
    config = json.loads((saved / "config.json").read_text())
    assert config == {"model_type": "andromeda", "format_version": 1, **SMALL.to_dict()}
    assert not any("." in value for value in config.values() if isinstance(value, str))  # no class paths
    header_bytes = int.from_bytes((saved / "model.safetensors").read_bytes()[:8], "little")
    size = (saved / "model.safetensors").stat().st_size
    assert size == 8 + header_bytes + sum(tensor.nbytes for tensor in model.state_dict().values())  # nothing else
    assert set(load_file(saved / "model.safetensors")) == set(model.state_dict())


def test_shards_in_the_form_of_hugging_face(sharded: Path, model: Andromeda) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    state = model.state_dict()
    shards = sorted(path.name for path in sharded.glob("model-*"))
    assert shards == [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    assert len(shards) > 3
    assert list(index["weight_map"]) == list(state)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    for shard in shards:
        tensors = load_file(sharded / shard)
        assert {name for name, place in index["weight_map"].items() if place == shard} == set(tensors)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= SHARDED or len(tensors) == 1


@pytest.mark.parametrize("max_shard_bytes", [SHARDED, 10**9])
def test_the_same_model_gives_the_same_bytes(tmp_path: Path, model: Andromeda, max_shard_bytes: int) -> None:
    save_checkpoint(tmp_path / "one", model, max_shard_bytes=max_shard_bytes)
    save_checkpoint(tmp_path / "other", load_checkpoint(tmp_path / "one"), max_shard_bytes=max_shard_bytes)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "other")


def test_a_compiled_model_is_saved_under_its_own_names(tmp_path: Path, model: Andromeda) -> None:
    save_checkpoint(tmp_path / "model", torch.compile(model))  # type: ignore[arg-type]
    assert same(load_checkpoint(tmp_path / "model"), model)


def test_dtype_converts_weights_and_leaves_exact_buffers(saved: Path, model: Andromeda) -> None:
    loaded = load_checkpoint(saved, dtype=torch.bfloat16)
    for (name, ours), theirs in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs.bfloat16()), name
    slopes = loaded.get_buffer("blocks.0.attention.slopes")
    assert torch.equal(slopes, model.get_buffer("blocks.0.attention.slopes"))
    with pytest.raises(AndromedaError, match=r"dtype=torch\.int8"):
        load_checkpoint(saved, dtype=torch.int8)
    with pytest.raises(AndromedaError, match="device 'warp' is not to be had"):
        load_checkpoint(saved, device="warp")


@pytest.mark.gpu
def test_onto_another_device(saved: Path, model: Andromeda) -> None:
    loaded = load_checkpoint(saved, device="cuda")
    assert all(tensor.is_cuda for tensor in itertools.chain(loaded.parameters(), loaded.buffers()))
    assert same(loaded.cpu(), model)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure the peak")
def test_loading_takes_one_copy_and_no_compiler(tmp_path: Path) -> None:
    config = AndromedaConfig(num_tokens=256, dim=1024, depth=2, dim_head=64, heads=8, alibi_num_heads=4)
    with torch.device("meta"):
        model = Andromeda(config)
    save_checkpoint(tmp_path / "model", model.to_empty(device="cpu"))
    program = """
import json, pathlib, re, sys
from andromeda.checkpoint import load_checkpoint

def peak_bytes():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])

pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = peak_bytes()
model = load_checkpoint(sys.argv[1])
print(json.dumps([peak_bytes() - before, "torch._dynamo" in sys.modules]))
"""
    command = [sys.executable, "-c", program, str(tmp_path / "model")]
    peak, compiler = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert 0.9 * weights < peak < 1.3 * weights
    assert not compiler


# ---- embeddings of the user's own ----------------------------------------------------------------


class Scaled(nn.Module):
    """Two names for one parameter, and a buffer that no checkpoint holds."""

    scale: Tensor

    def __init__(self, config: AndromedaConfig) -> None:
        super().__init__()
        self.table = nn.Embedding(config.num_tokens, config.dim)
        self.weight = self.table.weight
        self.register_buffer("scale", torch.tensor(3.0), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids) * self.scale


class ScaledAgain(Scaled):
    def reset_buffers(self) -> None:
        self.scale = torch.tensor(3.0, device=self.weight.device)


@pytest.fixture
def provided(monkeypatch: pytest.MonkeyPatch) -> AndromedaConfig:
    monkeypatch.setitem(EMBEDDING_PROVIDERS, "Scaled", Scaled)
    monkeypatch.setitem(EMBEDDING_PROVIDERS, "ScaledAgain", ScaledAgain)
    return replace(SMALL, embedding_provider="ScaledAgain", tie_embeddings=True)


def test_a_registered_embedding(tmp_path: Path, provided: AndromedaConfig) -> None:
    model = Andromeda(provided)
    save_checkpoint(tmp_path / "model", model)
    loaded = load_checkpoint(tmp_path / "model")
    assert same(loaded, model)
    assert loaded.embedding.weight is loaded.embedding.table.weight  # type: ignore[union-attr]
    assert loaded.output_weight is loaded.embedding.weight


def test_an_embedding_handed_over(tmp_path: Path, provided: AndromedaConfig) -> None:
    config = replace(provided, embedding_provider="Scaled")
    model = Andromeda(config)
    save_checkpoint(tmp_path / "model", model)
    with pytest.raises(AndromedaError, match=r"buffer 'embedding\.scale'.*reset_buffers.*embedding_provider"):
        load_checkpoint(tmp_path / "model")
    mine = Scaled(config)
    mine.weight.requires_grad_(False)
    loaded = load_checkpoint(tmp_path / "model", embedding_provider=mine)
    assert loaded.embedding is mine
    assert same(loaded, model)
    assert not mine.weight.requires_grad
    assert mine.weight is mine.table.weight


# ---- runs ----------------------------------------------------------------------------------------


def test_a_run_stands_for_its_newest_whole_checkpoint(tmp_path: Path, model: Andromeda) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(AndromedaError, match="has saved no checkpoint yet"):
        resolve(tmp_path)
    names = ["step-100000000", "step-00000900", "step-00000020"]
    for name in names:
        save_checkpoint(tmp_path / "checkpoints" / name, model)
    save_checkpoint(tmp_path / "checkpoints" / "step-99999999.1.damaged", model)
    assert [path.name for path in run_checkpoints(tmp_path)] == names
    assert resolve(tmp_path).name == "step-100000000"
    (tmp_path / "checkpoints" / "step-100000000" / "config.json").unlink()
    assert resolve(tmp_path).name == "step-00000900"
    assert resolve(tmp_path / "checkpoints" / "step-00000020").name == "step-00000020"


# ---- what the caller adds ------------------------------------------------------------------------


def test_files_are_written_in_the_same_step(tmp_path: Path, model: Andromeda) -> None:
    save_checkpoint(tmp_path / "one", model, files=lambda folder: (folder / "tokenizer.json").write_text("{}"))
    assert (tmp_path / "one" / "tokenizer.json").read_text() == "{}"
    assert set(files_of(tmp_path / "one")) == {"config.json", "model.safetensors", "tokenizer.json"}
    save_checkpoint(tmp_path / "one", model)  # replaced whole
    assert set(files_of(tmp_path / "one")) == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"])
def test_the_checkpoint_s_own_names_are_refused(saved: Path, model: Andromeda, name: str) -> None:
    before = files_of(saved.parent)
    with pytest.raises(AndromedaError, match="one of the checkpoint's own"):
        save_checkpoint(saved, model, files=lambda folder: (folder / name).touch())
    assert files_of(saved.parent) == before


# ---- saves that do not succeed -------------------------------------------------------------------


@pytest.mark.parametrize("exchange", [True, False])
def test_killed_at_random_moments(
    tmp_path: Path, model: Andromeda, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    target = tmp_path / "here" / "model"
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)

    def save(number: int) -> None:
        fill(model, number)
        save_checkpoint(
            target, model, files=lambda folder: (folder / "number").write_text(str(number)), max_shard_bytes=SHARDED
        )

    save(0)
    choose, numbers = random.Random(0), [0]
    for _ in range(10):
        pid = os.fork()
        if pid == 0:
            for number in itertools.count(numbers[-1] + 1):
                save(number)
        time.sleep(choose.uniform(0, 0.12))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        numbers.append(version(target))
        assert int((atomic.latest(target) / "number").read_text()) == numbers[-1]
    assert numbers == sorted(numbers)
    assert numbers[-1] > 0
    save(numbers[-1] + 1)
    assert list(target.parent.iterdir()) == [target]


def test_read_while_it_is_replaced(tmp_path: Path, model: Andromeda) -> None:
    target = tmp_path / "model"

    def save(number: int) -> None:
        fill(model, number)
        save_checkpoint(target, model, max_shard_bytes=SHARDED)

    save(0)
    pid = os.fork()
    if pid == 0:
        for number in itertools.count(1):
            save(number)
    try:
        seen = [0]
        while len(set(seen)) < 5:
            seen.append(version(target, verify=bool(len(seen) % 2)))
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert seen == sorted(seen)


@pytest.mark.parametrize("max_shard_bytes", [SHARDED, 10**9])
def test_no_room_for_the_weights_keeps_the_old_one(saved: Path, model: Andromeda, max_shard_bytes: int) -> None:
    before = files_of(saved.parent)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, limits[1]))  # the system refuses to let a file grow beyond it
    try:
        with pytest.raises(AndromedaError, match=r"File too large.*what was there before is unchanged"):
            save_checkpoint(saved, model, max_shard_bytes=max_shard_bytes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files_of(saved.parent) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_keeps_the_old_one(saved: Path, model: Andromeda) -> None:
    before = files_of(saved.parent)
    with pytest.raises(AndromedaError, match=r"No space left on device.*what was there before is unchanged"):
        save_checkpoint(saved, model, files=lambda _: Path("/dev/full").write_text("tokenizer"))
    assert files_of(saved.parent) == before


def test_a_foreign_directory_is_refused(tmp_path: Path, saved: Path, model: Andromeda) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for content in ("", "{}", '{"model_type": "llama"}', "[]"):
        (foreign / "config.json").write_text(content)
        with pytest.raises(AndromedaError, match="foreign: holds other files"):
            save_checkpoint(foreign, model)
        assert files_of(foreign) == {"config.json": content.encode()}
    (saved / "model.safetensors").unlink()
    save_checkpoint(saved, model)  # broken, but ours
    assert same(load_checkpoint(saved), model)


def test_what_cannot_be_stored_is_refused(saved: Path, model: Andromeda, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files_of(saved.parent)
    monkeypatch.setattr(nn.Embedding, "get_extra_state", lambda _: {"a": 1})
    with pytest.raises(AndromedaError, match=r"cannot store 'embedding\._extra_state', a dict"):
        save_checkpoint(saved, model)
    with pytest.raises(AndromedaError, match="max_shard_bytes=0"):
        save_checkpoint(saved, model, max_shard_bytes=0)
    assert files_of(saved.parent) == before


# ---- checkpoints that are not whole --------------------------------------------------------------


def test_is_checkpoint(saved: Path, tmp_path: Path) -> None:
    assert is_checkpoint(saved)
    for no_checkpoint in (tmp_path, tmp_path / "none", saved / "config.json"):
        assert not is_checkpoint(no_checkpoint)


def test_one_moved_aside_is_found(saved: Path, model: Andromeda) -> None:
    saved.rename(saved.with_name(".model.old"))
    assert is_checkpoint(saved)
    assert same(load_checkpoint(saved), model)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "llama"}, "config.json: model_type is 'llama', not 'andromeda'"),
        ({"model_type": None}, "config.json: model_type is None"),
        ({"format_version": 2}, "config.json: format_version is 2, but this Andromeda reads up to 1; upgrade"),
        ({"format_version": "x"}, "config.json: format_version is 'x'"),
        ({"colour": 3}, "config.json: config: unknown key 'colour'"),
        ({"heads": 0}, "config.json: config: heads=0 must be at least 1"),
        ({"heads": "2"}, "config.json: config: heads='2' must be of type int"),
    ],
)
def test_a_wrong_config(saved: Path, changes: dict[str, object], match: str) -> None:
    edit_json(saved / "config.json", **changes)
    for read in (load_config, load_checkpoint):
        with pytest.raises(AndromedaError, match=match) as caught:
            read(saved)
        assert str(saved) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[1]", b"[" * 100_000])
def test_a_config_that_is_no_json_object(saved: Path, content: bytes) -> None:
    (saved / "config.json").write_bytes(content)
    with pytest.raises(AndromedaError, match=r"config\.json: (is not JSON|holds a list)"):
        load_config(saved)


def test_nothing_there(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(AndromedaError, match="none: no such directory"):
        load_checkpoint(tmp_path / "none")
    with pytest.raises(AndromedaError, match=r"config\.json: is a file"):
        load_checkpoint(saved / "config.json")
    (saved / "config.json").unlink()
    with pytest.raises(AndromedaError, match=r"config\.json: no such file"):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"depth": 3}, "weights do not belong to config.json: they lack 'blocks.2"),
        ({"depth": 1}, "weights do not belong to config.json: they have, beyond what it names, 'blocks.1"),
        ({"dim": 16}, r"tensor '.*' is floating-point \[.*8.*\], but config.json makes it floating-point \[.*16.*\]"),
    ],
)
@pytest.mark.parametrize("max_shard_bytes", [SHARDED, 10**9])
def test_weights_of_another_config(
    tmp_path: Path, model: Andromeda, changes: dict[str, object], match: str, max_shard_bytes: int
) -> None:
    save_checkpoint(tmp_path / "model", model, max_shard_bytes=max_shard_bytes)
    edit_json(tmp_path / "model" / "config.json", **changes)
    with pytest.raises(AndromedaError, match=match):
        load_checkpoint(tmp_path / "model")


@pytest.mark.parametrize("key", ["depth", "heads", "dim", "num_tokens", "ff_mult"])
def test_an_absurd_config_is_refused_before_it_is_built(saved: Path, key: str) -> None:
    edit_json(saved / "config.json", **{key: 10**12})
    with pytest.raises(AndromedaError, match=r"weights do not belong to config\.json: it names [\d,]{10,} parameters"):
        load_checkpoint(saved)


def test_weights_of_another_kind(saved: Path) -> None:
    edit_weights(saved / "model.safetensors", lambda tensors: tensors.update({"norm": torch.zeros(2)}))
    with pytest.raises(AndromedaError, match="beyond what it names, 'norm'"):
        load_checkpoint(saved)
    edit_weights(saved / "model.safetensors", lambda tensors: tensors.pop("norm"))
    load_checkpoint(saved)  # weights of another tool, without a checksum, are taken as they are

    def to_integers(tensors: dict[str, Tensor]) -> None:
        tensors["embedding.weight"] = tensors["embedding.weight"].to(torch.int32)

    edit_weights(saved / "model.safetensors", to_integers)
    with pytest.raises(AndromedaError, match=r"'embedding.weight' is integer \[16, 8\].*floating-point \[16, 8\]"):
        load_checkpoint(saved)


def test_weights_missing_cut_short_or_changed(saved: Path) -> None:
    weights = saved / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(AndromedaError, match=r"model\.safetensors: cut short"):
        load_checkpoint(saved)
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(AndromedaError, match=r"model\.safetensors: corrupt, .* checksum"):
        load_checkpoint(saved)
    load_checkpoint(saved, verify=False)
    weights.unlink()
    with pytest.raises(AndromedaError, match=r"model\.safetensors: no such file"):
        load_checkpoint(saved)


def test_a_missing_shard(sharded: Path) -> None:
    shard = min(sharded.glob("model-00002-*"))
    shard.unlink()
    with pytest.raises(AndromedaError, match=rf"{shard.name}: no such file"):
        load_checkpoint(sharded)


@pytest.mark.parametrize("verify", [True, False])
def test_a_shard_of_another_save(tmp_path: Path, sharded: Path, model: Andromeda, verify: bool) -> None:
    fill(model, 1.0)
    save_checkpoint(tmp_path / "later", model, max_shard_bytes=SHARDED)
    shard = min(sharded.glob("model-00002-*"))
    shutil.copy(tmp_path / "later" / shard.name, shard)
    with pytest.raises(AndromedaError, match=rf"{shard.name}: comes from another save"):
        load_checkpoint(sharded, verify=verify)


def test_a_single_file_beside_an_index(tmp_path: Path, sharded: Path, model: Andromeda) -> None:
    save_checkpoint(tmp_path / "later", model)
    shutil.copy(tmp_path / "later" / "model.safetensors", sharded)
    with pytest.raises(AndromedaError, match="has both"):
        load_checkpoint(sharded)


def test_a_wrong_index(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())

    def refused(match: str, **changes: object) -> None:
        path.write_text(json.dumps(index | changes))
        with pytest.raises(AndromedaError, match=match):
            load_checkpoint(sharded)

    places = index["weight_map"]
    refused("tensor 'extra': it is not there", weight_map=places | {"extra": min(places.values())})
    refused(
        r"tensor 'embedding\.weight': .*index\.json does not list it there",
        weight_map=places | {"embedding.weight": max(places.values())},
    )
    for name in ("../model-1.safetensors", "/etc/x.safetensors", "..\\x.safetensors", "c:x.safetensors", "x.bin", 3):
        refused("is not the name of a weights file beside it", weight_map=places | {"extra": name})
    for wrong in ({"weight_map": [1]}, {"metadata": 1}, {"metadata": {"sha256": 1}}):
        refused("is not an index of weights", **wrong)
    refused("names 1,704 parameters, and they hold 0", weight_map={})
    path.write_text("{")
    with pytest.raises(AndromedaError, match=r"index\.json: is not JSON"):
        load_checkpoint(sharded)
