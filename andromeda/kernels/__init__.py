"""Attention, embedding and loss head: the plain truth and the paths that compute it faster; torch and triton alone."""

from andromeda.kernels.dispatch import BACKENDS, attention, attention_backend, choose_backend
from andromeda.kernels.embedding import embed
from andromeda.kernels.geometry import Geometry, Rotary
from andromeda.kernels.loss import linear_cross_entropy

__all__ = [
    "BACKENDS",
    "Geometry",
    "Rotary",
    "attention",
    "attention_backend",
    "choose_backend",
    "embed",
    "linear_cross_entropy",
]
