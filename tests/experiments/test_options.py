"""Options come from settings fields: every command has all of them, and the registry matches tasks and extras."""

from __future__ import annotations

import configparser
import re
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dynmoe_tutel.cli import app
from dynmoe_tutel.experiments import options
from dynmoe_tutel.experiments.options import option, options_of
from dynmoe_tutel.experiments.registry import EXPERIMENTS, Experiment

COMMON = {"rows": str, "seeds": str, "steps": int, "learning-rate": float, "threads": int}
# the options that users rely on
TAKEN: dict[str, dict[str, type]] = {
    "train": {"test-domain": int},
    "experiment vision": {"test-domains": str, "data": Path, "arch": str, "weights": Path, "batch-per-domain": int,
                          "image-size": int, "workers": int, "device": str},
    "experiment language": {"task": str, "train-domains": str, "data": Path, "model": str, "layers": str, "batch": int},
    "experiment questions": {"questions": str, "language": bool, "data": Path},
}  # fmt: skip
OWN_HELP = {
    "train": ["top-2, dynmoe, dynmoe-kX (mean k held at X)", "75 degrees. Default: 75.", "under 40 seconds",
              "Optimizer steps of each run. Default: 200.", "Train dense, top-1, top-2 and DynMoE on rotated digits"],
    "experiment vision": ["top-2-of-8), dynmoe, dynmoe-kX (mean k held at X),", "Default: 0.002, with --data 3e-5.",
                          "pixels of a side. Default: 224.", "under 3 minutes", "Train a ViT on all domains but one"],
    "experiment language": ["by comma. Default: 2,4.", "editorials. Default: films,products.", "Texts per step.",
                            "CPU threads of torch. The last bits of the result depend on it. Default: 2.",
                            "under 5 minutes", "Fine-tune a BERT"],
    "experiment questions": ["by comma. Default: all, with --language those", "5, with --language 3,",
                             "under 3 minutes", "Answer what reviewers asked of DynMoE"],
}  # fmt: skip


@dataclass(frozen=True)
class Base:
    """Of a job."""

    size: int = option(3, "How large.")
    names: tuple[str, ...] = option((), "Which.")
    hidden: int = 1


@dataclass(frozen=True)
class Derived(Base):
    """Of another."""

    hidden: int = 2
    size: int = 5
    seeds: tuple[int, ...] = option((0,), "Seeds. Default: one.", options.seeds)
    where: str = option("", "A folder.", options.absolute)


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda each: each.command)
def test_commands_take_every_option_with_its_help(experiment: Experiment) -> None:
    expected = {**COMMON, **TAKEN[experiment.command]}
    taken = options_of(experiment.load().settings_type)
    assert {each.flag: each.kind for each in taken} == {f"--{name}": kind for name, kind in expected.items()}
    shown = CliRunner().invoke(app, [*experiment.command.split(), "--help"], env={"COLUMNS": "300"})
    assert shown.exit_code == 0, shown.output
    named = re.findall(r"^\W*--([a-z-]+) +\S+ +(?=\S.*[.])", shown.stdout, re.MULTILINE)
    assert sorted(named) == sorted([*expected, "quick", "out", "resume", "help"]), "every one with a sentence"
    for text in OWN_HELP[experiment.command]:
        assert text in shown.stdout


def test_registry_names_tasks_by_their_commands_and_the_packages_of_their_extras() -> None:
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[2] / "setup.cfg")
    for experiment in EXPERIMENTS:
        task = experiment.load()
        assert task.command == experiment.command
        assert task.experiment_name() == experiment.name
        assert {each.name for each in options_of(task.settings_type)} <= {
            each.name for each in fields(task.settings_type)
        }
        if experiment.packages:
            extra = setup["options.extras_require"][experiment.name].split("\n")
            assert {line.partition(">")[0] for line in extra if line} == set(experiment.packages)
    assert {each.command for each in EXPERIMENTS} == TAKEN.keys()


def test_a_field_keeps_its_help_where_its_default_is_another() -> None:
    found = {each.name: each for each in options_of(Derived)}
    assert list(found) == ["size", "names", "seeds", "where"]
    assert [each.kind for each in found.values()] == [int, str, str, Path]
    assert [each.help for each in found.values()] == [
        "How large. Default: 5.", "Which.", "Seeds. Default: one.", "A folder.",
    ]  # fmt: skip
    assert options_of(Base)[0].help == "How large. Default: 3."
    assert (Derived().size, Derived().where, Derived().seeds) == (5, "", (0,))


def test_texts_become_values_and_errors_name_the_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {each.name: each for each in options_of(Derived)}
    assert found["size"].value(4) == 4
    assert found["names"].value("a, b") == ("a", "b")
    assert [found["seeds"].value(text) for text in ("3", "1,2", "2,")] == [(0, 1, 2), (1, 2), (2,)]
    monkeypatch.chdir(tmp_path)
    assert found["where"].value(Path("data")) == str(tmp_path / "data")
    for text, message in (("0", "at least 1 and at most 1000.*got 0"), ("1001", "got 1001"), ("a", "numbers by comma")):
        with pytest.raises(ValueError, match=f"^--seeds must be .*{message}"):
            found["seeds"].value(text)
    with pytest.raises(ValueError, match="must be numbers by comma, got '1,x'"):
        options.numbers("1,x")
