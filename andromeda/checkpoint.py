"""A model as a directory that anybody may open: no pickle, no class paths, nothing that runs.

    config.json                        the parameter table, `model_type` and `format_version`
    model.safetensors                  the weights; or, beyond max_shard_bytes, in Hugging Face's form
    model-00001-of-0000N.safetensors     shards, and
    model.safetensors.index.json         which shard holds which tensor, and each shard's checksum
    ...                                what the caller adds: the tokenizer, the state of a training run

Saving is atomic (`andromeda.atomic`), weights carry checksums (`andromeda.tensorfile`). config.json carries none: it is
there to be read, and edited too (`position_interpolation`, say).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from andromeda.atomic import atomic_directory, latest
from andromeda.config import AndromedaConfig
from andromeda.errors import AndromedaError
from andromeda.model import Andromeda
from andromeda.tensorfile import REMEDY, TensorFile, TensorSpec, save_tensors

MODEL_TYPE = "andromeda"
FORMAT_VERSION = 1
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
RUN_CHECKPOINTS = "checkpoints"  # of a run directory, which training writes
RUN_CHECKPOINT = re.compile(r"step-(\d{8,})")

ABSURD = 10  # parameters named for each one stored; 2 at most where an embedding of its own stores few

T = TypeVar("T")


def save_checkpoint(
    directory: str | Path,
    model: Andromeda,
    *,
    weights: Mapping[str, Tensor] | None = None,
    files: Callable[[Path], object] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a model directory. A process killed at any moment leaves the old one or the new one, whole.

    A checkpoint that lies there is replaced as a whole: files of it that are not written again are gone. The weights
    are stored bit for bit, in the model's own types; the same model gives the same bytes.

    Args:
        directory: where; its parents are made where they are missing.
        model: on any device.
        weights: in place of the model's own, where those are spread over processes.
        files: writes what else belongs to it, such as a tokenizer's `save`; it is given the directory being written.
        max_shard_bytes: bytes of tensors a weights file may hold; one larger tensor has a file of its own.

    Raises:
        AndromedaError: the directory holds something other than a checkpoint, or cannot be written (what was there is
            then unchanged); a file named like one of the checkpoint's own; a state that is not all tensors.
    """
    if max_shard_bytes < 1:
        raise AndromedaError(f"max_shard_bytes={max_shard_bytes} must be at least 1")
    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped; the wrapper renames the parameters
    with atomic_directory(directory, replaceable=is_checkpoint) as folder:
        if files is not None:
            files(folder)
            _check_names(folder)
        _write_weights(folder, model.state_dict() if weights is None else weights, max_shard_bytes)
        values = {"model_type": MODEL_TYPE, "format_version": FORMAT_VERSION, **model.config.to_dict()}
        (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def load_checkpoint(
    directory: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    embedding_provider: nn.Module | None = None,
    verify: bool = True,
) -> Andromeda:
    """The model of a directory that `save_checkpoint` wrote. Memory at its peak is about one copy of the weights.

    Args:
        directory: the checkpoint; it may be replaced by a save meanwhile, and is then read again.
        device: where the model goes.
        dtype: of the floating-point weights; None: as stored.
        embedding_provider: a module in place of the one config.json names; its weights come from the checkpoint.
        verify: recompute the checksums of the weights, at 1 to 2 GB/s for each shard (shards in parallel). Shards of
            different saves are noticed either way.

    Raises:
        AndromedaError: no such directory, no checkpoint, a missing or corrupt file, a newer format, or weights that are
            not those of config.json; no such device.
    """
    _check_target(device, dtype)

    def read(folder: Path) -> Andromeda:
        config, shards = _read_config(folder), _open_shards(folder)
        _check_size(folder, config, shards)
        model = _build_without_weights(config, embedding_provider)
        _check_fit(folder, model.state_dict(), shards)
        with ThreadPoolExecutor() as pool:
            loaded = list(pool.map(lambda shard: shard.load(device=device, dtype=dtype, verify=verify), shards))
        _put_weights(model, {name: tensor for tensors in loaded for name, tensor in tensors.items()})
        _fill_buffers(model)
        return model.to(device)

    return _read_settled(directory, read)


def resolve(directory: str | Path) -> Path:
    """The model directory that a directory stands for: itself, or the newest checkpoint of a training run.

    Raises:
        AndromedaError: there is no such directory, or it is neither.
    """
    path = _existing(directory)
    if is_checkpoint(path) or not (path / RUN_CHECKPOINTS).is_dir():
        return path
    newest = next(filter(is_checkpoint, run_checkpoints(path)), None)
    if newest is None:
        raise AndromedaError(f"{path}: a training run that has saved no checkpoint yet; let it reach its first")
    return newest


def tokenizer_path(path: str | Path) -> Path:
    """Where the tokenizer lies that a path stands for: a tokenizer's own, a model's, or a training run's.

    Raises:
        AndromedaError: a training run that has saved no checkpoint yet.
    """
    path = Path(path)
    return resolve(path) if path.is_dir() and not (path / "tokenizer.json").exists() else path


def run_checkpoints(run: Path) -> list[Path]:
    """Where the checkpoints of a training run lie, the newest first, whole or not."""
    folder = run / RUN_CHECKPOINTS
    if not folder.is_dir():
        return []
    steps = {int(match[1]): path for path in folder.iterdir() if (match := RUN_CHECKPOINT.fullmatch(path.name))}
    return [steps[step] for step in sorted(steps, reverse=True)]


def load_config(directory: str | Path) -> AndromedaConfig:
    """The parameter table of a checkpoint.

    Raises:
        AndromedaError: no such directory, no checkpoint, a newer format, an unknown key or a wrong value.
    """
    return _read_settled(directory, _read_config)


def is_checkpoint(directory: str | Path) -> bool:
    """Whether the directory has a config.json that calls itself an Andromeda model (whole or not)."""
    try:
        _read_settled(directory, _read_own_json)
    except AndromedaError:
        return False
    return True


# ---- writing -------------------------------------------------------------------------------------


def _check_names(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name == CONFIG or (path.name.startswith("model") and ".safetensors" in path.name):
            raise AndromedaError(f"file {path.name!r} is one of the checkpoint's own; choose another name")


def _write_weights(folder: Path, state: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    shards = _split(state, max_shard_bytes)
    if len(shards) == 1:
        save_tensors(folder / WEIGHTS, shards[0])
        return
    weight_map: dict[str, str] = {}
    digests: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        digests[name] = save_tensors(folder / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": total, "sha256": digests}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _split(state: Mapping[str, Tensor], max_shard_bytes: int) -> list[dict[str, Tensor]]:
    """In the model's own order, a new shard whenever the next tensor would not fit."""
    shards: list[dict[str, Tensor]] = [{}]
    held = 0
    for name, tensor in state.items():
        size = getattr(tensor, "nbytes", 0)  # what is no tensor, save_tensors refuses
        if shards[-1] and held + size > max_shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = tensor
        held += size
    return shards


# ---- reading -------------------------------------------------------------------------------------


def _read_settled(directory: str | Path, read: Callable[[Path], T]) -> T:
    """Reads a directory; once more when a save replaced it meanwhile, so that no reader gets half of each."""
    try:
        while True:
            before = _version(directory)
            try:
                result = read(_existing(directory))
            except AndromedaError:
                if _version(directory) == before:
                    raise
            else:
                if _version(directory) == before:
                    return result
    except OSError as error:
        raise AndromedaError(f"{directory}: cannot be read: {error}") from error


def _version(directory: str | Path) -> tuple[int, int, int] | None:
    """What tells a directory from one that took its place; None: there is none."""
    try:
        found = latest(directory).stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _existing(directory: str | Path) -> Path:
    folder = latest(directory)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such directory"
        raise AndromedaError(f"{directory}: {what}; give a model directory")
    return folder


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AndromedaError(f"{path}: no such file; give a directory that holds a whole Andromeda model") from error
    except (ValueError, RecursionError) as error:
        raise AndromedaError(f"{path}: is not JSON ({error}); {REMEDY}") from error
    if not isinstance(values, dict):
        raise AndromedaError(f"{path}: holds a {type(values).__name__} where an object should be; {REMEDY}")
    return values


def _read_own_json(folder: Path) -> dict[str, Any]:
    values = _read_json(folder / CONFIG)
    if values.get("model_type") != MODEL_TYPE:
        raise AndromedaError(
            f"{folder / CONFIG}: model_type is {values.get('model_type')!r}, not {MODEL_TYPE!r}; "
            "this is the directory of another kind of model"
        )
    return values


def _read_config(folder: Path) -> AndromedaConfig:
    values = _read_own_json(folder)
    del values["model_type"]
    version = values.pop("format_version", None)
    if type(version) is not int or version < 1:
        raise AndromedaError(f"{folder / CONFIG}: format_version is {version!r}, and must be a number; {REMEDY}")
    if version > FORMAT_VERSION:
        raise AndromedaError(
            f"{folder / CONFIG}: format_version is {version}, but this Andromeda reads up to {FORMAT_VERSION}; upgrade"
        )
    try:
        return AndromedaConfig.from_dict(values)
    except AndromedaError as error:
        raise AndromedaError(f"{folder / CONFIG}: {error}") from error


def _open_shards(folder: Path) -> list[TensorFile]:
    if not (folder / INDEX).exists():
        return [TensorFile.open(folder / WEIGHTS)]
    if (folder / WEIGHTS).exists():
        raise AndromedaError(f"{folder}: has both {WEIGHTS} and {INDEX}, of different saves; remove the wrong one")
    weight_map, digests = _read_index(folder / INDEX)
    shards = [TensorFile.open(folder / name) for name in sorted(set(weight_map.values()))]
    for shard in shards:
        name = shard.path.name
        listed = {tensor for tensor, place in weight_map.items() if place == name}
        for tensor in sorted(listed ^ set(shard.specs)):
            where = "it is not there" if tensor in listed else f"{INDEX} does not list it there"
            raise AndromedaError(f"{shard.path}: tensor {tensor!r}: {where}; copy the whole directory again")
        if digests.get(name, shard.digest) != shard.digest:
            raise AndromedaError(
                f"{shard.path}: comes from another save than {INDEX}, by its checksum; copy the whole directory again"
            )
    return shards


def _read_index(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Which file holds each tensor, and the files' checksums."""
    index = _read_json(path)
    weight_map, metadata = index.get("weight_map"), index.get("metadata", {})
    digests = metadata.get("sha256", {}) if isinstance(metadata, dict) else None
    if not isinstance(weight_map, dict) or not isinstance(digests, dict):
        raise AndromedaError(f"{path}: is not an index of weights; {REMEDY}")
    for name in weight_map.values():
        if not isinstance(name, str) or not name.endswith(".safetensors") or any(sign in name for sign in "/\\:\0"):
            raise AndromedaError(f"{path}: {name!r} is not the name of a weights file beside it; {REMEDY}")
    return weight_map, digests


def _check_size(folder: Path, config: AndromedaConfig, shards: Iterable[TensorFile]) -> None:
    """Before the model is built, which takes long for an absurd one; `_check_fit` has the better words for others."""
    named = config.num_parameters()
    held = sum(math.prod(spec.shape) for shard in shards for spec in shard.specs.values())
    if named > ABSURD * held:
        raise AndromedaError(
            f"{folder}: the weights do not belong to {CONFIG}: it names {named:,} parameters, and they hold {held:,}; "
            "copy the whole directory again, or undo the edit"
        )


def _check_fit(folder: Path, wanted: Mapping[str, Tensor], shards: Iterable[TensorFile]) -> None:
    """The weights are those that config.json calls for: names, shapes and kinds of number."""
    found = {name: (shard.path, spec) for shard in shards for name, spec in shard.specs.items()}
    for names, what in ((set(wanted) - set(found), "lack"), (set(found) - set(wanted), "have, beyond what it names,")):
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise AndromedaError(
                f"{folder}: the weights do not belong to {CONFIG}: they {what} {min(names)!r}{others}; "
                "copy the whole directory again"
            )
    for name, tensor in wanted.items():
        path, spec = found[name]
        expected = TensorSpec(tensor.dtype, tuple(tensor.shape))
        if spec.shape != expected.shape or _kind(spec.dtype) != _kind(expected.dtype):
            raise AndromedaError(
                f"{path}: tensor {name!r} is {_kind(spec.dtype)} {list(spec.shape)}, but {CONFIG} makes it "
                f"{_kind(expected.dtype)} {list(expected.shape)}; copy the whole directory again, or undo the edit"
            )


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "floating-point"
    return "boolean" if dtype is torch.bool else "integer"


# ---- building ------------------------------------------------------------------------------------


def _check_target(device: str | torch.device, dtype: torch.dtype | None) -> None:
    if dtype is not None and not dtype.is_floating_point:
        raise AndromedaError(f"dtype={dtype} is no floating-point type; choose torch.float32 or torch.bfloat16, say")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either, by device
        raise AndromedaError(f"device {str(device)!r} is not to be had here: {str(error).splitlines()[0]}") from error


class _NoRandomFill(TorchFunctionMode):
    """Leaves weights without data as they are: filling them does nothing, but makes torch import its compiler (2 s)."""

    FILLS = frozenset({"normal_", "uniform_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_"})

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")
        if getattr(func, "__name__", "") in self.FILLS and isinstance(target, Tensor) and target.is_meta:
            return target
        return func(*args, **kwargs)


def _build_without_weights(config: AndromedaConfig, embedding_provider: nn.Module | None) -> Andromeda:
    with torch.device("meta"), _NoRandomFill():
        return Andromeda(config, embedding_provider)


def _put_weights(model: Andromeda, state: Mapping[str, Tensor]) -> None:
    """Makes the tensors themselves the model's parameters, tied where they were tied."""
    names_of: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
    model.load_state_dict(state, assign=True)
    for first, *others in names_of.values():
        for name in others:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, model.get_parameter(first))


def _fill_buffers(model: Andromeda) -> None:
    """Computes what a model holds beside its weights and no checkpoint does."""
    for module in model.modules():
        reset = getattr(module, "reset_buffers", None)
        if reset is not None:
            reset()
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise AndromedaError(
                f"model: buffer {name!r} is not in the checkpoint, and no reset_buffers() of its module fills it; "
                "write one, or pass the module as embedding_provider"
            )
