"""The command line: flags from functions, and one clear line with exit code 2 for whatever the user can put right."""

from __future__ import annotations

import inspect
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import andromeda
from andromeda import cli
from andromeda.checkpoint import save_checkpoint
from andromeda.cli import main
from andromeda.config import AndromedaConfig
from andromeda.errors import AndromedaError
from andromeda.model import Andromeda
from andromeda.tokenizer import Tokenizer

VERSE = "Tyger Tyger, burning bright, in the forests of the night;\n" * 40
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model, a recipe, and a text."""
    folder = tmp_path_factory.mktemp("saved")
    tokenizer = Tokenizer.train([VERSE], 290)
    torch.manual_seed(0)
    config = AndromedaConfig(
        num_tokens=320, max_seq_len=16, dim=16, depth=1, dim_head=8, heads=2, alibi_num_heads=1
    )  # fmt: skip
    save_checkpoint(folder / "model", Andromeda(config), files=tokenizer.save)
    (folder / "text.txt").write_text(VERSE)
    (folder / "recipe.yaml").write_text(
        "model: {preset: nano, dim: 16, depth: 1, dim_head: 8, heads: 2, alibi_num_heads: 1, max_seq_len: 16}\n"
        "data: {train: text.txt}\n"
        "tokenizer: {vocab_size: 290}\n"
        "steps: 2\n"
    )
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to spoil, as the current directory."""
    shutil.copytree(saved, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs a function as a verb; returns what it was called with."""

    def run(function: Callable[..., None], *arguments: str) -> dict[str, Any]:
        called: list[dict[str, Any]] = []

        def verb(**values: Any) -> None:
            called.append(values)

        verb.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        verb.__doc__, verb.__annotations__ = function.__doc__, function.__annotations__
        monkeypatch.setattr(cli, "VERBS", {"go": verb})
        cli.run_verb(["go", *arguments])
        return called[0]

    return run


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- from a function to its flags ----------------------------------------------------------------


def everything(
    place: str,
    rest: list[str],
    *,
    needed: int,
    max_new_tokens: int = 256,
    rate: float | None = None,
    stop: list[str] | None = None,
    lengths: list[int] | None = None,
    precision: Literal["float32", "bfloat16"] = "float32",
    quiet: bool = False,
    cache: bool = True,
) -> None:
    """Does something.

    And more than 100% of it.

    Args:
        place: where,
            on two lines.
        rest: what: else.
        max_new_tokens, rate: shared.

    Raises:
        AndromedaError: never.
    """


def test_defaults(parsed: Callable[..., dict[str, Any]]) -> None:
    assert parsed(everything, "here", "--needed=3") == {
        "place": "here", "rest": [], "needed": 3, "max_new_tokens": 256, "rate": None, "stop": None, "lengths": None,
        "precision": "float32", "quiet": False, "cache": True,
    }  # fmt: skip


def test_every_kind_of_flag(parsed: Callable[..., dict[str, Any]]) -> None:
    line = (
        "here a=1 b_c=--d --needed -3 --max-new-tokens 7 --rate 1e-3 --stop x_y --stop --lengths 512,2048 "
        "--precision bfloat16 --quiet --no-cache"
    )
    arguments = ["\n" if word == "--stop" and following == "--lengths" else word
                 for word, following in zip(line.split(), [*line.split()[1:], ""], strict=True)]  # fmt: skip
    arguments.insert(arguments.index("\n"), "--stop")
    assert parsed(everything, *arguments) == {
        "place": "here", "rest": ["a=1", "b_c=--d"], "needed": -3, "max_new_tokens": 7, "rate": 1e-3,
        "stop": ["x_y", "\n"], "lengths": [512, 2048], "precision": "bfloat16", "quiet": True, "cache": False,
    }  # fmt: skip


@pytest.mark.parametrize("flag", ["--max-new-tokens", "--max_new_tokens"])
def test_underscores_mean_hyphens_in_names_alone(parsed: Callable[..., dict[str, Any]], flag: str) -> None:
    values = parsed(everything, "a_b", "--needed=1", f"{flag}=5", "--stop=--end_of_text", "--stop", "c_d")
    assert (values["place"], values["max_new_tokens"], values["stop"]) == ("a_b", 5, ["--end_of_text", "c_d"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: PLACE, --needed"),
        (("x", "--needed=1.5"), "argument --needed: invalid int value: '1.5'"),
        (("x", "--needed=1", "--rate=fast"), "argument --rate: invalid float value: 'fast'"),
        (("x", "--needed=1", "--lengths=1,b"), "argument --lengths: '1,b' must be numbers with commas between"),
        (("x", "--needed=1", "--precision=int8"), "argument --precision: invalid choice: 'int8'"),
        (("x", "--needed=1", "--max-new=3"), "unknown argument '--max-new=3'"),
        (("x", "--needed=1", "--rate"), "argument --rate: expected one argument"),
    ],
)
def test_a_wrong_flag_is_named(parsed: Callable[..., Any], arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(AndromedaError) as error:
        parsed(everything, *arguments)
    assert str(error.value).startswith(message)
    assert "see andromeda go --help" in str(error.value)


def test_help_is_the_docstring(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "VERBS", {"go": everything})
    assert main(["go", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Does something. And more than 100% of it." in text
    assert "PLACE where, on two lines." in text
    assert "[REST ...] what: else." in text or "REST what: else." in text
    assert "--max-new-tokens N shared. (default: 256)" in text
    assert "--rate X shared." in text
    assert "never" not in text
    assert main(["--help"]) == 0
    assert "go does something" in " ".join(capsys.readouterr().out.split())


def functions(verbs: Mapping[str, Any] = cli.VERBS) -> dict[str, Callable[..., None]]:
    """By what is written to call them."""
    found: dict[str, Callable[..., None]] = {}
    for name, verb in verbs.items():
        if isinstance(verb, cli.Group):
            found |= {f"{name} {inner}": function for inner, function in functions(verb.verbs).items()}
        else:
            found[name] = verb
    return found


@pytest.mark.parametrize(("call", "function"), functions().items(), ids=functions())
def test_every_verb_describes_each_of_its_parameters(
    call: str, function: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(cli._read_docstring(function)[1]) == set(inspect.signature(function).parameters)
    assert main([*call.split(), "--help"]) == 0
    assert f"usage: andromeda {call}" in capsys.readouterr().out


def test_a_group_of_verbs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    called = []

    def here(*, times: int = 1) -> None:
        """Goes here.

        Args:
            times: how often.
        """
        called.append(times)

    monkeypatch.setattr(cli, "VERBS", {"go": cli.Group("Goes.", "PLACE", {"here": here})})
    assert main(["go", "here", "--times=3"]) == 0
    assert called == [3]
    assert main(["go", "--help"]) == 0
    assert "here goes here" in " ".join(capsys.readouterr().out.split())
    for line, message in (
        ("go", "the following arguments are required: PLACE (see andromeda go --help)"),
        ("go there", "argument PLACE: invalid choice: 'there' (choose from here) (see andromeda go --help)"),
        ("go here --time=3", "unknown argument '--time=3' (see andromeda go here --help)"),
    ):
        assert main(line.split()) == 2
        assert capsys.readouterr().err.replace("'here'", "here") == f"andromeda: error: {message}\n"
    assert called == [3]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"andromeda {andromeda.__version__}\n"


# ---- how a verb ends -----------------------------------------------------------------------------


def ends(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    def go() -> None:
        """Fails."""
        raise error

    monkeypatch.setattr(cli, "VERBS", {"go": go})
    return main(["go"])


def test_what_the_user_can_put_right_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ends(monkeypatch, AndromedaError("a.yaml: no key\n'dmi'")) == 2
    assert ends(monkeypatch, PermissionError(13, "Permission denied", "b.txt")) == 2
    assert capsys.readouterr() == (
        "",
        "andromeda: error: a.yaml: no key 'dmi'\nandromeda: error: b.txt: Permission denied\n",
    )


def test_ctrl_c_is_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert ends(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("bug", [ValueError("a bug"), OSError("no file's"), SystemExit(143)])
def test_bugs_and_other_exits_are_let_through(monkeypatch: pytest.MonkeyPatch, bug: BaseException) -> None:
    with pytest.raises(type(bug)):
        ends(monkeypatch, bug)


# ---- what a user may do wrong --------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


Spoil = Callable[[Path], object]
EVAL_BY_ITSELF = ["eval", "model", "--text", "text.txt", "--json", "out.json"]
EVAL = "eval model --text text.txt --lengths 16,64 --json out.json"
GENERATE = "generate model --prompt Tyger --max-new-tokens 3"

LARGE = Tokenizer.train([VERSE], 400, special_tokens=["<|endoftext|>", *(f"<{number}>" for number in range(80))])

MISTAKES: dict[str, tuple[str, Spoil | None, str]] = {
    "no verb": ("", None, "the following arguments are required: VERB"),
    "unknown verb": ("trian recipe.yaml", None, "argument VERB: invalid choice: 'trian'"),
    "unknown flag": ("generate model --promt x", None, "unknown argument '--promt'"),
    "unknown preset": ("info 3b", None, "3b: neither a preset"),
    "unknown recipe key": ("train recipe.yaml stpes=3", None, "did you mean 'steps'?"),
    "recipe key of the wrong type": ("train recipe.yaml steps=many", None, "steps"),
    "config that makes no sense": ("train recipe.yaml model.heads=0", None, "heads=0"),
    "missing recipe": ("train recipes.yaml", None, "recipes.yaml: no such file"),
    "missing corpus": ("train recipe.yaml", lambda at: (at / "text.txt").unlink(), "text.txt: no such file"),
    "empty corpus": ("train recipe.yaml", lambda at: (at / "text.txt").write_text(""), "text.txt: no text"),
    "corpus that is not UTF-8": (
        "train recipe.yaml", lambda at: (at / "text.txt").write_bytes(b"abc\xff"), "text.txt: not UTF-8",
    ),
    "missing model": ("generate modle --prompt x", None, "modle: no such directory"),
    "missing weights": (GENERATE, lambda at: (at / "model/model.safetensors").unlink(), "model.safetensors: no such"),
    "weights cut short": (GENERATE, lambda at: truncate(at / "model/model.safetensors"), "model.safetensors: cut"),
    "corrupt weights": (EVAL, lambda at: flip(at / "model/model.safetensors"), "model.safetensors: corrupt"),
    "corrupt config": (EVAL, lambda at: truncate(at / "model/config.json"), "config.json: is not JSON"),
    "config of another model": (EVAL, lambda at: edit_config(at, dim=24), "but config.json makes it"),
    "unknown config key": (EVAL, lambda at: edit_config(at, dmi=24), "unknown key 'dmi'"),
    "missing tokenizer": (EVAL, lambda at: (at / "model/tokenizer.json").unlink(), "tokenizer.json: cannot be read"),
    "tokenizer of another model": (EVAL, lambda at: LARGE.save(at / "model"), "the tokenizer has"),
    "token id out of range": (GENERATE, lambda at: edit_config(at, num_tokens=280), "the model only num_tokens=280"),
    "missing text": ("eval model --text nothing.txt --json out.json", None, "--text nothing.txt: cannot be read"),
    "text that is a directory": ("eval model --text model", None, "--text model: cannot be read: Is a directory"),
    "empty text": (EVAL, lambda at: (at / "text.txt").write_text(""), "--text text.txt: is empty"),
    "text that is not UTF-8": (EVAL, lambda at: (at / "text.txt").write_bytes(b"a\xff"), "is not UTF-8 text (byte 1)"),
    "text too short": ("eval model --text text.txt --lengths 16,99999 --json out.json", None, "fewer than the length"),
    "length of nothing": ("eval model --text text.txt --lengths 0,16 --json out.json", None, "at least 1 token"),
    "figures over a text": ("eval model --text text.txt --json text.txt", None, "--json text.txt: holds something"),
    "no place for the figures": ("eval model --text text.txt --json no/out.json", None, "there is no directory"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_clear_line_and_changes_nothing(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line, spoil, message = MISTAKES[name]
    (folder / "out.json").write_text('"before"')
    if spoil is not None:
        spoil(folder)
    before = snapshot(folder)
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert err.startswith("andromeda: error: ")
    assert err.count("\n") == 1 and err.endswith("\n")
    assert message in err
    assert "Traceback" not in out + err
    assert {path: content for path, content in snapshot(folder).items() if path in before} == before


# ---- the verbs that belong here ------------------------------------------------------------------


def test_eval_prints_and_writes_bits_per_byte(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "out.json").write_text('"before"')
    assert main(EVAL.split()) == 0
    out, err = capsys.readouterr()
    figures = json.loads((folder / "out.json").read_text())
    assert err == ""
    assert [score["length"] for score in figures["lengths"]] == [16, 64]
    for score in figures["lengths"]:
        assert f"{score['bits_per_byte']:.4f}" in out
        assert 0 < score["bits_per_byte"] < 12
    assert figures["tokens"] == figures["text_tokens"] // 64 * 64
    assert sum(band["bytes"] for band in figures["positions"]) == figures["bytes"] <= len(VERSE)


def test_eval_chooses_lengths_by_the_trained_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def lengths(text: str) -> list[int]:
        (folder / "text.txt").write_text(text)
        assert main(EVAL_BY_ITSELF) == 0
        return [score["length"] for score in json.loads((folder / "out.json").read_text())["lengths"]]

    tokens = len(Tokenizer.load(folder / "model").encode(VERSE))
    assert tokens > 256
    assert lengths(VERSE) == [16, 64, 256]
    assert lengths(VERSE[: len(VERSE) * 100 // tokens]) == [16, 64]
    assert lengths(VERSE[: len(VERSE) * 20 // tokens]) == [16]
    capsys.readouterr()

    (folder / "text.txt").write_text("Tyger")
    assert main(EVAL_BY_ITSELF) == 2
    assert "fewer than the length 16" in capsys.readouterr().err


# ---- as a program --------------------------------------------------------------------------------


def run(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, **settings
    )  # fmt: skip


def test_help_is_quick_and_imports_no_torch() -> None:
    program = (
        "import sys, time; from andromeda.cli import main; code = main(['--help'])\n"
        "print('torch' in sys.modules, 'rich' in sys.modules, time.process_time(), code, file=sys.stderr)"
    )
    result = run("-c", program)
    torch_there, rich_there, seconds, code = result.stderr.split()
    assert (torch_there, rich_there, code) == ("False", "False", "0"), result.stderr
    assert float(seconds) < 0.5
    assert all(f"\n    {verb} " in result.stdout for verb in cli.VERBS)


def test_a_mistake_has_exit_code_2() -> None:
    result = run("-m", "andromeda", "generate", "nowhere", "--prompt", "x")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("andromeda: error: nowhere: ")


def test_a_bug_shows_its_traceback() -> None:
    program = (
        "import sys; from andromeda import cli\n"
        "def go() -> None:\n    'Fails.'\n    return 1 / 0\n"
        "cli.VERBS['go'] = go; sys.exit(cli.main(['go']))"
    )
    result = run("-c", program)
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "ZeroDivisionError" in result.stderr


@pytest.mark.parametrize("arguments", [["info", "nano"], ["info", "--help"]])
def test_a_closed_pipe_is_quiet(arguments: list[str]) -> None:
    program = (
        "import os, sys; from andromeda.cli import main; read, write = os.pipe(); os.close(read); os.dup2(write, 1)\n"
        f"sys.exit(main({arguments!r}))"
    )
    result = run("-c", program)
    assert result.stderr == ""
    assert result.returncode == cli.CLOSED_PIPE or "--help" in arguments  # argparse may see it first, and say nothing
