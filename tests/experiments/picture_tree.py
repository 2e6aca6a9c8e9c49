"""A tiny tree of images laid out as PACS, DATA/<domain>/<class>/<image>, that are easy to tell apart."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

DOMAINS = ("art", "photo", "sketch")
CLASSES = ("dog", "elephant", "giraffe")
PER_CLASS = 4
SIDE = 24


def write_tree(root: Path, per_class: int = PER_CLASS, seed: int = 0) -> Path:
    """Colour the upper half by class and the lower half by domain, and add noise."""
    generator = torch.Generator().manual_seed(seed)
    for d, domain in enumerate(DOMAINS):
        for c, name in enumerate(CLASSES):
            folder = root / domain / name
            folder.mkdir(parents=True)
            for n in range(per_class):
                pixels = torch.randint(0, 60, (SIDE + n, SIDE, 3), generator=generator, dtype=torch.uint8)
                pixels[: SIDE // 2, :, c] += 150
                pixels[SIDE // 2 :, :, d] += 90
                picture(pixels).save(folder / f"pic_{n:03d}.{'jpg' if n else 'png'}", quality=95)
    return root


def picture(pixels_HW3: Tensor) -> Image.Image:
    height, width, _ = pixels_HW3.shape
    return Image.frombytes("RGB", (width, height), bytes(pixels_HW3.contiguous().flatten().tolist()))
