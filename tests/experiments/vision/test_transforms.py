"""Augmentation: each operation's effect on known pixels, its frequency, and its own random stream."""

from __future__ import annotations

import colorsys
import math

import pytest
import torch

pytest.importorskip("PIL", reason="Pillow is of the extra [vision]")

from picture_tree import picture
from PIL import Image

from dynmoe_tutel.experiments.vision import transforms


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(height: int, width: int) -> Image.Image:
    return picture(torch.randint(0, 256, (height, width, 3), generator=generator(), dtype=torch.uint8))


def test_normalised_pixels_have_imagenets_mean_and_deviation() -> None:
    pixels = torch.randint(0, 256, (5, 7, 3), generator=generator(), dtype=torch.uint8)
    expected = (pixels.double() / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(transforms.normalised(picture(pixels)).double(), expected.permute(2, 0, 1), atol=1e-6)


def test_evaluation_keeps_the_whole_image() -> None:
    pixels = torch.zeros(40, 60, 3, dtype=torch.uint8)
    pixels[:20, :30, 0], pixels[20:, 30:, 1] = 255, 255
    view = transforms.for_evaluation(picture(pixels), 10)
    assert view.shape == (3, 10, 10)
    red, green, _ = view * torch.tensor(transforms.DEVIATION).view(3, 1, 1) + torch.tensor(transforms.MEAN).view(
        3, 1, 1
    )
    assert torch.allclose(red[:4, :4], torch.ones(4, 4), atol=1e-6)
    assert red[6:].abs().max() < 1e-6
    assert torch.allclose(green[6:, 6:], torch.ones(4, 4), atol=1e-6)


@pytest.mark.parametrize("size", [(100, 80), (35, 30), (1, 1), (500, 20), (20, 500)])
def test_crops_lie_inside_and_have_the_allowed_area_and_ratio(size: tuple[int, int]) -> None:
    width, height = size
    places = set()
    stream = generator(1)
    for _ in range(200):
        left, top, w, h = transforms.crop_box(width, height, stream)
        assert left >= 0
        assert top >= 0
        assert left + w <= width
        assert top + h <= height
        places.add((left, top, w, h))
        if min(size) >= 30:
            assert 0.66 < w * h / (width * height) < 1.001
            assert 0.72 < w / h < 1.38
    if size == (500, 20):  # no crop of 70 % has an allowed ratio
        assert places == {((500 - 27) // 2, 0, 27, 20)}
    elif size == (20, 500):
        assert places == {(0, (500 - 27) // 2, 20, 27)}
    elif min(size) >= 30:
        assert len(places) > 100


def test_hues_turn_as_the_circle_says() -> None:
    for colour in ((255, 0, 0), (30, 200, 90), (70, 70, 200)):
        turned = transforms.with_hue_turned(Image.new("RGB", (1, 1), colour), 0.25).getpixel((0, 0))
        hue, saturation, value = colorsys.rgb_to_hsv(*(level / 255 for level in colour))
        expected = colorsys.hsv_to_rgb((hue + 0.25) % 1, saturation, value)
        assert turned == pytest.approx([255 * level for level in expected], abs=5)  # Pillow's HSV has 8 bits
    grey = Image.new("RGB", (2, 2), (90, 90, 90))
    assert transforms.with_hue_turned(grey, 0.3).getpixel((0, 0)) == (90, 90, 90)
    image = noise(6, 6)
    assert transforms.with_hue_turned(image, 0.3).tobytes() == transforms.with_hue_turned(image, -0.7).tobytes()


def test_jitter_stays_within_its_bounds() -> None:
    grey = Image.new("RGB", (4, 4), (100, 100, 100))  # only brightness changes it
    levels = [transforms.jittered(grey, generator(seed)).getpixel((0, 0))[0] for seed in range(200)]
    assert min(levels) >= 69
    assert max(levels) <= 131
    assert min(levels) < 75
    assert max(levels) > 125


def test_flips_and_greys_are_as_often_as_they_should() -> None:
    pixels = torch.zeros(32, 32, 3, dtype=torch.uint8)
    pixels[:, :16] = torch.tensor([200, 60, 60], dtype=torch.uint8)
    flipped = grey = 0
    runs = 400
    for seed in range(runs):
        view = transforms.for_training(picture(pixels), 8, generator(seed))
        colour = view * torch.tensor(transforms.DEVIATION).view(3, 1, 1) + torch.tensor(transforms.MEAN).view(3, 1, 1)
        flipped += bool(colour[:, :, 7].mean() > colour[:, :, 0].mean())
        grey += bool((colour.max(0).values - colour.min(0).values).max() < 0.02)
    for count, share in ((flipped, 0.5), (grey, 0.1)):
        assert abs(count / runs - share) < 4 * math.sqrt(share * (1 - share) / runs)


def test_a_view_is_a_function_of_its_stream_alone() -> None:
    image = noise(30, 40)
    state = torch.get_rng_state()
    first, again, other = (transforms.for_training(image, 16, generator(seed)) for seed in (3, 3, 4))
    assert first.shape == (3, 16, 16)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert image.tobytes() == noise(30, 40).tobytes()
