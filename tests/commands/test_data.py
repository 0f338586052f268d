"""`andromeda data`: the spec that the repository carries, from text to what is shown of a sequence."""

from __future__ import annotations

from pathlib import Path

import pytest

from andromeda.cli import main
from andromeda.data.stream import Stream

ROOT = Path(__file__).parents[2]
SMALL = str(ROOT / "recipes" / "data" / "small.yaml")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "small"
    assert main(["data", "build", SMALL, str(out), "--corpus", str(ROOT)]) == 0
    return out


def test_a_build_says_what_it_made(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "build", SMALL, str(small), "--corpus", str(ROOT)]) == 0
    said = capsys.readouterr().out
    assert "tokens of 1 source, 7,5" in said
    assert "report in report.md" in said
    assert "# What was built" in (small / "report.md").read_text()
    assert main(["data", "verify", str(small)]) == 0
    assert "files as built" in capsys.readouterr().out


def test_stats_name_sources_and_stages(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "stats", str(small)]) == 0
    said = capsys.readouterr().out
    for part in ("verse", "68", "public domain", "short", "1,024", "100.0%"):
        assert part in said


def test_show_prints_what_training_reads(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stream = Stream(small)
    number = len(stream) - 1
    assert main(["data", "show", str(small), "--sequence", str(number)]) == 0
    said, shown = capsys.readouterr().out, stream.sequence(number)
    assert said.startswith(f"sequence {number:,}: stage long, source verse, epoch 0, 1,024 tokens\n--- tokens 0 to ")
    for piece in shown.pieces:
        assert stream.where(piece) in said
        assert stream.tokenizer.decode(shown.ids[piece.first : piece.end].tolist(), skip_special=False) in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "none.yaml", "out"], "none.yaml: cannot be read"),
        (["build", SMALL, "out", "--corpus", "nowhere"], "--corpus nowhere: no such folder"),
        (["build", SMALL, "out", "--workers", "0"], "--workers 0: must be 1 or more"),
        (["build", SMALL, "out", "--corpus", "."], "source verse: no file matches examples/verse/train.jsonl"),
        (["verify", "."], "holds no manifest.json"), (["stats", "."], "holds no manifest.json"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_in_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_sequence_that_is_not_there(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "show", str(small), "--sequence", "999999"]) == 2
    assert "--sequence 999999" in capsys.readouterr().err
