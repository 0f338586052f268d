"""Triton's interpreter without work of which it keeps no result: kernels take a third of the time, to the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest


@contextmanager
def quick_interpreter() -> Iterator[None]:
    """Changes Triton 3.7's interpreter; where another release has not what is changed, that is left alone.

    Sums and products of integers: each is done again in 64 bits to assert that it fits, and the assertion, which
    is for debugging, is then not made. The options say to leave that out.

    Calls of device functions: see `_once_a_launch`.
    """
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch:
        options = interpreter.InterpreterOptions(sanitize_overflow=False)
        assert not options.debug
        patch.setattr(interpreter.interpreter_builder, "options", options)
        if hasattr(interpreter, "_LangPatchScope"):
            patch.setattr(interpreter, "_patch_lang", _once_a_launch(interpreter._patch_lang))
        yield


def _once_a_launch(prepare: Callable[[FunctionType], Any]) -> Callable[[FunctionType], Any]:
    """`prepare`, but for a function of which all that it sees of the language is prepared since the launch.

    The interpreter puts its own functions into `triton.language` when a kernel is launched, and takes them out at the
    end. It also puts them in, where they are already, in each call of a device function, and searching the language
    for what to replace takes longer than most of these functions.
    """
    prepared: set[str] = set()

    def prepare_the_rest(function: FunctionType) -> Any:
        seen, launched = _languages(function), not prepared
        if seen <= prepared:
            return SimpleNamespace(restore=lambda: None)
        prepared.update(seen)
        scope = prepare(function)
        if not launched:
            return scope

        def restore() -> None:
            prepared.clear()
            scope.restore()

        return SimpleNamespace(restore=restore)

    return prepare_the_rest


@cache
def _languages(function: FunctionType) -> frozenset[str]:
    """Names of the modules that the interpreter prepares for a function."""
    import triton.language as tl

    return frozenset(value.__name__ for value in function.__globals__.values() if value is tl or value is tl.core)
