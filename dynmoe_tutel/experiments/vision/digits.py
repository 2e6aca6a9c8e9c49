"""Rotated digits: scikit-learn's 1797 real images as the domains of a domain generalisation task.

As in DomainBed's RotatedMNIST the images are dealt into disjoint sets, one per domain, and each domain is one
rotation angle. The training domains are split into training and validation images; the test domain is seen in
evaluation only. Scikit-learn is imported when the images are loaded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import torch
from torch import Tensor

from dynmoe_tutel.experiments.task import walk

ANGLES = (0, 15, 30, 45, 60, 75)
CLASSES = 10
SIDE = 8
VALIDATION_SHARE = 0.2
# Which image belongs to which domain is a property of the benchmark, not of a run's seed.
DOMAIN_SEED = 20240523


@dataclass(frozen=True)
class Images:
    """Images [N, 1, 8, 8] fp32 in [0, 1], labels [N] int64, and index [N] int64: their place in the data set."""

    image: Tensor
    label: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.label)


@dataclass(frozen=True)
class Digits:
    """One split: training and validation images by training angle, and the images of the test angle."""

    train: dict[int, Images]
    validation: dict[int, Images]
    test: Images
    test_angle: int


def load_domains() -> dict[int, Images]:
    """The images of every angle. ImportError without scikit-learn."""
    image, label = _all_images()
    order = torch.randperm(len(label), generator=torch.Generator().manual_seed(DOMAIN_SEED))
    domains = {}
    for position, angle in enumerate(ANGLES):
        index = order[position :: len(ANGLES)].sort().values
        domains[angle] = Images(rotate(image[index], angle), label[index], index)
    return domains


def load_digits(test_angle: int, seed: int) -> Digits:
    """The split of `seed` with the domain of `test_angle` left out. ValueError for an angle that is no domain."""
    if test_angle not in ANGLES:
        raise ValueError(f"test domain must be one of the angles {list(ANGLES)}, got {test_angle!r}")
    domains = load_domains()
    test = domains.pop(test_angle)
    train, validation = {}, {}
    for angle, images in domains.items():
        order = torch.randperm(len(images), generator=_generator(seed, angle, 0))
        held_out = round(VALIDATION_SHARE * len(images))
        validation[angle] = _take(images, order[:held_out])
        train[angle] = _take(images, order[held_out:])
    return Digits(train, validation, test, test_angle)


class RotatedDigits:
    """The domains as the protocol of `domains` wants them, named by their angles; a `DomainData`."""

    def __init__(self) -> None:
        self._images = {str(angle): images for angle, images in load_domains().items()}

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(str(digit) for digit in range(CLASSES))

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self._images)

    def labels(self, domain: str) -> Tensor:
        """Labels [N] int64."""
        return self._images[domain].label

    def images(self, domain: str, index_B: Tensor) -> Tensor:
        """Images [B, 1, 8, 8] fp32."""
        return self._images[domain].image[index_B]

    def training_images(self, domain: str, index_B: Tensor, streams: Sequence[int]) -> Tensor:
        """The same images: as in RotatedMNIST, nothing is augmented."""
        return self.images(domain, index_B)


def batch(digits: Digits, seed: int, step: int, batch_per_domain: int) -> tuple[Tensor, Tensor]:
    """Training images [B, 1, 8, 8] and labels [B] of step 0, 1, ...: `batch_per_domain` of each training domain.

    A pure function of the seed and the step: each domain is walked through in a fresh order every epoch.
    """
    images, labels = [], []
    for angle, domain in digits.train.items():
        picked = walk(len(domain), step, batch_per_domain, partial(_generator, seed, angle))
        images.append(domain.image[picked])
        labels.append(domain.label[picked])
    return torch.cat(images), torch.cat(labels)


def at_angle(images: Images, angle: float) -> Images:
    """The same images turned by another angle, from the originals."""
    image, _ = _all_images()
    return Images(rotate(image[images.index], angle), images.label, images.index)


def rotate(image: Tensor, angle: float) -> Tensor:
    """Images [N, 1, S, S] turned counterclockwise by `angle` degrees about their centre, bilinear, zeros outside."""
    if angle == 0:
        return image
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    matrix = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]]).expand(len(image), 2, 3)
    grid = torch.nn.functional.affine_grid(matrix, list(image.shape), align_corners=False)
    return torch.nn.functional.grid_sample(image, grid, mode="bilinear", align_corners=False)


def _all_images() -> tuple[Tensor, Tensor]:
    """All images [1797, 1, 8, 8] upright, and their labels."""
    try:
        datasets = import_module("sklearn.datasets")
    except ImportError as error:
        raise ImportError(
            "the digits need scikit-learn, which is not installed: pip install 'dynmoe_tutel[experiments]'"
        ) from error
    content = datasets.load_digits()
    image = torch.from_numpy(content.images).float().div_(16).unsqueeze(1)
    return image, torch.from_numpy(content.target).long()


def _take(images: Images, chosen: Tensor) -> Images:
    return Images(images.image[chosen], images.label[chosen], images.index[chosen])


def _generator(seed: int, angle: int, epoch: int) -> torch.Generator:
    """An own random stream for each seed, domain and epoch (epoch 0: the split)."""
    return torch.Generator().manual_seed(((seed * 1_000 + angle) * 100_000 + epoch) % 2**63)
