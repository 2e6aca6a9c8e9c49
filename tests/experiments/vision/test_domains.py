"""DomainBed's protocol: its exact splits, no target data in training, batches that resume anywhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from dynmoe_tutel.experiments.task import walk
from dynmoe_tutel.experiments.vision.domains import LeaveOut, seed_hash, split

SIZES = {"art": 41, "photo": 25, "sketch": 32}


class Numbers:
    """An image is its number plus 1000 times the domain's position; an augmented one carries its stream."""

    domains = tuple(SIZES)

    def labels(self, domain: str) -> Tensor:
        return torch.arange(SIZES[domain]) + 1000 * self.domains.index(domain)

    def images(self, domain: str, index_B: Tensor) -> Tensor:
        return self.labels(domain)[index_B].double().view(-1, 1, 1, 1)

    def training_images(self, domain: str, index_B: Tensor, streams: Sequence[int]) -> Tensor:
        return self.images(domain, index_B) + torch.tensor(streams).view(-1, 1, 1, 1) / 2**32


def test_the_split_is_domainbeds() -> None:
    """Seeds come from DomainBed's `seed_hash`, and images are split as by its `split_dataset`: a RandomState shuffles
    the list, and the first `int(0.2 * n)` are held out."""
    assert seed_hash(0, 1) == 1514274641  # md5 of "(0, 1)" modulo 2**31
    for size, seed, position in ((41, 0, 0), (9, 2, 3), (1670, 1, 2)):
        keys = list(range(size))
        np.random.RandomState(seed_hash(seed, position)).shuffle(keys)
        inside, outside = split(size, seed, position)
        assert outside.tolist() == keys[: int(size * 0.2)]
        assert inside.tolist() == keys[int(size * 0.2) :]


@pytest.mark.parametrize("test", [["sketch"], ["photo"], ["art", "sketch"]])
def test_every_image_has_one_place_and_the_targets_is_not_in_training(test: list[str]) -> None:
    leave_out = LeaveOut(Numbers(), test, 1, 4)
    assert set(leave_out.target) == set(test)
    assert set(leave_out.training) == set(leave_out.validation) == set(SIZES) - set(test)
    for domain, inside in leave_out.training.items():
        outside = leave_out.validation[domain]
        assert sorted(torch.cat([inside, outside]).tolist()) == list(range(SIZES[domain]))
        assert len(outside) == int(0.2 * SIZES[domain])
    seen = {int(label) for step in range(40) for label in leave_out[step][1]}
    expected = {
        int(n) for domain, inside in leave_out.training.items() for n in Numbers().labels(domain)[inside].tolist()
    }
    assert seen == expected


def test_evaluation_is_of_validation_images_and_of_the_targets_in_images() -> None:
    leave_out = LeaveOut(Numbers(), ["photo"], 0, 4)
    for domain, index in {**leave_out.validation, **leave_out.target}.items():
        images, labels = (torch.cat(parts) for parts in zip(*leave_out.evaluated(domain), strict=True))
        assert torch.equal(labels, Numbers().labels(domain)[index])
        assert torch.equal(images.flatten().long(), labels)
    assert len(leave_out.target["photo"]) == 20


def test_the_split_is_of_the_seed_and_the_order_of_seed_and_step() -> None:
    first, other = (LeaveOut(Numbers(), ["art"], seed, 6) for seed in (0, 1))
    assert set(first.validation["photo"].tolist()) != set(other.validation["photo"].tolist())
    state = torch.get_rng_state()
    assert torch.equal(first[7][0], LeaveOut(Numbers(), ["art"], 0, 6)[7][0])
    assert not torch.equal(first[7][0], first[8][0])
    assert torch.equal(torch.get_rng_state(), state)


def test_augmentation_differs_between_seeds_steps_domains_and_places() -> None:
    streams = [
        float(image) % 1
        for seed in (0, 1)
        for step in (0, 1, 2)
        for image in LeaveOut(Numbers(), ["art"], seed, 6)[step][0].flatten()
    ]
    assert len(set(streams)) == len(streams) == 2 * 3 * 2 * 6


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_any_step_are_those_of_the_whole_run(workers: int) -> None:
    """Any number of workers makes the same batches, without the global random stream."""
    leave_out = LeaveOut(Numbers(), ["art"], 0, 5)
    state = torch.get_rng_state()
    whole, rest = list(leave_out.batches(0, 9)), list(leave_out.batches(4, 9, workers))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(rest) == 5
    for later, expected in zip(rest, whole[4:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(later, expected, strict=True))


def test_a_walk_shows_everything_once_an_epoch_across_the_ends() -> None:
    def stream(epoch: int) -> torch.Generator:
        assert epoch >= 1
        return torch.Generator().manual_seed(epoch)

    for size, count in ((5, 3), (7, 7), (4, 11), (1, 3)):
        steps = 2 * size
        shown = torch.cat([walk(size, step, count, stream) for step in range(steps)])
        assert len(shown) == steps * count
        for epoch in range(len(shown) // size):
            assert sorted(shown[epoch * size : (epoch + 1) * size].tolist()) == list(range(size))


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ([], "different ones of art, photo, sketch, got none"),
        (["art", "art"], "got art, art"),
        (["cartoon"], "got cartoon"),
        (["art", "photo", "sketch"], "must be left to train on"),
    ],
)
def test_bad_choices_of_test_domains_are_refused(test: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LeaveOut(Numbers(), test, 0, 2)


def test_a_domain_with_too_few_images_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "photo", 4)
    with pytest.raises(ValueError, match="domain 'photo' has 4 images, at least 5 are needed"):
        LeaveOut(Numbers(), ["art"], 0, 2)
