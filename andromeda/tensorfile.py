"""Tensors in a safetensors file that carries its own checksum.

The format is the safetensors library's (https://github.com/huggingface/safetensors): eight bytes with the length of
the header, little-endian; the header, JSON; the bytes of the tensors, without gaps. It has no checksum. Ours stands in
the header's metadata as `sha256`: the SHA-256 of the whole file with these 64 digits read as zeros. Every other reader
of safetensors reads the file as it is.

The library checks the header; the bytes are written and read here, tensor by tensor, and not by its `save_file` and
`load_file`. So the checksum costs no second pass over the file, equal tensors give equal files (the library writes
metadata in random order), no tensor is held twice, and a loaded one is no view of a file that somebody may cut short.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from andromeda.errors import AndromedaError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = "__metadata__"  # the one entry of the header that is no tensor
NO_DIGEST = b"0" * 64
RESERVED = ("format", "sha256")  # in the metadata
REMEDY = "copy it again from where it is whole, or save it again"


class TensorSpec(NamedTuple):
    """What the header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Writes a safetensors file and returns its checksum. One tensor at a time is copied off its device.

    Tensors that share memory are written each for itself. Equal arguments give equal files, byte for byte.

    Args:
        path: the file, in a directory that exists.
        tensors: dense tensors of the types in DTYPES.
        metadata: texts to keep with them, under names other than `format` and `sha256`.

    Raises:
        AndromedaError: something that cannot be stored.
        OSError: the file cannot be written.
    """
    for name, tensor in tensors.items():
        _check_storable(name, tensor)
    # The library's order: larger elements first, so that every tensor is aligned to its elements.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header = _header(ordered, metadata or {})
    digest = hashlib.sha256(header)
    with Path(path).open("wb") as file:
        file.write(header)
        for _, tensor in ordered:
            data = _bytes(tensor.detach().cpu().contiguous())
            digest.update(data)
            file.write(data)
        file.seek(header.index(NO_DIGEST))
        file.write(digest.hexdigest().encode())
    return digest.hexdigest()


def load_tensors(path: str | Path, *, verify: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and the metadata that `save_tensors` was given.

    Args:
        path: the file.
        verify: recompute the checksum, at 1 to 2 GB/s; a file of another tool has none and is taken as it is.

    Raises:
        AndromedaError: no such file, or it is cut short, corrupt, or no safetensors.
    """
    file = TensorFile.open(path)
    return file.load(verify=verify), {key: text for key, text in file.metadata.items() if key not in RESERVED}


@dataclass(frozen=True)
class TensorFile:
    """The header of a safetensors file, and the way to its tensors."""

    path: Path
    specs: dict[str, TensorSpec]  # in the order of the file
    metadata: dict[str, str]
    head: bytes  # length and header, as in the file

    @classmethod
    def open(cls, path: str | Path) -> TensorFile:
        """Reads and checks the header.

        Raises:
            AndromedaError: no such file, or it is cut short, corrupt, or no safetensors.
        """
        path = Path(path)
        with _reading(path):
            with safe_open(path, framework="pt"):  # the header is well-formed, the file exactly as long as it says
                pass
            with path.open("rb") as file:
                length = file.read(8)
                head = length + file.read(int.from_bytes(length, "little"))
        entries: dict[str, Any] = json.loads(head[8:])
        metadata = entries.pop(METADATA, None) or {}
        in_order = sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
        return cls(path, {name: _spec(path, name, entry) for name, entry in in_order}, metadata, head)

    @property
    def digest(self) -> str | None:
        """The checksum that the file carries."""
        return self.metadata.get("sha256")

    def load(
        self, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, verify: bool = True
    ) -> dict[str, Tensor]:
        """The tensors on a device, those of floating point as `dtype` (None: as stored).

        Raises:
            AndromedaError: the file is cut short or cannot be read, or its checksum is wrong.
        """
        expected = self.digest if verify else None
        digest = hashlib.sha256(self.head.replace(expected.encode(), NO_DIGEST, 1)) if expected else None
        tensors: dict[str, Tensor] = {}
        with _reading(self.path), self.path.open("rb") as file:
            file.seek(len(self.head))
            for name, spec in self.specs.items():
                tensor = torch.empty(spec.shape, dtype=spec.dtype)
                data = _bytes(tensor)
                if file.readinto(data) != len(data):
                    raise AndromedaError(f"{self.path}: cut short in tensor {name!r}; {REMEDY}")
                if digest:
                    digest.update(data)
                tensors[name] = tensor.to(device=device, dtype=dtype if spec.dtype.is_floating_point else None)
        if digest and digest.hexdigest() != expected:
            raise AndromedaError(f"{self.path}: corrupt, its bytes do not give the checksum it carries; {REMEDY}")
        return tensors


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise AndromedaError(f"{path}: no such file; {REMEDY}") from error
    except SafetensorError as error:
        raise AndromedaError(f"{path}: cut short, corrupt, or no safetensors ({error}); {REMEDY}") from error
    except OSError as error:
        raise AndromedaError(f"{path}: cannot be read: {error}") from error


def _spec(path: Path, name: str, entry: Mapping[str, Any]) -> TensorSpec:
    if entry["dtype"] not in DTYPES:
        raise AndromedaError(f"{path}: tensor {name!r} is {entry['dtype']}; it must be one of {', '.join(DTYPES)}")
    return TensorSpec(DTYPES[entry["dtype"]], tuple(entry["shape"]))


def _check_storable(name: str, tensor: object) -> None:
    if name == METADATA or not isinstance(tensor, Tensor):
        raise AndromedaError(
            f"cannot store {name!r}, a {type(tensor).__name__}; only tensors, under other names than {METADATA}"
        )
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.dtype not in DTYPE_NAMES:
        kind = "a tensor without data" if tensor.is_meta else f"{tensor.layout} of {tensor.dtype}"
        raise AndromedaError(f"cannot store {name!r}, {kind}; only dense tensors of {', '.join(DTYPES)} can be stored")


def _header(ordered: list[tuple[str, Tensor]], metadata: Mapping[str, str]) -> bytes:
    for key in RESERVED:
        if key in metadata:
            raise AndromedaError(f"cannot store the metadata {key!r}, the file's own; choose another name")
    # `sha256` comes before all that the caller names: its digits are the first 64 zeros.
    first = {"format": "pt", "sha256": NO_DIGEST.decode()}  # transformers reads no file without this `format`
    entries: dict[str, Any] = {METADATA: first | dict(sorted(metadata.items()))}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin aligned
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
