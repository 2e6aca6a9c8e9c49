"""Turns dense models into mixtures of experts and back: `convert`, `revert`, and `aux_loss` for the training loop."""

from .replace import LAYERS, RECIPES, SPLITS, aux_loss, convert, revert

__all__ = [
    "LAYERS",
    "RECIPES",
    "SPLITS",
    "aux_loss",
    "convert",
    "revert",
]
