"""LoRA (Hu et al. 2022): of a model that is frozen, products of two thin matrices are learned, beside some of its own.

peft puts them in, and says how they are kept: in a checkpoint the folder `adapter/`, which `PeftModel.from_pretrained`
opens. The checkpoint itself is the merged model, which everything else opens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from andromeda.errors import AndromedaError
from andromeda.model import Andromeda
from andromeda.tensorfile import load_tensors, save_tensors
from andromeda.training.imports import no_warnings
from andromeda.training.lora_recipe import LoraRecipe

FOLDER, CONFIG, WEIGHTS = "adapter", "adapter_config.json", "adapter_model.safetensors"
NAME = "default"  # of the adapter, within the model
PREFIX = "base_model.model."  # of the names in peft's files


def check_lora(lora: LoraRecipe | None, ranks: int) -> None:
    """Before any work.

    Raises:
        AndromedaError: peft is not installed, or several processes are to draw what is dropped.
    """
    if lora is None:
        return
    if find_spec("peft") is None:
        raise AndromedaError("recipe: lora needs peft, which is not installed; pip install 'andromeda-lm[lora]'")
    if lora.dropout and ranks > 1:
        raise AndromedaError(
            f"recipe: lora.dropout={lora.dropout} draws random numbers in each of {ranks} processes, and a "
            "checkpoint keeps those of one; set it to 0, or train on one process"
        )


def adapt(model: Andromeda, lora: LoraRecipe, weights: Mapping[str, Tensor] | None = None) -> None:
    """Puts the adapter in; all else is frozen.

    Args:
        weights: of the adapter, as `load_adapter` has them; None: new ones, which change nothing yet.

    Raises:
        AndromedaError: weights of another adapter.
    """
    with no_warnings():
        from peft import inject_adapter_in_model

        inject_adapter_in_model(_config(lora), model)
    if weights is None:
        return
    own = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}
    if {name: x.shape for name, x in own.items()} != {name: x.shape for name, x in weights.items()}:
        raise AndromedaError(f"{FOLDER}/{WEIGHTS}: is not of an adapter with the recipe's rank and targets")
    model.load_state_dict(weights, strict=False)


def merged(weights: Mapping[str, Tensor], lora: LoraRecipe) -> dict[str, Tensor]:
    """The weights of a model with an adapter, as those of one without: W + B A alpha / rank."""
    plain: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if ".lora_" in name:
            continue
        module, found, rest = name.partition(".base_layer")
        if found:
            a, b = (weights[f"{module}.lora_{which}.{NAME}.weight"] for which in "AB")
            tensor = tensor + b @ a * lora.scaling
        plain[module + rest] = tensor
    return plain


def check_base(base: Andromeda, trained: Andromeda, origin: str) -> None:
    """That a model is what a merged one was made of, by the weights that an adapter leaves as they are.

    Raises:
        AndromedaError: it is not.
    """
    theirs = trained.state_dict()
    for name, tensor in base.state_dict().items():
        if name.rsplit(".", 2)[-2] in LoraRecipe.TARGETS:
            continue
        if name not in theirs or not torch.equal(tensor, theirs[name]):
            raise AndromedaError(
                f"recipe: model.from={origin!r} is not the model that this run began with (see its {name}); put it "
                "back, or choose another output"
            )


# ---- in peft's form ------------------------------------------------------------------------------


def save_adapter(checkpoint: Path, weights: Mapping[str, Tensor], lora: LoraRecipe, origin: str) -> None:
    """Writes `adapter/` into a checkpoint that is being made.

    Args:
        weights: of the model with its adapter.
        origin: the model that it belongs to.
    """
    folder = checkpoint / FOLDER
    folder.mkdir()
    own = {PREFIX + name.replace(f".{NAME}.", "."): tensor for name, tensor in weights.items() if ".lora_" in name}
    save_tensors(folder / WEIGHTS, own)
    values = _config(lora).to_dict() | {"base_model_name_or_path": origin, "inference_mode": True}
    listed = {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}
    (folder / CONFIG).write_text(json.dumps(listed, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_adapter(checkpoint: Path) -> dict[str, Tensor] | None:
    """The adapter's weights by their names within the model; None: the checkpoint has none.

    Raises:
        AndromedaError: they are damaged, or no adapter's.
    """
    path = checkpoint / FOLDER / WEIGHTS
    if not path.parent.is_dir():
        return None
    weights: dict[str, Tensor] = {}
    for name, tensor in load_tensors(path)[0].items():
        module, _, end = name.removeprefix(PREFIX).rpartition(".")
        weights[f"{module}.{NAME}.{end}"] = tensor
    return weights


def _config(lora: LoraRecipe) -> Any:
    with no_warnings():
        from peft import LoraConfig
    return LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets))
