"""Which kind of loss a prediction and a target ask for, where only one can be meant."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from andromeda.errors import AndromedaError
from andromeda.training.nebula.losses import (
    Classification,
    Contrastive,
    Distillation,
    LanguageModel,
    Loss,
    MultiLabel,
    Pair,
    Preference,
    Regression,
    Unprojected,
)

Kind = Literal[
    "language_model", "classification", "multi_label", "regression", "distillation", "preference", "contrastive"
]
LOSSES: dict[Kind, type[Loss]] = {
    "language_model": LanguageModel, "classification": Classification, "multi_label": MultiLabel,
    "regression": Regression, "distillation": Distillation, "preference": Preference, "contrastive": Contrastive,
}  # fmt: skip
assert set(LOSSES) == set(get_args(Kind))


def loss_for(prediction: Any, target: Any, name: str) -> Loss:
    """The loss of the only kind that a task's prediction and target can be meant for, with its defaults.

    Raises:
        AndromedaError: several kinds fit, or none.
    """
    fitting = fitting_kinds(prediction, target)
    if len(fitting) == 1:
        return LOSSES[fitting[0]]()
    what = f"nebula: task {name!r}: a prediction {_described(prediction)} with a target {_described(target)}"
    if not fitting:
        raise AndromedaError(f"{what} fits no kind of loss; kinds: {', '.join(LOSSES)}")
    raise AndromedaError(f"{what} may mean {', '.join(fitting[:-1])} or {fitting[-1]}; state its kind")


def fitting_kinds(prediction: Any, target: Any) -> list[Kind]:
    """All that take these types and shapes."""
    if isinstance(prediction, Pair) and isinstance(target, Pair):
        return ["preference"]
    if isinstance(prediction, Unprojected):
        if isinstance(target, Unprojected):
            return ["distillation"]
        whole = isinstance(target, Tensor) and _is_whole(target)
        return ["language_model"] if whole and target.shape == prediction.hidden.shape[:-1] else []
    if not isinstance(prediction, Tensor) or not isinstance(target, Tensor) or not prediction.is_floating_point():
        return []
    if target.shape == prediction.shape[:-1] and prediction.dim() > 0 and _is_whole(target):
        return ["classification"]
    if target.shape != prediction.shape:
        return []
    if target.dtype is torch.bool:
        return ["multi_label"] if target.dim() > 0 else []
    if not target.is_floating_point():
        return []
    kinds: list[Kind] = ["regression"]
    if target.dim() > 1 and target.shape[-1] > 1:
        kinds += ["multi_label", "distillation"]
        if target.dim() == 2:
            kinds.append("contrastive")
    return kinds


def _is_whole(x: Tensor) -> bool:
    return x.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _described(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"of {str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
    return f"of type {type(x).__name__}"
