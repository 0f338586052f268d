"""Attention: the plain truth (reference.py) and the paths that compute it faster. Imports torch and triton alone."""

from andromeda.kernels.dispatch import BACKENDS, attention, attention_backend, choose_backend
from andromeda.kernels.geometry import Geometry, Rotary

__all__ = ["BACKENDS", "Geometry", "Rotary", "attention", "attention_backend", "choose_backend"]
