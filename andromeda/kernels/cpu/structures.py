"""The structures of kernels.h and blocks.cpp, made of tensors, which must outlive them."""

from __future__ import annotations

import ctypes
from typing import ClassVar

from torch import Tensor

P, N, F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class Rows(ctypes.Structure):
    _fields_: ClassVar = [
        ("count", N), ("tokens", N), ("firsts", P), ("counts", P), ("lengths", P), ("table", P), ("table_row", N),
    ]  # fmt: skip


class Pages(ctypes.Structure):
    _fields_: ClassVar = [("keys", P), ("values", P), ("page_size", N), ("page", N), ("token", N), ("head", N)]


class Turns(ctypes.Structure):
    _fields_: ClassVar = [("cos", P), ("sin", P)]


class Heads(ctypes.Structure):
    _fields_: ClassVar = [
        ("queries", N), ("keys", N), ("dim_head", N), ("rotated", N),
        ("of_keys", Turns), ("of_tiles", Turns), ("of_queries", Turns),
    ]  # fmt: skip


class Block(ctypes.Structure):
    _fields_: ClassVar = [
        ("way_in", P), ("way_out", P), ("factor", P), ("norm", P), ("shifts", P), ("slopes", P), ("windows", P),
        ("pages", Pages),
    ]  # fmt: skip


class Model(ctypes.Structure):
    _fields_: ClassVar = [
        ("depth", N), ("dim", N), ("inner", N), ("activation", N), ("amount", N), ("deepnorm", N), ("normalises", N),
        ("alpha", F), ("eps", F), ("heads", Heads), ("blocks", P),
    ]  # fmt: skip


class Step(ctypes.Structure):
    _fields_: ClassVar = [
        ("rows", Rows), ("positions", P), ("cells", P), ("q_scale", P), ("before", P), ("drafted", N),
        ("first_drafted", N), ("kept", P), ("x", P), ("threads", N),
    ]  # fmt: skip


def pages_of(keys: Tensor, values: Tensor) -> Pages:
    """Of (pages, page_size, kv_heads, D), alike and with channels side by side."""
    return Pages(keys.data_ptr(), values.data_ptr(), keys.shape[1], *keys.stride()[:3])
