"""Andromeda: a long-context language model whose attention heads have provable windows."""

__version__ = "0.1.0"
