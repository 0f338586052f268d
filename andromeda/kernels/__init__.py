"""Attention, embedding and loss head: the plain truth and the paths that compute it faster; torch and triton alone."""

from andromeda.kernels.dispatch import (
    BACKENDS,
    attention,
    attention_backend,
    choose_backend,
    normalised_attention,
    paged_attention,
)
from andromeda.kernels.embedding import embed
from andromeda.kernels.gathered import PageLayout
from andromeda.kernels.geometry import Geometry, Rotary
from andromeda.kernels.loss import linear_cross_entropy
from andromeda.kernels.norm import QKNorm

__all__ = [
    "BACKENDS",
    "Geometry",
    "PageLayout",
    "QKNorm",
    "Rotary",
    "attention",
    "attention_backend",
    "choose_backend",
    "embed",
    "linear_cross_entropy",
    "normalised_attention",
    "paged_attention",
]
