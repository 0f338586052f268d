"""The README's own commands: each is run, in the order of the page, or checked to name what is there.

A command that this file does not know how to treat is a failure, so that none is left out unseen. The quick suite runs
what it can in forks, which have nothing to import; the slow one runs all as a user does.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from andromeda.cli import VERBS, main
from tests.commands.launcher import Launcher
from tests.forks import forks

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
SHELL = ("sh", "bash", "console", "shell")
NOT_COPIED = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__", "tests")

# What is appended to a command that would take minutes. Beginnings of commands; the longest that fits counts.
QUICKER = {
    "andromeda bench": "--help",
    "andromeda train": "steps=2 save_every=2",
    "andromeda generate": "--max-new-tokens=4",
    "andromeda chat": "--max-new-tokens=4",
    "andromeda serve": "--help",
    "python benchmarks/": "--help",
    "torchrun": "steps=2 save_every=2",
}
# What is not run: the set-up of a machine, and the tests themselves.
NOT_RUN = ("git clone ", "cd ", "python3 -m venv ", "python -m venv ", "source ", "pip install ", "make ")


@dataclass(frozen=True)
class Step:
    """A command line of a shell block, or a whole block of Python."""

    line: int  # in the README
    kind: str  # shell or python
    text: str


def steps_of(markdown: str) -> list[Step]:
    """What the fenced blocks ask to be run. In a `console` block that is what follows the prompt `$ `."""
    steps: list[Step] = []
    for block in re.finditer(r"^```(\w+)[^\n]*\n(.*?)^```$", markdown, re.MULTILINE | re.DOTALL):
        language, body = block.groups()
        first = markdown.count("\n", 0, block.start(2)) + 1
        if language == "python":
            steps.append(Step(first, "python", body))
        elif language in SHELL:
            steps += shell_steps(body, first, prompted=language == "console")
    return steps


def shell_steps(body: str, first: int, prompted: bool) -> list[Step]:
    steps = []
    lines = enumerate(body.splitlines(), start=first)
    for number, line in lines:
        if prompted and not line.startswith("$ "):
            continue  # what the command printed
        command = line.removeprefix("$ ") if prompted else line
        while command.endswith("\\"):
            command = command[:-1] + next(lines)[1].strip()
        command = re.sub(r"(^|\s)#.*", "", command).strip()
        if command:
            steps.append(Step(number, "shell", command))
    return steps


def quicker(command: str) -> str:
    """The command with what makes it short, before any pipe or redirection."""
    fitting = [beginning for beginning in QUICKER if command.startswith(beginning)]
    if not fitting:
        return command
    call, rest = re.fullmatch(r"(.*?)(\s[|>].*)?", command).groups("")  # type: ignore[union-attr]
    return f"{call} {QUICKER[max(fitting, key=len)]}{rest}"


@pytest.fixture(scope="module")
def readme() -> list[Step]:
    return steps_of(README.read_text(encoding="utf-8"))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What a user has after cloning, but for a shorter corpus; with a `python` and an `andromeda` that are these."""
    folder = tmp_path / "andromeda"
    shutil.copytree(ROOT, folder, ignore=NOT_COPIED)
    shorten(folder / "examples" / "verse" / "train.jsonl", 60_000)
    shorten(folder / "examples" / "verse" / "validation.txt", 15_000)
    programs = {"python": "", "andromeda": "-m andromeda", "torchrun": "-m torch.distributed.run"}
    for name, arguments in programs.items():
        program = folder.parent / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {arguments} "$@"\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return folder


def shorten(path: Path, characters: int) -> None:
    """Keeps the first lines, one at least."""
    first, *lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [first]
    size = len(first)
    for line in lines:
        size += len(line)
        if size <= characters:
            kept.append(line)
    path.write_text("".join(kept), encoding="utf-8")


