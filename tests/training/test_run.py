"""Run directories: whose they are, and which checkpoint counts."""

from __future__ import annotations

import errno
import fcntl
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from andromeda.errors import AndromedaError
from andromeda.training.recipe import DataRecipe, DiLoCoRecipe, Recipe
from andromeda.training.run import RunDirectory, open_run

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def make(recipe: MakeRecipe, tmp_path: Path) -> MakeRecipe:
    return lambda **keys: recipe(**{"output": str(tmp_path / "run"), **keys})


def add_checkpoint(run: RunDirectory, step: int, content: str = "whole") -> Path:
    path = run.checkpoint(step)
    path.mkdir(parents=True)
    (path / "content").write_text(content)
    return path


def load(path: Path) -> str:
    content = (path / "content").read_text()
    if content != "whole":
        raise AndromedaError(f"{path}: is {content}")
    return path.name


def snapshot(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_a_run_is_taken_up_again(make: MakeRecipe) -> None:
    with open_run(make()) as run:
        assert run.checkpoints() == []
        add_checkpoint(run, 5)
    with open_run(make()) as run:
        assert [path.name for path in run.checkpoints()] == ["step-00000005"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning_rate": 0.5}, r"this run has learning_rate=0\.001, and the recipe now says 0\.5"),
        ({"model": {"preset": "nano", "dim": 64}}, r"this run has model\.dim=None, and the recipe now says 64"),
        ({"model": {"preset": "150m"}}, r"this run has model\.preset='nano'"),
        ({"data": DataRecipe(train="a.txt", packed_documents=False)}, r"data\.packed_documents=True"),
        ({"data": DataRecipe(train=["a.txt", "b.txt"])}, r"data\.train='a\.txt', and .*'b\.txt'"),
        ({"betas": (0.9, 0.99)}, r"betas=\[0\.9, 0\.95\]"),
        ({"optimizer": "muon"}, r"this run has optimizer='adamw', and the recipe now says 'muon'"),
    ],
)
def test_another_recipe_is_refused(make: MakeRecipe, changed: dict[str, object], message: str) -> None:
    with open_run(make()) as run:
        add_checkpoint(run, 5)
    before = snapshot(run.path)
    with pytest.raises(AndromedaError, match=message) as raised, open_run(make(**changed)):
        pass
    assert "\n" not in str(raised.value)
    assert snapshot(run.path) == before


def test_a_run_older_than_a_key_has_its_default(make: MakeRecipe) -> None:
    with open_run(make()) as run:
        add_checkpoint(run, 5)
    stored = run.path / "recipe.yaml"
    stored.write_text(stored.read_text().replace("optimizer: adamw\n", ""))
    before = stored.read_bytes()
    with pytest.raises(AndromedaError, match=r"this run has optimizer='adamw', and"), open_run(make(optimizer="muon")):
        pass
    assert stored.read_bytes() == before and b"optimizer" not in before
    with open_run(make()):
        assert "optimizer: adamw\n" in stored.read_text()


def test_a_run_older_than_a_key_of_a_section_has_its_default(make: MakeRecipe) -> None:
    first = make(diloco=DiLoCoRecipe("http://here"), data=DataRecipe(train="a.txt"))
    with open_run(first) as run:
        add_checkpoint(run, 5)
    stored = run.path / "recipe.yaml"
    stored.write_text(stored.read_text().replace("  method: diloco\n", "").replace("  pairs: []\n", ""))
    assert "method" not in stored.read_text() and "pairs" not in stored.read_text()
    with open_run(first):
        assert stored.read_text() == first.to_yaml()
    changed = make(diloco=DiLoCoRecipe("http://here", method="local_sgd"))
    with pytest.raises(AndromedaError, match=r"this run has diloco\.method='diloco', and"), open_run(changed):
        pass


def test_length_and_cadence_may_change(make: MakeRecipe) -> None:
    with open_run(make()) as run:
        add_checkpoint(run, 5)
    longer = make(steps=60, batch_size=3, accumulate=5, log_every=1, save_every=2, validate_every=3, keep_last=4)
    with open_run(longer):
        assert (run.path / "recipe.yaml").read_text() == longer.to_yaml()
    moved = run.path.rename(run.path.with_name("moved"))
    with open_run(make(output=str(moved))) as run:
        assert len(run.checkpoints()) == 1


def test_before_the_first_checkpoint_the_recipe_may_change(make: MakeRecipe) -> None:
    with open_run(make()):
        pass
    with open_run(make(seed=3)) as run:
        assert "seed: 3" in (run.path / "recipe.yaml").read_text()


