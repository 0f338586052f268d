"""ZeRO-3 with everything on NVMe, and what is refused before any work."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from andromeda.errors import AndromedaError
from andromeda.training.engines import async_io, check_engine
from andromeda.training.engines.zero3 import BUFFERS
from andromeda.training.processes import Processes
from andromeda.training.recipe import Recipe
from tests.ranks import Ranks
from tests.training.test_engines import ODD, assert_close, folders, run, tensors

# Ten matrices are cut in parts of two mebibytes, which go to files; parts of less than one stay in memory.
LARGE = dataclasses.replace(ODD, dim=513, depth=4, dim_head=32, heads=8, num_tokens=2048)
ONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    try:
        async_io.build()
    except AndromedaError as error:
        pytest.skip(str(error))
    pool = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


def on_nvme(path: Path) -> dict[str, Any]:
    return {"engine": "zero3", "offload": "nvme", "nvme_path": str(path), "learning_rate": 1e-3}


@pytest.mark.slow
def test_on_nvme_the_loss_curve_is_that_of_one_process(ranks: Ranks, tmp_path: Path) -> None:
    one, two, nvme = folders(tmp_path, "one", "two", "nvme")
    expected, _ = run(None, {"learning_rate": 1e-3}, 6, str(one), config=LARGE)
    found, _ = ranks(run, 2, on_nvme(nvme), 6, str(two), False, (), LARGE)[0]
    for line, exact in zip(found, expected, strict=True):
        for key in ("step", "tokens", "loss", "gradient_norm", "learning_rate", "validation_bits_per_byte"):
            assert line[key] == pytest.approx(exact[key], rel=1e-5), key
    assert_close(two, one, 1e-4)
    files = [path.name for path in nvme.rglob("*.swp")]
    of_weights = [name for name in files if name.endswith("_param.tensor.swp")]
    assert len(of_weights) == 2 * 10 > 2 * BUFFERS
    for key in ("exp_avg-", "exp_avg_sq-"):
        assert len([name for name in files if name.startswith(key)]) == 2 * 10
    assert all(path.stat().st_size > 2**20 for path in nvme.rglob("*_param.tensor.swp"))


@pytest.mark.slow
def test_on_nvme_stopped_and_resumed_it_is_the_same_bit_for_bit(ranks: Ranks, tmp_path: Path) -> None:
    whole, parts, nvme = folders(tmp_path, "whole", "parts", "nvme")
    for folder, until, goes_on in ((whole, 6, False), (parts, 2, False), (parts, 6, True)):
        ranks(run, 2, on_nvme(nvme), until, str(folder), goes_on, (), LARGE)
    ours, theirs = tensors(parts), tensors(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_what_two_on_nvme_saved_one_goes_on_with_and_the_other_way_round(ranks: Ranks, tmp_path: Path) -> None:
    whole, first, second, nvme = folders(tmp_path, "whole", "first", "second", "nvme")
    one: dict[str, Any] = {"learning_rate": 1e-3}
    run(None, one, 6, str(whole), config=LARGE)
    ranks(run, 2, on_nvme(nvme), 3, str(first), False, (), LARGE)
    run(None, one, 6, str(first), True, config=LARGE)
    run(None, one, 3, str(second), config=LARGE)
    ranks(run, 2, on_nvme(nvme), 6, str(second), True, (), LARGE)
    for folder in (first, second):
        assert_close(folder, whole, 1e-4)


@pytest.mark.slow
def test_on_nvme_steps_are_left_out_and_taken_back(ranks: Ranks, tmp_path: Path) -> None:
    one, two, nvme = folders(tmp_path, "one", "two", "nvme")
    keys = {"steps": 9, "save_every": 2}
    poisoned = [0, 3, 4, 5, 6, 7]
    run(None, {"learning_rate": 1e-3, **keys}, 9, str(one), poisoned=poisoned, config=LARGE)
    found, _ = ranks(run, 2, {**on_nvme(nvme), **keys}, 9, str(two), False, poisoned, LARGE)[0]
    assert [line["step"] for line in found if "left_out" in line] == [1, 4, 5, 6, 7, 8]
    assert_close(two, one, 1e-4)


def test_deepspeed_is_not_installed(recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(
        "andromeda.training.engines.zero3.find_spec", lambda name: None if name == "deepspeed" else there(name)
    )
    check_engine(recipe(engine="zero3"), ONE)  # one process alone needs none
    with pytest.raises(AndromedaError, match=r"needs deepspeed, .* pip install 'andromeda-lm\[deepspeed\]'"):
        check_engine(recipe(engine="zero3", offload="cpu"), ONE)


def test_deepspeed_cannot_be_imported(recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setattr("andromeda.training.engines.zero3.find_spec", lambda _: True)
    with pytest.raises(AndromedaError, match=r"needs deepspeed, which cannot be imported here: import of deepspeed"):
        check_engine(recipe(engine="zero3", offload="cpu"), ONE)


def test_async_io_is_not_built(recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    plan = recipe(engine="zero3", offload="nvme", nvme_path=str(tmp_path))
    with pytest.raises(AndromedaError, match=r"async_io, which is not built here; `python -m .*async_io` builds it"):
        check_engine(plan, ONE)


def test_a_build_that_was_killed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name in async_io.NAMES:
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.so").touch()
    assert async_io.is_built()
    (tmp_path / "async_io" / "lock").touch()
    assert not async_io.is_built()


@pytest.mark.parametrize(("name", "why"), [("missing", "No such file or directory"), ("file", "Not a directory")])
def test_a_directory_that_does_not_serve(name: str, why: str, recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    plan = recipe(engine="zero3", offload="nvme", nvme_path=str(tmp_path / name))
    message = f"nvme_path='.*{name}': files cannot be written there directly \\({why}\\); name a directory on a disk"
    with pytest.raises(AndromedaError, match=message):
        check_engine(plan, ONE)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
