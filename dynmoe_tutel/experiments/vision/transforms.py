"""DomainBed's augmentation of training images, and how images are evaluated, with Pillow and torch alone.

The parameters and the order of the operations are DomainBed's: a crop of 70 to 100 % of the area, a flip, jitter of
brightness, contrast, saturation and hue by up to 0.3 in random order, grey in one of ten, ImageNet's normalisation.
Every image draws from an own generator, so what becomes of it depends on nothing else.
"""

from __future__ import annotations

import math

import torch
from PIL import Image, ImageEnhance
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, of red, green and blue
DEVIATION = (0.229, 0.224, 0.225)
CROP_AREA = (0.7, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
JITTER = 0.3
GREY = 0.1
CROP_TRIES = 10


def for_evaluation(image: Image.Image, side: int) -> Tensor:
    """The whole image [3, side, side] fp32, normalised."""
    return normalised(image.resize((side, side), Image.Resampling.BILINEAR))


def for_training(image: Image.Image, side: int, generator: torch.Generator) -> Tensor:
    """An augmented view [3, side, side] fp32 of an RGB image, normalised."""
    left, top, width, height = crop_box(*image.size, generator)
    image = image.crop((left, top, left + width, top + height)).resize((side, side), Image.Resampling.BILINEAR)
    if _uniform(generator, 0, 1) < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = jittered(image, generator)
    if _uniform(generator, 0, 1) < GREY:
        image = image.convert("L").convert("RGB")
    return normalised(image)


def normalised(image: Image.Image) -> Tensor:
    """An RGB image as a tensor [3, height, width] fp32 of ImageNet's mean 0 and deviation 1."""
    width, height = image.size
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, 3)
    tensor = pixels.permute(2, 0, 1).float().div_(255)
    return tensor.sub_(torch.tensor(MEAN).view(3, 1, 1)).div_(torch.tensor(DEVIATION).view(3, 1, 1))


def crop_box(width: int, height: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a crop of random area and aspect ratio; where none fits, the largest central one
    of allowed ratio."""
    for _ in range(CROP_TRIES):
        area = width * height * _uniform(generator, *CROP_AREA)
        ratio = math.exp(_uniform(generator, math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = (int(torch.randint(0, free + 1, (), generator=generator)) for free in (width - w, height - h))
            return left, top, w, h
    w, h = width, height
    if width / height < CROP_RATIO[0]:
        h = round(width / CROP_RATIO[0])
    elif width / height > CROP_RATIO[1]:
        w = round(height * CROP_RATIO[1])
    return (width - w) // 2, (height - h) // 2, w, h


def jittered(image: Image.Image, generator: torch.Generator) -> Image.Image:
    """Brightness, contrast and saturation times 1 - 0.3 to 1 + 0.3, hue turned by up to 0.3 of a circle, in random
    order."""
    order = torch.randperm(4, generator=generator).tolist()
    factors = [_uniform(generator, 1 - JITTER, 1 + JITTER) for _ in range(3)]
    hue = _uniform(generator, -JITTER, JITTER)
    for operation in order:
        if operation == 3:
            image = with_hue_turned(image, hue)
        else:
            enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[operation]
            image = enhance(image).enhance(factors[operation])
    return image


def with_hue_turned(image: Image.Image, share: float) -> Image.Image:
    """The RGB image with its hues moved by that share of the circle."""
    hue, saturation, value = image.convert("HSV").split()
    shift = round(share * 256)
    hue = hue.point([(level + shift) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def _uniform(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))
