"""The experiment `questions`: its settings, its runs, and what is timed beside them.

The data are those of another experiment: `train`'s rotated digits, or with `--language` the sentences of `language`.
Every variant shares seeds, batches, steps, optimizer and learning rate with the others. On the digits experts start
from random weights as in `train`; variants that are `tuned` start from a dense model that was trained on the training
images at other angles.
"""

from __future__ import annotations

import copy
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynmoe_tutel import MoELayer
from dynmoe_tutel.adaptive.controller import ExpertController
from dynmoe_tutel.experiments import options
from dynmoe_tutel.experiments.language.task import LanguageConfig, LanguageTask
from dynmoe_tutel.experiments.options import absolute, option
from dynmoe_tutel.experiments.questions import page, timing
from dynmoe_tutel.experiments.questions.catalogue import NUMBERS, OF_TEXTS, question
from dynmoe_tutel.experiments.questions.plain import PlainTopK
from dynmoe_tutel.experiments.questions.variants import PLAIN, ROUTED_EXPERTS, VARIANTS, K, Variant
from dynmoe_tutel.experiments.task import Part, RunKey, Settings, Task
from dynmoe_tutel.experiments.vision import digits
from dynmoe_tutel.experiments.vision.digits_task import DigitsTask, TrainConfig
from dynmoe_tutel.experiments.vision.vit import ViT, seeded

MOST_TURNED = -15  # the first angle of the images that a dense model is trained on before it is tuned


@dataclass(frozen=True)
class QuestionsConfig(Settings):
    """What decides a job's results; the defaults are those of the digits. ValueError for values out of range."""

    questions: tuple[int, ...] = option(
        NUMBERS, "Numbers of the questions, by comma. Default: all, with --language those that texts answer."
    )
    rows: tuple[str, ...] = option((), "Train these variants alone, by comma. Default: all that the questions need.")
    seeds: tuple[int, ...] = option(
        (0, 1, 2, 3, 4),
        "Number of seeds (0, 1, ...), or seeds by comma. Default: 5, with --language 3, with --quick 1.",
        options.seeds,
    )
    steps: int = option(200, "Optimizer steps of each run. Default: 200, with --language 100.")
    learning_rate: float = option(2e-3, "Learning rate, the same for all. Default: 0.002, with --language 0.0002.")
    language: bool = option(False, "Fine-tune a text model, as `experiment language`, and not on the digits.")
    data: str = option("", "With --language: the texts on this machine, archive or folder.", absolute)
    experts: int = 4
    slots: int = 16
    rounds: int = 40  # of what is timed, each of one step of everything that is compared

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_below_one("rounds")
        if not isinstance(self.language, bool):
            raise ValueError(f"language must be true or false, got {self.language!r}")
        if self.data and not self.language:
            raise ValueError("data is about the texts of --language: leave data out, or add --language")
        unknown = [number for number in self.questions if number not in NUMBERS]
        if unknown or not self.questions or len(set(self.questions)) < len(self.questions):
            raise ValueError(
                f"questions must be different ones of {NUMBERS[0]} to {NUMBERS[-1]}, got {list(self.questions)}"
            )
        if self.language and (others := [number for number in self.questions if number not in OF_TEXTS]):
            raise ValueError(
                f"questions {', '.join(map(str, others))} are not answered by texts (a text model is always tuned, and "
                f"a layer's time depends on no data): give some of {', '.join(map(str, OF_TEXTS))}, or no --language"
            )
        refused = [row for row in self.rows if row not in VARIANTS]
        if refused or len(set(self.rows)) < len(self.rows):
            raise ValueError(f"rows must be different ones of {', '.join(VARIANTS)}, got {', '.join(self.rows)}")
        if unasked := [row for row in self.rows if row not in self.needed]:
            asking = [n for n in NUMBERS if unasked[0] in question(n).variants]
            of_digits = self.language and VARIANTS[unasked[0]].tuned  # see `needed`
            raise ValueError(
                f"rows: {', '.join(unasked)} is in none of the questions {', '.join(map(str, self.questions))}"
                f"{' of --language' if of_digits else ''}: leave it out"
                + ("" if of_digits or not asking else f", or ask one of {', '.join(map(str, asking))}")
            )

    @property
    def needed(self) -> list[str]:
        """The variants that the questions train, in the order of `VARIANTS`."""
        asked = {name for number in self.questions for name in question(number).variants}
        # a text model is always tuned: that is what the variants that are not so named do there
        return [name for name, v in VARIANTS.items() if name in asked and not (v.tuned and self.language)]

    @classmethod
    def of_options(cls, given: Mapping[str, Any], quick: bool) -> QuestionsConfig:
        """With the defaults of the text model where --language is given."""
        config = cls()
        if given.get("language"):
            config = replace(
                config,
                language=True,
                questions=OF_TEXTS,
                seeds=(0, 1, 2),
                steps=100,
                learning_rate=2e-4,
                update_every=20,
                eval_every=50,
                experts=8,
            )
        return replace(config.quick() if quick else config, **given)

    def quick(self) -> QuestionsConfig:
        """One seed and few steps, which shows the page and answers nothing: on the digits under 3 minutes."""
        return replace(self, seeds=self.seeds[:1], steps=20, update_every=5, log_every=5, eval_every=10, rounds=5)


