"""One command: `andromeda VERB`. Each verb is a typed function of `andromeda.commands`, whose docstring is its help.

`bench` and `data` are groups of such functions, each with flags of its own: `andromeda bench SUBJECT`.

The flags come from the signature, by argparse: it says in one line what is wrong with one, takes --max-new-tokens and
`--stop A --stop B`, and starts at once.

Exit codes: 0; 2 for what the user can put right, told in one line on stderr; 130 for Ctrl-C. A bug shows its traceback.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from andromeda import __version__
from andromeda.commands import bench, data
from andromeda.commands.chat import chat
from andromeda.commands.evaluate import evaluate
from andromeda.commands.generate import generate
from andromeda.commands.info import info
from andromeda.commands.serve import serve
from andromeda.commands.train import train
from andromeda.errors import AndromedaError

Verb = Callable[..., None]


@dataclass(frozen=True)
class Group:
    """A verb that is followed by what it is about."""

    description: str
    metavar: str
    verbs: Mapping[str, Verb]


BENCH = Group("Measures speed and memory beside ceilings and peers.", "SUBJECT", bench.SUBJECTS)
DATA = Group("Builds what training reads from text, and shows what a build holds.", "VERB", data.SUBJECTS)
VERBS: dict[str, Verb | Group] = {
    "data": DATA, "train": train, "generate": generate, "chat": chat, "serve": serve, "info": info, "eval": evaluate,
    "bench": BENCH,
}  # fmt: skip

CHOSEN = "verb and its parser"  # no parameter has such a name
METAVARS: dict[Any, str] = {int: "N", float: "X", list[int]: "N,N"}
USER_ERROR, INTERRUPTED, CLOSED_PIPE = 2, 130, 141  # the last two as a shell gives them: 128 + signal


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code.

    Args:
        arguments: those of the command line; None: sys.argv's.
    """
    try:
        run_verb(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except AndromedaError as error:
        return _fail(str(error))
    except BrokenPipeError:  # `| head`: who reads has had enough
        return _close_stdout()
    except SystemExit as error:  # rich makes one of the same
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        return _close_stdout()
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _fail(message: str) -> int:
    print("andromeda: error:", " ".join(message.splitlines()), file=sys.stderr)
    return USER_ERROR


def _close_stdout() -> int:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
    return CLOSED_PIPE


def run_verb(arguments: Sequence[str]) -> None:
    """Parses the command line and calls its verb.

    Raises:
        AndromedaError: a command line that does not parse, or whatever the verb raises.
    """
    parser = _Parser(prog="andromeda", description="A long-context language model and its stack.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    _add_verbs(parser, "VERB", VERBS)
    try:
        values, unknown = parser.parse_known_args(_hyphenated(arguments))
    except SystemExit:  # --help and --version
        return
    verb, its_parser = values.__dict__.pop(CHOSEN)
    if unknown:
        its_parser.error(f"unknown argument {unknown[0]!r}")
    verb(**vars(values))


class _Parser(argparse.ArgumentParser):
    """Raises what the user can put right, and expands no abbreviations: they change as flags are added."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise AndromedaError(f"{message} (see {self.prog} --help)")


def _hyphenated(arguments: Sequence[str]) -> list[str]:
    """--max_new_tokens means --max-new-tokens."""
    return [re.sub(r"^--\w[^=]*", lambda flag: flag[0].replace("_", "-"), argument) for argument in arguments]


# ---- from a typed function to its flags ----------------------------------------------------------


def _add_verbs(parser: _Parser, metavar: str, verbs: Mapping[str, Verb | Group]) -> None:
    parsers = parser.add_subparsers(metavar=metavar, required=True, parser_class=_Parser)
    for name, verb in verbs.items():
        description, described = (verb.description, {}) if isinstance(verb, Group) else _read_docstring(verb)
        summary = description.split("\n\n")[0]
        its_parser = parsers.add_parser(name, help=_lower_first(summary).rstrip("."), description=description)
        if isinstance(verb, Group):
            _add_verbs(its_parser, verb.metavar, verb.verbs)
        else:
            _add_verb(its_parser, verb, described)


def _add_verb(parser: _Parser, verb: Verb, described: dict[str, str]) -> None:
    parser.set_defaults(**{CHOSEN: (verb, parser)})
    hints = get_type_hints(verb)
    for parameter in inspect.signature(verb).parameters.values():
        _add_parameter(parser, parameter, hints[parameter.name], described.get(parameter.name, ""))


def _add_parameter(parser: _Parser, parameter: inspect.Parameter, hint: Any, description: str) -> None:
    """A parameter without a default is positional, and a list of them takes the rest; the others are flags.

    Keyword-only parameters are always flags, and obligatory without a default.
    """
    kind, default = _unwrapped(hint), parameter.default
    is_list, required = get_origin(kind) is list, default is parameter.empty
    settings: dict[str, Any] = {"help": description.replace("%", "%%")}
    if required and parameter.kind is not parameter.KEYWORD_ONLY:
        if is_list:
            settings |= {"type": get_args(kind)[0], "nargs": "*", "default": []}
        else:
            settings |= {"type": _converter(kind)}
        parser.add_argument(parameter.name, metavar=parameter.name.upper(), **settings)
        return
    if not required:
        settings["default"] = default
        settings["help"] += "" if default in (None, "") or kind is bool else f" (default: {default})"
    flag = "--" + parameter.name.replace("_", "-")
    if kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction if default else "store_true", **settings)
    elif is_list and get_args(kind) == (str,):  # --stop A --stop B
        parser.add_argument(flag, action="append", required=required, **settings)
    else:
        choices = list(get_args(kind)) if get_origin(kind) is Literal else None
        metavar = METAVARS.get(kind)
        parser.add_argument(
            flag, type=_converter(kind), choices=choices, metavar=metavar, required=required, **settings
        )  # fmt: skip


def _unwrapped(hint: Any) -> Any:
    """X of X | None."""
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = [choice for choice in get_args(hint) if choice is not type(None)]
    return hint


def _converter(kind: Any) -> Callable[[str], Any]:
    if get_origin(kind) is list:
        return _comma_separated(get_args(kind)[0])
    return str if get_origin(kind) is Literal else kind


def _comma_separated(item: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def convert(text: str) -> list[Any]:
        try:
            return [item(part) for part in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} must be numbers with commas between, as in 512,2048") from error

    return convert


def _read_docstring(function: Callable[..., object]) -> tuple[str, dict[str, str]]:
    """The text above the sections, and what `Args:` says of each parameter."""
    text, *sections = re.split(r"\n\n(?=[A-Z]\w+:\n)", inspect.getdoc(function) or "")
    described: dict[str, str] = {}
    for section in sections:
        if section.startswith("Args:"):
            for entry in re.split(r"\n {4}(?=\S)", section)[1:]:
                names, _, description = entry.partition(":")
                described |= dict.fromkeys(re.split(r",\s*", names), " ".join(description.split()))
    return text, described


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
