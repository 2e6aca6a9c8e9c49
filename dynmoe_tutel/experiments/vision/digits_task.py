"""The experiment `train`: domain generalisation on rotated digits, dense against top-1, top-2 and DynMoE.

Every row is trained with the same seeds, batches, steps, optimizer and learning rate, and its experts are as wide as
the dense MLP. Nothing is selected by its result: the numbers are those after the last step. All randomness comes from
the seed through private generators, so a run is a pure function of its configuration, and a resumed one is bitwise
the uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import count
from typing import Any

from torch import Tensor, nn

from dynmoe_tutel import MoELayer
from dynmoe_tutel.experiments.options import option
from dynmoe_tutel.experiments.rows import check_targets, held, moe_options
from dynmoe_tutel.experiments.task import Part, RunKey, Settings, Task, refuse_bad_choice
from dynmoe_tutel.experiments.vision import digits
from dynmoe_tutel.experiments.vision.vit import ViT, ViTConfig

ROWS = ("dense", "top-1", "top-2", "dynmoe", "dynmoe-k2")


@dataclass(frozen=True)
class TrainConfig(Settings):
    """Everything that decides what a job computes. ValueError for values out of range.

    A checkpoint follows every evaluation. One thread: a step is so small that more gain little, and lose much on a busy
    machine.
    """

    rows: tuple[str, ...] = option(
        ROWS,
        "Rows of the table, by comma: dense, top-1, top-2, dynmoe, dynmoe-kX (mean k held at X), and routers of the "
        "field: relu-kX, top-p-kX, expert-threshold-kX, null-experts-kX, quantile-top-1, quantile-top-2. Default: the "
        "first five, X 2.",
    )
    # 75, the last one: nothing beyond it is trained on, so the model must extrapolate
    test_domain: int = option(75, "The angle left out: 0, 15, 30, 45, 60 or 75 degrees.")
    batch_per_domain: int = 16
    experts: int = 4  # in the top-k rows always, in DynMoE's at start
    slots: int = 8  # DynMoE may grow up to these
    model: ViTConfig = field(default_factory=ViTConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        holding = tuple(row for row in self.rows if held(row))
        refuse_bad_choice("rows", self.rows, (*ROWS, "quantile-top-1", "quantile-top-2", *holding))
        check_targets(self.rows, self.experts)
        if self.test_domain not in digits.ANGLES:
            raise ValueError(f"test_domain must be one of {list(digits.ANGLES)}, got {self.test_domain!r}")
        self.refuse_below_one("batch_per_domain")

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> TrainConfig:
        """What `to_dict` gave. ValueError where a value is missing or unknown."""
        model = content.get("model")
        try:
            return super().from_dict({**content, "model": ViTConfig(**model)} if isinstance(model, dict) else content)
        except TypeError as error:
            raise ValueError(f"the configuration is of another job or version: {error}") from error

    def quick(self) -> TrainConfig:
        """One seed and fewer steps: under 40 seconds."""
        return replace(self, seeds=self.seeds[:1], steps=80, update_every=20, eval_every=20)


class DigitsTask(Task):
    """Train dense, top-1, top-2 and DynMoE on rotated digits and print how they compare on an unseen rotation."""

    command = "train"
    settings_type = TrainConfig

    def __init__(self, config: TrainConfig) -> None:
        self.settings = self.config = config
        self._data = lru_cache(maxsize=1)(lambda seed: digits.load_digits(config.test_domain, seed))

    @property
    def about(self) -> str:  # type: ignore[override]
        return f"Test domain: {self.config.test_domain} degrees. "

    def build(self, key: RunKey) -> nn.Module:
        return build_model(self.config, key.row, key.seed)

    def batches(self, key: RunKey, first_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        data = self._data(key.seed)
        for step in count(first_step):
            yield digits.batch(data, key.seed, step, self.config.batch_per_domain)

    def parts(self, key: RunKey, step: int) -> Iterator[Part]:
        data = self._data(key.seed)
        for angle, images in data.validation.items():
            yield Part(str(angle), "in", [(images.image, images.label)])
        yield Part(str(data.test_angle), "out", [(data.test.image, data.test.label)])


def build_model(config: TrainConfig, row: str, seed: int) -> ViT:
    """The model of a row. What rows have in common starts with equal weights."""
    if row == "dense":
        return ViT(config.model, seed)
    options = moe_options(row, config.experts, config.slots)
    gate = options["gate_type"]
    if gate["type"] == "cosine_top":
        gate["proj_dim"] = config.model.dim
    experts = {
        "type": "ffn",
        "num_experts_per_device": options["num_experts"],
        "hidden_size_per_expert": config.model.hidden,
        "activation_fn": nn.functional.gelu,
    }
    return ViT(
        config.model,
        seed,
        lambda _block: MoELayer(gate_type=gate, experts=experts, model_dim=config.model.dim),
    )