class QuestionsTask(Task):
    """Answer what reviewers asked of DynMoE by runs that differ in one thing each, and write a page of the answers."""

    command = "experiment questions"
    settings_type = QuestionsConfig
    axes = ("questions", "rows", "seeds")
    identity = ("texts",)
    movable = ("data",)
    keep_weights = False
    checkpoints = False  # a run takes seconds, or with --language a checkpoint half a gigabyte

    def __init__(self, config: QuestionsConfig) -> None:
        self.settings = self.config = config
        self.inner: DigitsTask | LanguageTask = _language(config) if config.language else _digits(config)
        self._trained_dense = lru_cache(maxsize=1)(self._train_dense)

    @classmethod
    def of(cls, content: Mapping[str, Any], data: str = "", **moved: Any) -> QuestionsTask:
        """With the texts at `data`."""
        return super().of(content, data=data, **moved)

    @property
    def resume_options(self) -> str:  # type: ignore[override]
        """Where the texts are: no folder remembers it."""
        return f" --data {shlex.quote(self.config.data)}" if self.config.data else ""

    @property
    def variants(self) -> list[Variant]:
        """Those to be trained, in the order of `VARIANTS`."""
        return [VARIANTS[name] for name in self.config.needed if not self.config.rows or name in self.config.rows]

    @property
    def plan(self) -> list[RunKey]:
        return [RunKey(variant.name, seed) for seed in self.config.seeds for variant in self.variants]

    def protocol(self) -> dict[str, Any]:
        content = super().protocol()
        del content["data"]  # the texts count, not where they lie
        return {**content, "texts": self.inner.corpus.summary()} if isinstance(self.inner, LanguageTask) else content

    def build(self, key: RunKey) -> nn.Module:
        """The model of a variant. What variants have in common starts with equal weights."""
        variant = VARIANTS[key.row]
        if isinstance(self.inner, LanguageTask):
            model = self.inner.build(RunKey("dense", key.seed))
            if not variant.is_dense:
                self._convert(model, variant, key.seed, list(self.inner.config.layers))
        elif variant.tuned:
            model = copy.deepcopy(self._trained_dense(key.seed))
            if not variant.is_dense:
                self._convert(model, variant, key.seed, list(self.inner.config.model.moe_blocks))
        else:
            model = self._from_scratch(variant, key.seed, self.inner.config.model)
        return variant.finish_model(model)

    def batches(self, key: RunKey, first_step: int) -> Iterator[tuple[Any, Tensor]]:
        return self.inner.batches(key, first_step)

    def parts(self, key: RunKey, step: int) -> Iterable[Part]:
        return self.inner.parts(key, step)

    def logits(self, model: nn.Module, inputs: Any) -> Tensor:
        return self.inner.logits(model, inputs)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return self.inner.optimizer(model)

    def controller(self, key: RunKey, model: nn.Module, optimizer: torch.optim.Optimizer) -> ExpertController | None:
        return VARIANTS[key.row].controller(model, optimizer, self.config, key.seed)

    def seconds_beside_runs(self, path: Path) -> float:
        return timing.seconds(self, path)

    def measure(self, path: Path, stop_request: Callable[[], int | None]) -> None:
        timing.measure(self, path, stop_request)

    def report(self, path: Path, console: Any) -> bool:
        page.write(self, path, console)
        return True

    def _from_scratch(self, variant: Variant, seed: int, model: Any) -> nn.Module:
        if variant.is_dense:
            return ViT(model, seed)
        if variant.name == PLAIN:
            return ViT(model, seed, lambda _block: PlainTopK(model.dim, model.hidden, ROUTED_EXPERTS, K))
        options = variant.layer_options(self.config.experts, self.config.slots)
        gate = options.pop("gate_type")
        if gate["type"] == "cosine_top":
            gate["proj_dim"] = model.dim
        experts = {
            "type": "ffn",
            "num_experts_per_device": options.pop("num_experts"),
            "hidden_size_per_expert": model.hidden,
            "activation_fn": nn.functional.gelu,
        }
        return ViT(
            model,
            seed,
            lambda _block: MoELayer(gate_type=gate, experts=experts, model_dim=model.dim, **options),
        )

    def _convert(self, model: nn.Module, variant: Variant, seed: int, layers: list[int]) -> None:
        """Turn MLPs of a dense model into experts that are copies of them."""
        from dynmoe_tutel.convert import convert

        options = variant.layer_options(self.config.experts, self.config.slots)
        seeded(seed, 1, lambda: convert(model, layers=layers, recipe="gmoe", **options))

    def _train_dense(self, seed: int) -> nn.Module:
        """The dense model of the seed, trained as long as a run on its training images turned the other way."""
        assert isinstance(self.inner, DigitsTask)
        config = self.inner.config
        data = digits.load_digits(config.test_domain, seed)
        turned = {angle: digits.at_angle(images, MOST_TURNED - angle) for angle, images in data.train.items()}
        data = replace(data, train=turned)
        model = ViT(config.model, seed)
        optimizer = self.inner.optimizer(model)
        for step in range(config.steps):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * self.learning_rate_share(step)
            image, label = digits.batch(data, seed, step, config.batch_per_domain)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(image), label).backward()
            optimizer.step()
        return model


SHARED = ("seeds", "steps", "learning_rate", "update_every", "log_every", "eval_every", "threads", "experts", "slots")


def _digits(config: QuestionsConfig) -> DigitsTask:
    return DigitsTask(TrainConfig(**{name: getattr(config, name) for name in SHARED}))


def _language(config: QuestionsConfig) -> LanguageTask:
    return LanguageTask(LanguageConfig(data=config.data, **{name: getattr(config, name) for name in SHARED}))
