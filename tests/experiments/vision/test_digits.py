"""The data: no image is in two parts, batches depend only on seed and step, and rotations are correct."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from dynmoe_tutel.experiments.vision.digits import ANGLES, Digits, _all_images, batch, load_digits, rotate


@pytest.fixture(scope="module")
def split() -> Digits:
    return load_digits(75, seed=0)


@pytest.mark.parametrize("test_angle", ANGLES)
@pytest.mark.parametrize("seed", [0, 1])
def test_no_image_is_in_two_domains_or_in_two_parts(test_angle: int, seed: int) -> None:
    digits = load_digits(test_angle, seed)
    parts = [*digits.train.values(), *digits.validation.values(), digits.test]
    index = torch.cat([part.index for part in parts])
    assert sorted(index.tolist()) == list(range(1797))
    assert set(digits.train) == set(digits.validation) == set(ANGLES) - {test_angle}
    for angle in digits.train:
        held_out = len(digits.validation[angle]) / (len(digits.train[angle]) + len(digits.validation[angle]))
        assert held_out == pytest.approx(0.2, abs=0.01)


def test_pixels_are_those_of_no_other_part(split: Digits) -> None:
    """Compares content, not indices: upright images are distinct, so equal upright pixels would be a leak."""
    upright = _all_images()[0].flatten(1)
    assert len(upright.unique(dim=0)) == len(upright)
    for angle, part in [*split.train.items(), *split.validation.items(), (75, split.test)]:
        assert torch.equal(part.image, rotate(upright[part.index].view(-1, 1, 8, 8), angle))
        assert torch.equal(part.label, _all_images()[1][part.index])


def test_the_seed_moves_images_between_training_and_validation_only() -> None:
    first, second = load_digits(75, 0), load_digits(75, 1)
    assert torch.equal(first.test.index, second.test.index)
    for angle in first.train:
        assert set(first.train[angle].index.tolist()) != set(second.train[angle].index.tolist())
        whole = [set(torch.cat([d.train[angle].index, d.validation[angle].index]).tolist()) for d in (first, second)]
        assert whole[0] == whole[1]


def test_a_batch_is_a_function_of_seed_and_step(split: Digits) -> None:
    state = torch.get_rng_state()
    later = batch(split, 0, 7, 16)
    batch(split, 0, 3, 16)
    torch.manual_seed(99)
    again = batch(split, 0, 7, 16)
    assert torch.equal(later[0], again[0])
    assert torch.equal(later[1], again[1])
    assert later[0].shape == (16 * 5, 1, 8, 8)
    assert not torch.equal(later[1], batch(split, 1, 7, 16)[1])
    assert not torch.equal(later[1], batch(split, 0, 8, 16)[1])
    torch.set_rng_state(state)


@pytest.mark.parametrize("size", [7, 16, 239, 500])
def test_every_epoch_shows_every_training_image_once(split: Digits, size: int) -> None:
    """Also if a batch spans the end of one or several epochs."""
    smallest = min(len(domain) for domain in split.train.values())
    known = {image.numpy().tobytes(): angle for angle, domain in split.train.items() for image in domain.image}
    seen: Counter[bytes] = Counter()
    steps = -(-2 * smallest // size)
    for step in range(steps):
        images, labels = batch(split, 0, step, size)
        assert len(labels) == size * len(split.train)
        seen.update(image.numpy().tobytes() for image in images)
    for angle, domain in split.train.items():
        times = [seen[image.numpy().tobytes()] for image in domain.image]
        assert sum(times) == steps * size
        assert max(times) - min(times) <= 1, f"angle {angle}"
    assert set(seen) <= set(known)


def test_batches_differ_from_epoch_to_epoch(split: Digits) -> None:
    domain = next(iter(split.train.values()))
    first, second = (batch(split, 0, epoch, len(domain))[1][: len(domain)] for epoch in (0, 1))
    assert sorted(first.tolist()) == sorted(second.tolist())
    assert not torch.equal(first, second)


def test_rotation_is_counterclockwise_about_the_centre() -> None:
    image = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert rotate(image, 0) is image
    for quarter in (1, 2, 3):
        assert torch.allclose(rotate(image, 90 * quarter), image.rot90(quarter, (2, 3)), atol=1e-5)
    turned = rotate(image, 30)
    assert turned.min() >= 0
    assert turned.max() <= image.max() + 1e-6
    assert not torch.allclose(turned, image, atol=0.1)


def test_an_angle_that_is_no_domain_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[0, 15, 30, 45, 60, 75\], got 20"):
        load_digits(20, 0)
