"""`andromeda bench`: each subject at tiny size without a GPU, and what it says where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from andromeda.benchmarks import attention, embedding, loss, memory, peers, prefill, serving
from andromeda.cli import main
from andromeda.commands import bench
from andromeda.config import preset
from andromeda.errors import AndromedaError
from andromeda.model import Andromeda
from tests.quick import quick

TIMED = sorted(set(bench.SUBJECTS) - {"memory", "serving"})


def checked(subject: str, tmp_path: Path) -> dict[str, Any]:
    assert main(["bench", subject, "--check", "--json", str(tmp_path / "out.json")]) == 0
    figures: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())
    return figures


@pytest.mark.parametrize("subject", TIMED)
def test_without_a_gpu_one_line_says_so(
    subject: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", subject]) == 2
    assert capsys.readouterr() == (
        "",
        f"andromeda: error: bench {subject}: needs a CUDA device, and torch finds none; --check runs without one\n",
    )


@pytest.mark.parametrize("subject", TIMED)
def test_without_triton_one_line_says_so(
    subject: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert main(["bench", subject, "--check"]) == 2
    assert capsys.readouterr() == ("", f"andromeda: error: bench {subject}: needs triton: pip install triton\n")


@pytest.mark.parametrize("subject", bench.SUBJECTS)
def test_a_place_for_the_figures_is_looked_for_first(subject: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", subject, "--json", "nowhere/out.json"]) == 2
    assert "there is no directory" in capsys.readouterr().err


@pytest.fixture
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    for subject in (attention, embedding, loss):
        monkeypatch.setattr(subject, "CHECKED", (20,))


@pytest.mark.usefixtures("few_tokens")
def test_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    errors = checked("attention", tmp_path)["errors"]
    assert all(len(values) == 4 for by_way in errors.values() for values in by_way.values())
    assert "ours " in capsys.readouterr().out


def test_decode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert 0 < checked("decode", tmp_path)["error"] < 0.02
    assert capsys.readouterr().out.startswith("largest relative error: ")


@pytest.mark.usefixtures("few_tokens")
@pytest.mark.parametrize("subject", ["embedding", "loss"])
def test_rows_of_ours_and_of_peers(subject: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = checked(subject, tmp_path)
    assert report["machine"]["torch"] == torch.__version__
    assert [row["name"] for row in report["rows"]][:2] == {
        "embedding": ["ours", "nn.Embedding"], "loss": ["ours", "chunked PyTorch"],
    }[subject]  # fmt: skip
    assert all(row["repeatable"] for row in report["rows"] if row["name"] == "ours")
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(report["rows"])
    assert len({line.count("|") for line in table}) == 1


SMALL: dict[str, Any] = {"depth": 2, "heads": 2, "alibi_num_heads": 1}


@pytest.mark.parametrize("changes", quick([{}, SMALL], [SMALL]), ids=str)
def test_prefill(changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda _: None)
    monkeypatch.setattr(prefill, "CHECK", replace(prefill.CHECK, **changes))
    report = checked("prefill", tmp_path)
    assert "fp8" in report["errors"]
    assert report["peers"] == dict.fromkeys(peers.PEERS, "not installed")


def test_the_peers_run_at_the_size_of_a_preset() -> None:
    for name in peers.PEERS:
        if peers.installed(name):
            model = peers.build(name, prefill.CHECK, 40).eval()
            with torch.inference_mode():
                assert peers.last_logits(name, model)(torch.zeros(1, 40, dtype=torch.int64)).shape == (1, 1, 256)


def test_serving(tmp_path: Path) -> None:
    report = checked("serving", tmp_path)
    decoders, starters = ([row["contender"] for row in report[table]] for table in ("decode", "first_token"))
    assert decoders[:2] == ["engine", "generate"]
    assert starters[:3] == ["engine", "engine, prefix cached", "generate"]
    assert all(row["ceiling_ms"] > 0 for row in report["decode"])


def test_contexts_put_into_pages_are_found_there() -> None:
    model = Andromeda(preset("nano", num_tokens=64)).eval()
    row = serving.row_of_steps(model, batch=2, context=192, steps=2)
    assert row["cached_tokens"] == 192


def test_rows_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As the processes say; what one says is asked for in this one."""
    figures = {"bytes": 3 * 2**30, "floor_bytes": 2**30, "ms": 1234.0}

    def run(call: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert call[1:3] == ["-m", "andromeda.benchmarks.memory"]
        assert call[4:] == ["nano", "40"]
        if call[3] == memory.OURS:
            return subprocess.CompletedProcess(call, 0, f"loaded\n{json.dumps(figures)}\n", "")
        return subprocess.CompletedProcess(call, 1, "", "RuntimeError: cannot allocate memory\n")

    monkeypatch.setattr(memory, "CUDA", False)
    monkeypatch.setattr(memory, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(peers, "find_spec", lambda _: True)
    assert main(["bench", "memory", "--preset", "nano", "--lengths", "40", "--json", str(tmp_path / "out.json")]) == 0
    ours, other = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {name: ours[name] for name in figures} == figures
    assert (other["name"], other["problem"]) == ("x-transformers", "more than 16 GiB")
    assert "| 40 | andromeda | 3.00 | 1.00 | 3.00 | 1,234 |" in capsys.readouterr().out
    assert memory.forward(memory.OURS, preset("nano", depth=1), 40).keys() == figures.keys()


@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["bench", "memory", "--preset", "nano", "--lengths", "40", "--json", str(tmp_path / "out.json")]
    assert main(line) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["andromeda", "x-transformers"]
    for row in rows:
        if row["problem"] != "not installed":
            assert 0 < row["floor_bytes"] < row["bytes"] < 4 * 2**30
            assert row["ms"] > 0
    assert "| 40 | andromeda | 0." in capsys.readouterr().out


def test_memory_of_a_peer_that_is_too_much_or_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CUDA", False)
    monkeypatch.setattr(peers, "find_spec", lambda _: True)
    row = memory.row_of("x-transformers", "nano", 65536)
    assert row.problem == "more than 16 GiB"
    assert memory.line(row) == "| 65,536 | x-transformers | more than 16 GiB | | | |"
    monkeypatch.setattr(peers, "find_spec", lambda _: None)
    assert memory.row_of("x-transformers", "nano", 64).problem == "not installed"


def test_rows_of_prefill() -> None:
    assert prefill.wanted(["2b"], [8, 9], ["fp8"], peers=False) == [("2b", 8, "fp8"), ("2b", 9, "fp8")]
    assert [kind for _, _, kind in prefill.wanted(["2b"], [8], ["bf16"], peers=True)] == ["bf16", *peers.PEERS]
    assert prefill.read_row("700m:32768:fp8") == ("700m", 32768, "fp8")
    assert prefill.read_row("2b:8:x-transformers") == ("2b", 8, "x-transformers")
    for wrong in ("700m", "700m:32768", "700m:much:fp8", "700m:8:int8"):
        with pytest.raises(AndromedaError, match=f"--only {wrong}: must be PRESET:TOKENS:PRECISION"):
            prefill.read_row(wrong)
    with pytest.raises(AndromedaError, match="--precisions int8: there are bf16, fp8"):
        prefill.wanted(["2b"], [8], ["int8"], peers=False)
    with pytest.raises(AndromedaError, match="no preset '3b'"):
        prefill.run([("3b", 8, "fp8")], prefill.Options(), 1.0, lambda _: None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("memory --preset 3b", "bench memory: --preset 3b: there are nano, 150m"),
        ("prefill --presets 700m,3b", "bench prefill: --presets 3b: there are nano, 150m"),
        ("memory --lengths 8,0", "--lengths 8,0: a length must be at least 1 token"),
        ("loss --sweep", "unknown argument '--sweep' (see andromeda bench loss --help)"),
        ("attention --seconds soon", "argument --seconds: invalid float value: 'soon'"),
    ],
)
def test_a_mistake_is_named(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *line.split()]) == 2
    assert message in capsys.readouterr().err


def test_a_check_by_itself_needs_no_setting_and_few_packages() -> None:
    """Triton's interpreter is chosen before the kernels are imported; training's packages are not needed."""
    program = (
        "import sys\n"
        "for name in ('jsonargparse', 'tokenizers', 'safetensors', 'jinja2', 'matplotlib', 'transformers'):\n"
        "    sys.modules[name] = None\n"
        "from andromeda.cli import main\n"
        "sys.exit(main(['bench', 'decode', '--check']))"
    )
    there = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", program], env=there, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("largest relative error: ")
