"""The command line `dynmoe-tutel`."""

from .commands import app, main

__all__ = [
    "app",
    "main",
]
