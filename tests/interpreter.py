"""Triton's interpreter without work of which it keeps no result: kernels take a third of the time.

To the same bits: see test_interpreter.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest


@contextmanager
def quick_interpreter() -> Iterator[None]:
    """Changes Triton 3.7's interpreter; in another release, what may differ there is left alone.

    Sums and products of integers: each is done again in 64 bits to assert that it fits, and the assertion, which
    is for debugging, is then not made. The options say to leave that out.

    Calls of device functions: see `_once_a_launch`. What follows from a type or a shape alone, and is found out again
    for every value, is remembered.
    """
    import triton
    from triton.language import core
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch:
        options = interpreter.InterpreterOptions(sanitize_overflow=False)
        assert not options.debug
        patch.setattr(interpreter.interpreter_builder, "options", options)
        if hasattr(interpreter, "_LangPatchScope"):
            patch.setattr(interpreter, "_patch_lang", _once_a_launch(interpreter._patch_lang))
        if hasattr(interpreter, "_get_np_dtype"):
            patch.setattr(interpreter, "_get_np_dtype", _of_scalars(interpreter._get_np_dtype))
        if triton.__version__.startswith("3.7."):
            patch.setattr(core.block_type, "__init__", _block_of_known_shape(core.block_type))
            patch.setattr(core.tensor, "__init__", _tensor_of_known_shape)
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


def _of_scalars(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """NumPy's name of a type: that of its scalars."""
    known = cache(convert)
    return lambda kind: convert(kind) if kind.scalar.is_ptr() else known(kind.scalar)


def _block_of_known_shape(block_type: Any) -> Callable[[Any, Any, Any], None]:
    original = block_type.__init__

    @cache
    def checked(shape: tuple[int, ...]) -> tuple[tuple[int, ...], int, str]:
        block = block_type.__new__(block_type)
        original(block, None, list(shape))
        return block.shape, block.numel, str(block.shape)

    def begin(block: Any, element_ty: Any, shape: Any) -> None:
        block.shape, block.numel, text = checked(tuple(getattr(size, "value", size) for size in shape))
        block.element_ty, block.name = element_ty, f"<{text}, {element_ty}>"

    return begin


def _tensor_of_known_shape(tensor: Any, handle: Any, kind: Any) -> None:
    tensor.handle, tensor.type, tensor.dtype = handle, kind, kind.scalar
    tensor.shape, tensor.numel = _constants(tuple(kind.shape) if kind.is_block() else ())


@cache
def _constants(shape: tuple[int, ...]) -> tuple[Any, Any]:
    from triton.language import core

    return core.tuple([core.constexpr(size) for size in shape]), core.constexpr(math.prod(shape))
