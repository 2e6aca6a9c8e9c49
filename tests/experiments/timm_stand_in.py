"""Imports timm where torchvision is not installed: the few names of it that timm asks for while it is imported.

None of them is used by a vision transformer. They are gone again when timm is there.
"""

from __future__ import annotations

import enum
import sys
from importlib.util import find_spec
from types import ModuleType

import pytest
from torch import nn


def import_timm() -> ModuleType:
    """timm, or the calling test is skipped."""
    if "timm" in sys.modules or find_spec("torchvision") is not None or find_spec("timm") is None:
        return pytest.importorskip("timm", reason="timm is of the extra [vision]")
    names = ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".datasets")
    modules = {name: ModuleType(f"torchvision{name}") for name in names}
    for name, module in modules.items():
        module.__path__ = []
        if name:
            parent, _, child = name.rpartition(".")
            setattr(modules[parent], child, module)
    modules[".ops.misc"].FrozenBatchNorm2d = type("FrozenBatchNorm2d", (nn.Module,), {})
    modes = ("NEAREST", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS")
    modules[".transforms"].InterpolationMode = enum.Enum("InterpolationMode", {mode: mode.lower() for mode in modes})
    modules[".transforms.functional"].InterpolationMode = modules[".transforms"].InterpolationMode
    for name in ("ToTensor", "Compose", "Normalize", "Resize", "CenterCrop", "RandomResizedCrop"):
        setattr(modules[".transforms"], name, type(name, (), {}))
    for name in ("CIFAR100", "CIFAR10", "MNIST", "KMNIST", "FashionMNIST", "ImageFolder"):
        setattr(modules[".datasets"], name, type(name, (), {}))
    before = set(sys.modules)
    sys.modules.update({module.__name__: module for module in modules.values()})
    try:
        import timm
    finally:
        for name in set(sys.modules) - before:
            if name.split(".")[0] == "torchvision":
                del sys.modules[name]
    return timm