def test_other_files_are_left_alone(make: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("important")
    with pytest.raises(AndromedaError, match=r"run: holds files of something else"), open_run(make()):
        pass
    assert snapshot(tmp_path / "run") == {"thesis.txt": b"important"}
    (tmp_path / "file").write_text("important")
    with pytest.raises(AndromedaError, match=r"file: is a file"), open_run(make(output=str(tmp_path / "file"))):
        pass
    with pytest.raises(AndromedaError, match=r"run: cannot be made"), open_run(make(output=str(tmp_path / "file/run"))):
        pass


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", b"\xff"])
def test_a_damaged_recipe(make: MakeRecipe, content: str | bytes) -> None:
    with open_run(make()) as run:
        add_checkpoint(run, 5)
    (run.path / "recipe.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(AndromedaError, match=r"recipe\.yaml: .* recipe; choose another output"), open_run(make()):
        pass


def test_one_process_at_a_time(make: MakeRecipe) -> None:
    script = (
        "import sys\n"
        "from andromeda.training.recipe import DataRecipe, Recipe\n"
        "from andromeda.training.run import open_run\n"
        "with open_run(Recipe(data=DataRecipe(train='a.txt'), model={'preset': 'nano'}, output=sys.argv[1])):\n"
        "    print('open', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, make().output], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(AndromedaError, match="another process trains in it"), open_run(make()):
            pass
        other.kill()
        other.wait()
        with open_run(make()) as run:
            assert run.path.is_dir()


def test_a_file_system_without_locks(make: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with open_run(make()) as run:
        assert run.path.is_dir()


def test_the_newest_whole_checkpoint_counts(make: MakeRecipe) -> None:
    warnings: list[str] = []
    with open_run(make()) as run:
        assert run.load_newest(load, warnings.append) is None
        for step, content in ((5, "whole"), (10, "whole"), (100, "cut short"), (123456789, "torn")):
            add_checkpoint(run, step, content)
        (run.path / "checkpoints" / "step-5").mkdir()
        assert run.load_newest(load, warnings.append) == "step-00000010"
        assert len(warnings) == 2
        assert "step-123456789: is torn; set aside as step-123456789.1.damaged" in warnings[0]
        assert "step-00000100: is cut short" in warnings[1] and "going on from step-00000010" in warnings[1]
        assert [path.name for path in run.checkpoints()] == ["step-00000010", "step-00000005"]
        assert (run.path / "checkpoints" / "step-00000100.1.damaged" / "content").read_text() == "cut short"
        add_checkpoint(run, 100, "cut short")
        assert run.load_newest(load, warnings.append) == "step-00000010"
        assert "step-00000100.2.damaged" in warnings[2]


def test_the_best_is_that_of_the_pairs_that_are_held_out(make: MakeRecipe) -> None:
    with open_run(make()) as run:
        assert run.best() is None
        lines = [{"step": 5 * n, "validation_bits_per_byte": 2 + n / 10} for n in (1, 2, 3)]
        for line in lines:
            add_checkpoint(run, int(line["step"]))
        run.metrics.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        assert run.best() == run.checkpoint(5)
        for line, loss in zip(lines, (0.6, 0.5, 0.7), strict=True):
            line["validation_loss"] = loss
        run.metrics.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        assert run.best() == run.checkpoint(10)


def test_if_none_is_whole_nothing_is_touched(make: MakeRecipe) -> None:
    with open_run(make()) as run:
        add_checkpoint(run, 5, "torn")
        add_checkpoint(run, 10, "torn")
        before = snapshot(run.path)
        with pytest.raises(AndromedaError, match=r"no checkpoint is whole \(.*step-00000010: is torn\)"):
            run.load_newest(load, warn=lambda _: None)
        assert snapshot(run.path) == before


def test_only_the_last_are_kept_and_leftovers_go(make: MakeRecipe) -> None:
    with open_run(make()) as run:
        for step in (5, 10, 15, 20):
            add_checkpoint(run, step)
        run.keep(2)
        assert [path.name for path in run.checkpoints()] == ["step-00000020", "step-00000015"]
        for name in (".step-00000010.removed", ".step-00000025.tmp-1-abcdef12-00112233", "mine"):
            (run.path / "checkpoints" / name).mkdir()
        (run.path / ".metrics.jsonl.tmp-7").touch()
    with open_run(make()) as run:
        assert sorted(path.name for path in run.path.iterdir()) == ["checkpoints", "recipe.yaml"]
        names = sorted(path.name for path in (run.path / "checkpoints").iterdir())
        assert names == ["mine", "step-00000015", "step-00000020"]
