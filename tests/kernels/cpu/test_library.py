"""The C++ kernels are compiled once, by what compiler there is; without one there is a reason in the log."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import pytest

from andromeda.kernels.cpu import library as module
from andromeda.kernels.cpu.library import without_library


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; what was found before is forgotten, and found again afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_found", functools.cache(module._found.__wrapped__))
    return tmp_path / "cache" / "andromeda"


@pytest.fixture
def few_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of the sources, of which a compilation takes seconds: functions of their names that do nothing."""
    sources = tmp_path / "sources"
    sources.mkdir()
    names = ("andromeda_linear", "andromeda_attention", "andromeda_blocks")
    (sources / "kernels.cpp").write_text("\n".join(f'extern "C" void {name}() {{}}' for name in names))
    monkeypatch.setattr(module, "SOURCES", sources)


def test_it_is_compiled_once(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.library() is module.library() is not None
    (made,) = directory.iterdir()
    assert directory.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("CXX", "false")  # would fail
    assert module._load()._name == str(made)


@pytest.mark.usefixtures("few_lines")
@pytest.mark.parametrize("content", [b"", b"no library"])
def test_a_damaged_one_is_compiled_anew(
    content: bytes, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module._load()
    (made,) = directory.iterdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))  # where nothing was loaded from yet
    damaged = tmp_path / "other" / "andromeda" / made.name
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(content)
    assert module._load()._name == str(damaged)
    assert f"{damaged} is compiled anew" in caplog.text
    assert damaged.stat().st_size > len(content)


def test_other_sources_are_compiled_again(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[Path]()

    def compile_nothing(sources: list[Path], flags: tuple[str, ...], to: Path) -> Path:
        calls.append(to)
        return to

    monkeypatch.setattr(module, "_compile", compile_nothing)
    for text in ("one", "two", "one"):
        sources = tmp_path / "sources"
        sources.mkdir(exist_ok=True)
        (sources / "kernels.h").write_text(text)
        monkeypatch.setattr(module, "SOURCES", sources)
        with pytest.raises(OSError, match="cannot open"):
            module._load()
    assert calls[0] == calls[2] != calls[1]


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        (None, "there is no C++ compiler; install g++ 12 or newer, or clang"),
        ("/no/such/compiler", "No such file or directory: '/no/such/compiler'"),
        ("sh -c 'echo x.cpp:1: error: broken >&2; exit 1' x", "failed: x.cpp:1: error: broken"),
        ("sh -c 'sleep 5' x", "took more than 0 s"),
    ],
)
def test_without_a_compiler_that_does_there_is_none(
    compiler: str | None,
    reason: str,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, "COMPILERS", ())
    monkeypatch.setattr(module, "SECONDS", 0.3 if "took" in reason else 60.0)
    if compiler is None:
        monkeypatch.delenv("CXX", raising=False)
    else:
        monkeypatch.setenv("CXX", compiler)
    with caplog.at_level(logging.WARNING):
        assert module.library() is module.library() is None
    (record,) = caplog.records
    assert reason in record.getMessage()
    assert list(directory.iterdir()) == []


@pytest.mark.usefixtures("few_lines")
def test_without_a_directory_of_ones_own_each_process_compiles(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("others write there", "a file"):
        if place == "others write there":
            directory.mkdir(parents=True)
            directory.chmod(0o777)
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", __file__)
        assert module._load().andromeda_linear is not None
    assert list(directory.iterdir()) == []


def test_it_can_be_left_out() -> None:
    with without_library():
        assert module.library() is None
    assert module.library() is not None
