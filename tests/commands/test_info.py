"""What `andromeda info` says, against figures counted by hand and against the model itself."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from andromeda import kernels
from andromeda.checkpoint import save_checkpoint
from andromeda.commands import info as module
from andromeda.commands.comparisons import PUBLISHED
from andromeda.commands.info import CONTEXTS, describe, info
from andromeda.config import PRESETS, AndromedaConfig
from andromeda.errors import AndromedaError
from andromeda.kernels import dispatch
from andromeda.model import Andromeda
from andromeda.positions import initial_windows

KIB = 1024
SIZE = re.compile(r"([\d.]+) ([KMG])iB")
TINY = AndromedaConfig(num_tokens=96, max_seq_len=64, dim=32, depth=3, dim_head=8, heads=4, alibi_num_heads=2)


def of_preset(name: str) -> dict[str, Any]:
    return describe(name, PRESETS[name], [list(initial_windows(PRESETS[name]))])


def compared(name: str) -> dict[str, dict[str, Any]]:
    return {row["model"]: row for row in of_preset(name)["compared"]}


def attentions(model: Andromeda) -> list[Any]:
    return [block.attention for block in model.blocks]


@pytest.fixture
def model_directory(tmp_path: Path) -> tuple[Path, Andromeda]:
    """A saved model whose gains differ from block to block."""
    torch.manual_seed(0)
    model = Andromeda(TINY)
    with torch.no_grad():
        for attention in attentions(model):
            attention.q_gain.uniform_(0.5, 2.0)
            attention.k_gain.uniform_(0.5, 2.0)
    save_checkpoint(tmp_path / "model", model)
    return tmp_path / "model", model


# ---- other models --------------------------------------------------------------------------------


def test_cache_bytes_a_token_are_the_known_ones() -> None:
    expected = {
        "GPT-3 175B": 4.5 * KIB * KIB,
        "LLaMA-7B": 512 * KIB,
        "LLaMA-13B": 800 * KIB,
        "LLaMA-65B": 2.5 * KIB * KIB,
        "Llama-3.2-3B": 112 * KIB,
    }
    assert {name: row["kv_bytes_per_token"] for name, row in compared("2b").items()} == expected
    assert of_preset("2b")["kv_bytes_per_token"] == 16 * KIB


def test_published_parameters_follow_from_the_published_shapes() -> None:
    def llama(vocabulary: int, dim: int, depth: int, kv_dim: int, hidden: int, tied: bool) -> int:
        block = 2 * dim * dim + 2 * dim * kv_dim + 3 * dim * hidden + 2 * dim
        return depth * block + dim + vocabulary * dim * (1 if tied else 2)

    counted = {
        "GPT-3 175B": 175_000_000_000,  # the paper rounds
        "LLaMA-7B": llama(32000, 4096, 32, 4096, 11008, tied=False),
        "LLaMA-13B": llama(32000, 5120, 40, 5120, 13824, tied=False),
        "LLaMA-65B": llama(32000, 8192, 80, 8192, 22016, tied=False),
        "Llama-3.2-3B": llama(128256, 3072, 28, 1024, 8192, tied=True),
    }
    assert {other.name: other.parameters for other in PUBLISHED} == counted
    gpt3 = 96 * 12 * 12288**2 + (50257 + 2048) * 12288
    assert gpt3 == pytest.approx(counted["GPT-3 175B"], rel=0.005)
    assert all(other.source for other in PUBLISHED)


def test_ratios_are_those_of_the_bytes() -> None:
    rows, ours = compared("2b"), PRESETS["2b"]
    assert rows["GPT-3 175B"]["cache_ratio"] == 288
    assert rows["Llama-3.2-3B"]["cache_ratio"] == 7
    for row in rows.values():
        for context in CONTEXTS:
            theirs = 2 * row["parameters"] + row["kv_bytes_per_token"] * context
            mine = 2 * ours.num_parameters() + ours.kv_bytes_per_token() * context
            assert row["ratio_with_weights"][context] == pytest.approx(theirs / mine)
            assert row["cache_bytes"][context] == row["kv_bytes_per_token"] * context


@pytest.mark.parametrize("name", PRESETS)
def test_the_claims_hold_where_it_is_said(name: str) -> None:
    config = PRESETS[name]
    for row in compared(name).values():

        def holds(tokens: int, row: dict[str, Any] = row) -> bool:
            theirs = 2 * row["parameters"] + row["kv_bytes_per_token"] * tokens
            mine = 2 * config.num_parameters() + config.kv_bytes_per_token() * tokens
            return theirs >= row["claimed_ratio"] * mine

        where = row["claim_holds_with_weights"]
        if where.startswith("from"):
            tokens = int(where.split()[1].replace(",", ""))
            assert holds(tokens) and not holds(tokens - 1) and holds(10**9)
        elif where.startswith("up to"):
            tokens = int(where.split()[2].replace(",", ""))
            assert holds(tokens) and not holds(tokens + 1) and not holds(10**9)
        else:
            assert {holds(0), holds(10**9)} == {where == "everywhere"}


@given(st.integers(-(10**12), 10**12), st.integers(-(10**7), 10**7), st.integers(0, 10**9))
def test_where_a_line_is_not_negative(spare: int, slope: int, tokens: int) -> None:
    where = module._where(spare, slope)
    number = int("".join(filter(str.isdigit, where)) or 0)
    said = {"fr": tokens >= number, "up": tokens <= number, "no": False, "ev": True}[where[:2]]
    assert said == (spare + slope * tokens >= 0)


# ---- this model ----------------------------------------------------------------------------------


def test_windows_of_a_preset_are_those_of_a_new_model() -> None:
    figures = of_preset("nano")
    model = Andromeda(PRESETS["nano"])
    windows = attentions(model)[0].windows()
    local = PRESETS["nano"].alibi_num_heads
    assert [head["longest"] for head in figures["windows"][:local]] == windows[:local].tolist()
    assert [head["longest"] for head in figures["windows"][local:]] == [None] * (6 - local)


@pytest.mark.parametrize("form", ["one file", "shards", "training run"])
def test_windows_of_a_directory_are_those_of_its_model(
    form: str, model_directory: tuple[Path, Andromeda], tmp_path: Path
) -> None:
    directory, model = model_directory
    if form == "shards":
        save_checkpoint(directory, model, max_shard_bytes=20_000)
        assert len(list(directory.glob("*.safetensors"))) > 2
    if form == "training run":
        save_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000009", Andromeda(TINY))
        directory = tmp_path / "run"
        save_checkpoint(directory / "checkpoints" / "step-00000010", model)
    info(str(directory), json=str(tmp_path / "out.json"))
    figures = json.loads((tmp_path / "out.json").read_text())
    by_block = torch.stack([attention.windows() for attention in attentions(model)])[:, :2].double()
    assert len(by_block.unique()) > 4  # otherwise this shows nothing
    for head in figures["windows"][:2]:
        windows = by_block[:, head["head"]]
        assert head["shortest"] == windows.min()
        assert head["median"] == windows.median()
        assert head["longest"] == windows.max()
    assert figures["windows_from"] == "the gains in the weights"

    for row in figures["flops_per_token"]:
        context = row["context"]
        attention = [
            TINY.flops_per_token(context, [*block.tolist(), math.inf, math.inf]).attention for block in by_block
        ]
        assert row["attention_in_windows"] == pytest.approx(sum(attention) / 3)
        assert row["attention"] == TINY.flops_per_token(context).attention
        assert row["products"] == TINY.flops_per_token(context).products


def test_a_directory_without_weights_has_the_windows_of_its_config(
    model_directory: tuple[Path, Andromeda], capsys: pytest.CaptureFixture[str]
) -> None:
    directory, _ = model_directory
    (directory / "model.safetensors").unlink()
    info(str(directory))
    assert "the weights are not all there" in " ".join(capsys.readouterr().out.split())


def test_parameters_are_those_of_the_model(model_directory: tuple[Path, Andromeda], tmp_path: Path) -> None:
    directory, model = model_directory
    info(str(directory), json=str(tmp_path / "out.json"))
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert figures["parameters_without_embedding"] == figures["parameters"] - 2 * model.output_weight.numel()
    assert figures["config"] == TINY.to_dict()


@pytest.mark.parametrize("attn_flash", [True, False])
def test_attention_is_said_to_be_what_computes_it(attn_flash: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    def recording(name: str, function: Any) -> Any:
        def record(*arguments: Any) -> Any:
            used.append(name)
            return function(*arguments)

        return record

    for name, function in kernels.BACKENDS.items():
        monkeypatch.setitem(dispatch.BACKENDS, name, recording(name, function))
    model = Andromeda(AndromedaConfig(**TINY.to_dict() | {"attn_flash": attn_flash}))
    model(torch.zeros(1, 600, dtype=torch.int64))
    assert {module._attention_backend(model.config).split()[0]} == set(used)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_prints_within_80_columns(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    info(name)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    rows = of_preset(name)
    memory = {row["model"]: row for row in rows["compared"]} | {"this model": rows}
    for line in out.split("Memory in bfloat16")[1].splitlines()[3:9]:
        row = memory.pop(line[:14].strip())
        sizes = [row["weight_bytes"], row["kv_bytes_per_token"], *row["cache_bytes"].values()]
        shown = [float(size) * {"K": 2**10, "M": 2**20, "G": 2**30}[unit] for size, unit in SIZE.findall(line)]
        assert shown == pytest.approx(sizes, rel=0.01)
    assert not memory


def test_a_model_without_windows_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = AndromedaConfig(**TINY.to_dict() | {"window_epsilon": 0.0, "use_abs_pos_emb": True})
    save_checkpoint(tmp_path / "[red]model", Andromeda(config))
    info(str(tmp_path / "[red]model"))
    out = capsys.readouterr().out
    assert "[red]model" in "".join(out.split())
    assert "Every head reaches everywhere" in out
    assert "64 tokens, its limit" in out


# ---- errors --------------------------------------------------------------------------------------


def test_an_unknown_name_lists_the_presets() -> None:
    with pytest.raises(AndromedaError, match=r"3b: neither a preset \(nano, 150m.*7b\) nor a directory"):
        info("3b")


def test_corrupt_weights_are_named(model_directory: tuple[Path, Andromeda]) -> None:
    weights = model_directory[0] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(AndromedaError, match=r"model\.safetensors: cut short, corrupt"):
        info(str(model_directory[0]))


def test_a_json_file_that_cannot_be_written_is_named_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("important")
    for path, what in (
        (tmp_path, "is a directory"),
        (tmp_path / "nowhere" / "out.json", "there is no directory"),
        (tmp_path / "thesis.txt", "holds something other than JSON"),
    ):
        with pytest.raises(AndromedaError, match=what):
            info("no such model", json=str(path))
    assert (tmp_path / "thesis.txt").read_text() == "important"


def test_a_json_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out.json"
    target.write_text('"before"')
    link = tmp_path / "link.json"
    link.symlink_to(target)

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full_disk)
        with pytest.raises(AndromedaError, match=r"link\.json: cannot be written: No space left on device"):
            info("nano", json=str(link))
    assert target.read_text() == '"before"'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.json", "out.json"]

    info("nano", json=str(link))
    assert link.is_symlink()
    assert json.loads(target.read_text())["model"] == "nano"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.json", "out.json"]


def test_json_goes_to_a_device_as_it_is() -> None:
    info("nano", json="/dev/null")
    assert Path("/dev/null").is_char_device()
