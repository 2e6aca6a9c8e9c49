"""DomainBed's protocol: which images of every domain are trained on, validated on and tested on, and in which order.

Every domain is split once, by the seed, into 80 % "in" and 20 % "out", image for image as DomainBed splits it. Of the
training domains, "in" is trained on and "out" is validated on; of a domain left out, "in" is what accuracy is
reported of and "out" is never used, as in DomainBed, where it is the oracle's. Batches are a pure function of the
seed and the step.
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from dynmoe_tutel.experiments.task import walk

HOLDOUT = 0.2
EVALUATION_BATCH = 64


class DomainData(Protocol):
    """Labelled images in domains."""

    @property
    def domains(self) -> tuple[str, ...]:
        """The names, in the order that the splits depend on."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names, by label."""

    def labels(self, domain: str) -> Tensor:
        """Labels [N] int64 of all images of a domain."""

    def images(self, domain: str, index_B: Tensor) -> Tensor:
        """Those images [B, C, S, S] fp32, as they are evaluated."""

    def training_images(self, domain: str, index_B: Tensor, streams: Sequence[int]) -> Tensor:
        """Those images as they are trained on, each augmented by the random stream of its own seed."""


class LeaveOut(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """The split of a seed with the domains `test` left out; item `step` is the training batch of that step.

    `training`, `validation` and `target` hold the positions of images by domain. ValueError where a domain is unknown,
    none would be left to train on, or one has too few images to be split.
    """

    def __init__(self, data: DomainData, test: Sequence[str], seed: int, batch_per_domain: int) -> None:
        refuse_bad_domains(test, data.domains)
        self.data, self.seed, self.batch_per_domain = data, seed, batch_per_domain
        self.training: dict[str, Tensor] = {}
        self.validation: dict[str, Tensor] = {}
        self.target: dict[str, Tensor] = {}
        for position, domain in enumerate(data.domains):
            size = len(data.labels(domain))
            inside, outside = split(size, seed, position)
            if not len(outside):
                least = round(1 / HOLDOUT)
                raise ValueError(f"domain {domain!r} has {size} images, at least {least} are needed to split it")
            if domain in test:
                self.target[domain] = inside
            else:
                self.training[domain], self.validation[domain] = inside, outside

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """Images [B, C, S, S] and labels [B]: `batch_per_domain` of each training domain, in new order every epoch."""
        images, labels = [], []
        for domain, inside in self.training.items():
            stream = partial(self._stream, "order", domain)
            picked = inside[walk(len(inside), step, self.batch_per_domain, stream)]
            streams = [seed_hash(self.seed, "augment", domain, step, n) for n in range(self.batch_per_domain)]
            images.append(self.data.training_images(domain, picked, streams))
            labels.append(self.data.labels(domain)[picked])
        return torch.cat(images), torch.cat(labels)

    def batches(self, first: int, last: int, workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of the steps from `first` up to `last`, made by that many worker processes; the same whatever
        their number."""
        return iter(_served(self, range(first, last), workers))

    def evaluated(self, domain: str, workers: int = 0) -> torch.utils.data.DataLoader[tuple[Tensor, Tensor]]:
        """Batches of the images that `domain` is evaluated on: its validation images, or the target's "in" images."""
        index_N = self.target[domain] if domain in self.target else self.validation[domain]
        chunks = _Chunks(self.data, domain, index_N)
        return _served(chunks, range(len(chunks)), workers)

    def _stream(self, *what: object) -> torch.Generator:
        return torch.Generator().manual_seed(seed_hash(self.seed, *what))


class _Chunks(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Images to be evaluated, a batch an item."""

    def __init__(self, data: DomainData, domain: str, index_N: Tensor) -> None:
        self.data, self.domain, self.index = data, domain, index_N.split(EVALUATION_BATCH)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, chunk: int) -> tuple[Tensor, Tensor]:
        index_B = self.index[chunk]
        return self.data.images(self.domain, index_B), self.data.labels(self.domain)[index_B]


def _served(
    batches: torch.utils.data.Dataset[tuple[Tensor, Tensor]], order: range, workers: int
) -> torch.utils.data.DataLoader[tuple[Tensor, Tensor]]:
    """A loader of whole batches in that order, which draws nothing from the global random state."""
    return torch.utils.data.DataLoader(
        batches,
        batch_size=None,
        sampler=order,
        num_workers=workers,
        generator=torch.Generator(),
        worker_init_fn=_ignore_terminal,
    )


def _ignore_terminal(_worker: int) -> None:
    """A terminal sends Ctrl-C and its end to all processes; the one that trains decides what comes of it."""
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def split(size: int, seed: int, position: int) -> tuple[Tensor, Tensor]:
    """("in" positions, "out" positions) of the domain at `position`, as DomainBed's `split_dataset` deals them for the
    trial seed `seed`: `int(0.2 * size)` are "out"."""
    import numpy as np

    # RandomState's stream is frozen: numpy promises the same numbers for ever, as DomainBed relies on.
    keys = np.arange(size)
    np.random.RandomState(seed_hash(seed, position)).shuffle(keys)
    order = torch.from_numpy(keys)
    held_out = int(size * HOLDOUT)
    return order[held_out:], order[:held_out]


def seed_hash(*parts: object) -> int:
    """A random seed below 2**31 from anything with a stable repr; DomainBed's, so that its splits are met."""
    return int(hashlib.md5(str(parts).encode(), usedforsecurity=False).hexdigest(), 16) % 2**31


def refuse_bad_domains(test: Sequence[str], domains: Sequence[str]) -> None:
    """ValueError unless `test` are different ones of the domains, at least one, and leave one to train on."""
    unknown = [name for name in test if name not in domains]
    if unknown or not test or len(set(test)) < len(test):
        raise ValueError(
            f"test domains must be different ones of {', '.join(domains)}, got {', '.join(test) or 'none'}"
        )
    if len(test) == len(domains):
        raise ValueError(f"at least one domain must be left to train on, all of {', '.join(domains)} are left out")
