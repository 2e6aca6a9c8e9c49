"""The experiment `vision`: GMoE's protocol on images, dense against fixed-k mixtures and DynMoE.

Each row is a dense vision transformer some of whose FFNs are converted into experts that start as copies of them. It
is trained on all domains but the one left out, by DomainBed's protocol (`domains`), on the rotated digits that come
with scikit-learn or on a tree of images with a model of timm. Images of the domain left out are evaluated on and
reach nothing else: training, selection and controller do not depend on them.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dynmoe_tutel.experiments.options import absolute, option
from dynmoe_tutel.experiments.rows import ROWS, check_rows, check_targets, moe_options
from dynmoe_tutel.experiments.task import Part, RunKey, Settings, Task, refuse_bad_choice
from dynmoe_tutel.experiments.vision.digits import ANGLES, RotatedDigits
from dynmoe_tutel.experiments.vision.domains import DomainData, LeaveOut
from dynmoe_tutel.experiments.vision.image_folders import ImageFolders
from dynmoe_tutel.experiments.vision.timm_models import build_timm, moe_blocks, read_weights
from dynmoe_tutel.experiments.vision.vit import ViT, ViTConfig, seeded

DIGITS = "digits"
FOLDER_FIELDS = ("arch", "weights", "image_size", "workers", "device")
DIGESTS = ("files_digest", "weights_digest")
# The ends of the row of angles: nothing beyond them is trained on, so the model must extrapolate.
DIGITS_TEST_DOMAINS = ("0", "75")


@dataclass(frozen=True)
class VisionConfig(Settings):
    """What decides a job's results; the defaults are those of the rotated digits. `of_folders` gives DomainBed's.

    `data` is a folder laid out as DATA/<domain>/<class>/<image>, or "digits". The fields from `arch` on are about
    folders alone. ValueError for values out of range.
    """

    rows: tuple[str, ...] = ROWS
    data: str = option(DIGITS, "Images as DATA/<domain>/<class>/<image>. Default: rotated digits.", absolute)
    test_domains: tuple[str, ...] = option(
        DIGITS_TEST_DOMAINS,
        "Domains left out, each in runs of its own, by comma. Default: all; of the digits 0,75.",
    )
    batch_per_domain: int = option(16, "Images per step from each training domain. Default: 16, with --data 32.")
    steps: int = option(400, "Optimizer steps of each run. Default: 400, with --data 5000.")
    learning_rate: float = option(2e-3, "Learning rate, the same for all rows. Default: 0.002, with --data 3e-5.")
    weight_decay: float = 0.0
    constant_rate: bool = False  # DomainBed's; otherwise half a cosine after the warm-up
    device: str = option("cpu", "With --data: cuda or cpu. Default: cuda where there is one.")
    arch: str = option("", "With --data: a ViT of timm. Default: deit_small_patch16_224.")
    weights: str = option("", "With --data: pretrained weights of it, .safetensors or .pth.", absolute)
    image_size: int = option(224, "With --data: pixels of a side.")
    drop_path: float = 0.1
    # nothing but the speed depends on their number
    workers: int = option(0, "With --data: processes that read images. Default: one a core, at most 8.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rows(self.rows)
        check_targets(self.rows, self.experts)
        self.refuse_below_one("batch_per_domain", "image_size")
        if not isinstance(self.workers, int) or self.workers < 0:
            raise ValueError(f"workers must be an integer of at least 0, got {self.workers!r}")
        for name, above in (("drop_path", 1.0), ("weight_decay", math.inf)):
            value = getattr(self, name)
            if not isinstance(value, float) or not 0 <= value < above:
                raise ValueError(f"{name} must be at least 0 and below {above:g}, got {value!r}")
        _refuse_bad_device(self.device)
        if self.data == DIGITS:
            refuse_bad_choice("test_domains", self.test_domains, tuple(str(angle) for angle in ANGLES))

    @classmethod
    def of_folders(cls, data: Path, image_size: int = 224) -> VisionConfig:
        """Fine-tuning as DomainBed and GMoE do it, each domain of the tree left out in turn. ValueError for an unfit
        tree."""
        return cls(
            data=str(data.resolve()),
            test_domains=ImageFolders(data, image_size).domains,
            batch_per_domain=32,
            steps=5000,
            learning_rate=3e-5,
            weight_decay=1e-6,
            constant_rate=True,
            update_every=300,
            log_every=20,
            eval_every=300,
            device="cuda" if torch.cuda.is_available() else "cpu",
            arch="deit_small_patch16_224",
            image_size=image_size,
            workers=min(8, os.cpu_count() or 1),
        )

    @classmethod
    def of_options(cls, given: Mapping[str, Any], quick: bool) -> VisionConfig:
        """Refuse options that the digits do not use."""
        fields = dict(given)
        data = fields.pop("data", None)
        if data is None:
            if useless := [name for name in FOLDER_FIELDS if name in fields]:
                raise ValueError(
                    f"{useless[0]} is about a tree of images: name one with data, or leave {useless[0]} out"
                )
            return super().of_options(fields, quick)
        config = cls.of_folders(Path(data), fields.get("image_size", cls.image_size))
        return replace(config.quick() if quick else config, **fields)

    def quick(self) -> VisionConfig:
        """One seed, one test domain, fewer steps: of the digits under 3 minutes."""
        # updates as often in proportion
        short: dict[str, Any] = {"steps": 120} if self.data == DIGITS else {"steps": 20, "batch_per_domain": 4}
        every = short["steps"] // 4
        return replace(
            self,
            seeds=self.seeds[:1],
            test_domains=self.test_domains[-1:],
            update_every=every,
            eval_every=every,
            **short,
        )


def _refuse_bad_device(name: str) -> None:
    """ValueError for what is no device, or none of this machine."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # the second where torch has no CUDA at all
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be one that torch has here, such as cpu, got {name!r}: {reason}") from error
    if torch.device(name).type == "meta":
        raise ValueError("device must be one that computes, got 'meta'")


