"""Lines of metrics across kills, and operations counted by hand."""

from __future__ import annotations

import errno
import json
import resource
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from andromeda.errors import AndromedaError
from andromeda.model import Andromeda, Attention
from andromeda.training.metrics import (
    MetricsFile,
    peak_memory,
    possible_flops_per_second,
    read_metrics,
    training_flops_per_token,
)


def steps(path: Path) -> list[int]:
    return [line["step"] for line in read_metrics(path)]


def test_lines_beyond_the_resumed_step_and_a_torn_one_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with closing(MetricsFile(path, 0)) as metrics:
        for step in (10, 20, 30):
            metrics.write({"step": step, "loss": step / 7})
        metrics.sync()
    with path.open("a", errors="surrogateescape") as file:  # not even text
        file.write('{"step": 40, "lo\udcff')
    assert steps(path) == [10, 20, 30]
    with closing(MetricsFile(path, 20)) as metrics:
        assert steps(path) == [10, 20]
        metrics.write({"step": 30, "loss": 1.0})
    assert read_metrics(path) == [{"step": 10, "loss": 10 / 7}, {"step": 20, "loss": 20 / 7}, {"step": 30, "loss": 1.0}]
    with closing(MetricsFile(path, 0)):
        assert steps(path) == []
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_can_be_read_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with closing(MetricsFile(tmp_path / "m", 0)) as metrics:
        metrics.write({"step": 1})
        assert steps(tmp_path / "m") == [1]


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """Within it a file takes so many bytes: of what is written beyond, the first part alone."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_finds_no_room_is_kept_and_no_line_is_torn(tmp_path: Path) -> None:
    path, lines = tmp_path / "m", [{"step": step, "loss": step / 7} for step in range(1, 6)]
    with closing(MetricsFile(path, 0)) as metrics:
        metrics.write(lines[0])
        metrics.sync()
        metrics.write(lines[1])
        whole = path.read_bytes()
        with no_file_beyond(len(whole) + 10):
            for line in lines[2:4]:
                with pytest.raises(AndromedaError, match=r"m: cannot be written: .*; free space: .* from step 3 on"):
                    metrics.write(line)
                assert path.read_bytes() == whole
            with pytest.raises(AndromedaError, match="from step 3 on"):
                metrics.sync()
        metrics.write(lines[4])
        assert read_metrics(path) == lines


def test_what_the_kernel_has_dropped_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed fsync(2) may leave zeros where lines were."""
    path, lines = tmp_path / "m", [{"step": step} for step in range(1, 4)]

    def fsync(_: int) -> None:
        written = path.read_bytes()
        path.write_bytes(written[:12] + bytes(len(written) - 12))
        raise OSError(errno.ENOSPC, "No space left on device")

    with closing(MetricsFile(path, 0)) as metrics:
        metrics.write(lines[0])
        metrics.sync()
        metrics.write(lines[1])
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", fsync)
            with pytest.raises(AndromedaError, match=r"No space left on device; free space: .* from step 2 on"):
                metrics.sync()
        assert read_metrics(path) == lines[:1]
        metrics.write(lines[2])
        assert read_metrics(path) == lines
        metrics.sync()


def test_damage_is_told(tmp_path: Path) -> None:
    (tmp_path / "m").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(AndromedaError, match=r"m: holds a line that is not JSON"):
        read_metrics(tmp_path / "m")


def test_no_line_holds_what_json_cannot(tmp_path: Path) -> None:
    with closing(MetricsFile(tmp_path / "m", 0)) as metrics, pytest.raises(ValueError, match="JSON"):
        metrics.write({"step": 1, "loss": float("nan")})
    assert json.loads("[]") == read_metrics(tmp_path / "m")


def test_flops_by_hand(model: Andromeda) -> None:
    config = replace(model.config, alibi_pos_bias=False, rotary_heads="none", rotary_xpos=False)
    seq_len, dim, heads, dim_head = 10, 32, 4, 8
    weights = dim * (heads + 2) * dim_head + heads * dim_head * dim + 2 * 4 * dim * dim
    products = 2 * (2 * weights + 64 * dim)  # two blocks and the logits
    keys = heads * sum(range(1, seq_len + 1)) / seq_len
    attention = 2 * 2 * 2 * dim_head * keys  # two blocks, q.k and p.v
    assert training_flops_per_token(Andromeda(config), seq_len) == pytest.approx(3 * (products + attention))


def test_flops_by_torchs_own_count(model: Andromeda) -> None:
    """It counts whole squares of attention; the products are what is left."""
    config = replace(model.config, alibi_pos_bias=False, rotary_heads="none", rotary_xpos=False, attn_flash=False)
    plain, seq_len = Andromeda(config), 10
    ids = torch.zeros(1, seq_len, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        plain.logits(plain.hidden(ids)).sum().backward()
    square = 2 * 2 * 2 * config.heads * config.dim_head * seq_len**2
    # the backward pass of the first product would give the embedding's gradient, too: all have three
    assert counter.get_total_flops() == 3 * (seq_len * config.flops_per_token(seq_len).products + square)
    causal = square * (seq_len + 1) / (2 * seq_len)
    expected = counter.get_total_flops() - 3 * (square - causal)
    assert training_flops_per_token(plain, seq_len) * seq_len == pytest.approx(expected)


def test_peak_memory_follows_what_is_held() -> None:
    before = peak_memory(torch.device("cpu"))["peak_host_bytes"]
    held = torch.ones(before // 4 + 2**24)  # as much again, and more
    assert peak_memory(torch.device("cpu"))["peak_host_bytes"] > before + held.nbytes // 2


def test_what_the_windows_skip_now_is_not_counted(model: Andromeda) -> None:
    wide = training_flops_per_token(model, 1000)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_gain"):
                parameter.mul_(0.1)
    attention = model.blocks[0].attention
    assert isinstance(attention, Attention)
    certified = attention.windows()
    assert certified is not None
    windows = certified.tolist()
    narrow = training_flops_per_token(model, 1000)
    assert windows[0] < 1000
    local = sum(sum(min(i + 1, window) for i in range(1000)) / 1000 for window in windows[:2])
    expected = model.config.flops_per_token(1000).products + 2 * 4 * 8 * (local + 2 * 500.5)
    assert narrow == pytest.approx(3 * expected)
    assert narrow < wide


def test_what_is_possible_is_measured_and_leaves_random_numbers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("andromeda.training.metrics.PEAK_SECONDS", 0.01)
    monkeypatch.setattr("andromeda.training.metrics.PEAK_SIZE", {"cpu": 256})
    before = torch.get_rng_state()
    assert 1e7 < possible_flops_per_second(torch.device("cpu"), torch.float32) < 1e13
    assert torch.equal(torch.get_rng_state(), before)
