"""The Nebula loss: tasks of any kind, one number to make small."""

from andromeda.training.nebula.balance import FAMO, Balance, Uncertainty
from andromeda.training.nebula.kinds import LOSSES, Kind
from andromeda.training.nebula.losses import (
    Classification,
    Contrastive,
    Distillation,
    LanguageModel,
    MultiLabel,
    Pair,
    Preference,
    Regression,
    Unprojected,
)
from andromeda.training.nebula.nebula import Given, Nebula, Task, Total

__all__ = [
    "FAMO", "LOSSES", "Balance", "Classification", "Contrastive", "Distillation", "Given", "Kind", "LanguageModel",
    "MultiLabel", "Nebula", "Pair", "Preference", "Regression", "Task", "Total", "Uncertainty", "Unprojected",
]  # fmt: skip