class VisionTask(Task):
    """Train a ViT on all domains but one, dense and as fixed-k and DynMoE mixtures, and test it on the one left out."""

    command = "experiment vision"
    settings_type = VisionConfig
    identity = DIGESTS
    axes = ("rows", "seeds", "test_domains")
    selection = "validation"
    keep_weights = False

    def __init__(self, config: VisionConfig) -> None:
        self.settings = self.config = config
        self.device = torch.device(config.device)
        self.data: DomainData
        if config.data == DIGITS:
            self.data = RotatedDigits()
        else:
            self.data = folders = ImageFolders(Path(config.data), config.image_size)
            folders.check_headers()
        refuse_bad_choice("test_domains", config.test_domains, self.data.domains)
        for test in config.test_domains:  # what is wrong with a split is said before anything is trained
            self._leave_out(0, test)
        self._weights = read_weights(Path(config.weights)) if config.weights else None
        self._split = lru_cache(maxsize=1)(self._leave_out)

    @property
    def plan(self) -> list[RunKey]:
        """Rows innermost, so that a busy machine slows all alike."""
        config = self.config
        return [RunKey(row, seed, test) for seed in config.seeds for test in config.test_domains for row in config.rows]

    def protocol(self) -> dict[str, Any]:
        """With digests of what the splits and the weights at start depend on."""
        content = super().protocol()
        if isinstance(self.data, ImageFolders):
            content["files_digest"] = self.data.fingerprint
        if self._weights is not None:
            content["weights_digest"] = hashlib.sha256(Path(self.config.weights).read_bytes()).hexdigest()
        return content

    def build(self, key: RunKey) -> nn.Module:
        """The dense model of the seed; of another row, with FFNs turned into experts that are copies of them."""
        dense, blocks = self._dense(key.seed)
        if key.row == "dense":
            return dense
        from dynmoe_tutel.convert import convert

        options = moe_options(key.row, self.config.experts, self.config.slots)
        seeded(key.seed, 1, lambda: convert(dense, layers=list(blocks), recipe="gmoe", **options))
        return dense

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        config = self.config
        return torch.optim.Adam(
            model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )

    def learning_rate_share(self, step: int) -> float:
        """1 where the rate is constant, as DomainBed's."""
        return 1.0 if self.config.constant_rate else super().learning_rate_share(step)

    def batches(self, key: RunKey, first_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The same for every row."""
        return self._split(key.seed, key.test).batches(first_step, self.config.steps, self.config.workers)

    def parts(self, key: RunKey, step: int) -> Iterator[Part]:
        """A part a domain: held-out images of those trained on, "in" images of the one left out, by a name of its own:
        runs that leave out another domain have validation images of this one."""
        split = self._split(key.seed, key.test)
        for domain in self.data.domains:
            name, kind = (f"{domain}, left out", "out") if domain in split.target else (domain, "validation")
            yield Part(name, kind, split.evaluated(domain, self.config.workers))

    def _dense(self, seed: int) -> tuple[nn.Module, tuple[int, ...]]:
        """The dense model and the blocks that get experts in the other rows."""
        config = self.config
        if config.data == DIGITS:
            return ViT(ViTConfig(), seed), ViTConfig().moe_blocks
        classes = len(self.data.classes)
        model = build_timm(config.arch, classes, config.image_size, config.drop_path, self._weights, seed)
        return model, moe_blocks(len(cast(nn.Sequential, model.blocks)))

    def _leave_out(self, seed: int, test: str) -> LeaveOut:
        return LeaveOut(self.data, [test], seed, self.config.batch_per_domain)