def run(step: Step, folder: Path) -> None:
    environment = os.environ | {
        "PATH": f"{folder.parent / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
        "COLUMNS": "100",
    }
    arguments = [sys.executable, "-c", step.text] if step.kind == "python" else ["sh", "-ec", quicker(step.text)]
    result = subprocess.run(
        arguments, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    said = f"README.md, line {step.line}: {step.text}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    assert result.returncode == 0, said


def run_forked(step: Step, folder: Path) -> None:
    """In forks, which have nothing to import, by the package that this file imports; other programs as `run` does.

    What torchrun would start are forks as well.
    """
    words = shlex.split(quicker(step.text)) if step.kind == "shell" else []
    if words and (words[0] not in ("andromeda", "torchrun") or {"|", ">"} & set(words)):
        run(step, folder)
        return
    if words[:1] == ["torchrun"]:
        launcher = Launcher(folder, int(words[words.index("--nproc-per-node") + 1]))
        environments = [launcher.environment(rank) for rank in range(launcher.ranks)]
        words = words[words.index("-m") + 1 :]
    else:
        environments = [{}]
    log = folder.parent / f"line-{step.line}.log"
    call = step.text if step.kind == "python" else words[1:]
    processes = [forks().Process(target=_forked, args=(call, folder, log, each)) for each in environments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    codes = {process.exitcode for process in processes}
    for process in processes:
        process.kill()
    assert codes == {0}, f"README.md, line {step.line}: {step.text}\n{log.read_text()[-3000:]}"


def _forked(call: str | list[str], folder: Path, log: Path, environment: dict[str, str]) -> None:
    for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)):
        os.dup2(os.open(path, flags), number)
    os.dup2(1, 2)
    os.chdir(folder)
    os.environ |= {"COLUMNS": "100", **environment}
    torch.set_num_threads(1)  # others run beside it
    if isinstance(call, list):
        sys.exit(main(call))
    script = folder.parent / "block.py"
    script.write_text(call)
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("how", [run_forked, pytest.param(run, marks=pytest.mark.slow)])
def test_every_command_of_the_readme_runs(readme: list[Step], copy: Path, how: Callable[[Step, Path], None]) -> None:
    for step in readme:
        if step.kind == "shell" and step.text.startswith(NOT_RUN):
            continue
        if step.kind == "shell":
            assert step.text.startswith(("andromeda ", "python ", "torchrun ")), (
                f"README.md, line {step.line}: this test does not know {step.text!r}; add it to QUICKER or NOT_RUN"
            )
        how(step, copy)


def test_every_make_target_of_the_readme_is_there(readme: list[Step]) -> None:
    targets = {word for step in readme if step.text.startswith("make ") for word in shlex.split(step.text)[1:]}
    targets = {target for target in targets if "=" not in target and not target.startswith("-")}
    assert {"demo", "test"} <= targets
    phony = re.search(r"^\.PHONY:(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    assert targets <= set(phony[1].split())


def test_the_readme_shows_every_verb(readme: list[Step]) -> None:
    shown = {step.text.split()[1] for step in readme if step.text.startswith("andromeda ")}
    assert set(VERBS) <= shown


def test_the_files_that_the_readme_links_to_are_there() -> None:
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", README.read_text(encoding="utf-8"))
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing


# ---- the reading of blocks -----------------------------------------------------------------------

PAGE = """\
# Title

```sh
make demo   # five minutes
# a comment by itself
andromeda train recipes/verse.yaml \\
    steps=3

echo "a#b"
```

```console
$ andromeda info nano
model   nano
$ andromeda eval runs/verse --text a.txt | head -1
1.5
```

```python
print(1)
print(2)
```

```text
rm -rf nothing
```

    indented
"""


def test_blocks_are_read_as_a_person_reads_them() -> None:
    assert steps_of(PAGE) == [
        Step(4, "shell", "make demo"),
        Step(6, "shell", "andromeda train recipes/verse.yaml steps=3"),
        Step(9, "shell", 'echo "a#b"'),
        Step(13, "shell", "andromeda info nano"),
        Step(15, "shell", "andromeda eval runs/verse --text a.txt | head -1"),
        Step(20, "python", "print(1)\nprint(2)\n"),
    ]


def test_long_commands_are_cut_short() -> None:
    assert quicker("andromeda train recipes/verse.yaml").startswith("andromeda train recipes/verse.yaml steps=2 ")
    assert quicker("andromeda generate a --prompt b | head -1").endswith("b --max-new-tokens=4 | head -1")
    assert quicker("andromeda info nano") == "andromeda info nano"


def test_a_command_that_fails_is_named_with_its_line(copy: Path) -> None:
    run(Step(1, "shell", "andromeda --version"), copy)
    with pytest.raises(AssertionError, match=r"line 7: andromeda nonsense"):
        run(Step(7, "shell", "andromeda nonsense"), copy)
