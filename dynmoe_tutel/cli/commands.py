"""The command line `dynmoe-tutel`: options in, exit code out. The work is done in `experiments`.

The commands of the experiments are made from their registry, and their options from the fields of their settings.

Exit codes: 0 done, 1 something needed is missing, 2 bad input, 128 + n stopped by signal n with the state saved.
What takes time to import is imported when a command runs, so that `--help` is quick.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from inspect import Parameter, Signature, getdoc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from dynmoe_tutel.experiments.options import options_of
from dynmoe_tutel.experiments.registry import EXPERIMENTS, Experiment
from dynmoe_tutel.version import __version__

if TYPE_CHECKING:
    from dynmoe_tutel.experiments.task import Task

try:
    import typer
except ImportError:
    sys.exit("dynmoe-tutel needs typer, which is not installed: pip install 'dynmoe_tutel[experiments]'")

OUT = "Folder, new or of the same protocol, whose table grows. Default: runs/<time>."
RESUME = "Do what is left in this folder, exactly from where it stopped."

app = typer.Typer(
    name="dynmoe-tutel",
    help="DynMoE: every token chooses how many experts it activates, and training how many experts there are.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


experiment_app = typer.Typer(help="Fine-tune converted models on real data and compare the rows.", no_args_is_help=True)
app.add_typer(experiment_app, name="experiment")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dynmoe-tutel {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _add(experiment: Experiment) -> None:
    """Add the command of an experiment: --quick, --out, --resume, and one option per `option` field of its settings."""
    task = experiment.load()
    options = options_of(task.settings_type)

    def command(quick: bool, out: Path | None, resume: Path | None, **texts: Any) -> None:
        def run(console: Any) -> int:
            given = {each.name: each.value(texts[each.name]) for each in options if texts[each.name] is not None}
            return _do(task, given, quick, out, resume, console)

        _run(run)

    kinds: dict[str, Any] = {each.name: Annotated[each.kind | None, typer.Option(help=each.help)] for each in options}
    kinds["quick"] = Annotated[bool, typer.Option("--quick", help=getdoc(task.settings_type.quick))]
    kinds["out"] = Annotated[Path | None, typer.Option(help=OUT)]
    kinds["resume"] = Annotated[Path | None, typer.Option(help=RESUME)]
    command.__signature__ = Signature(  # type: ignore[attr-defined]
        [
            Parameter(name, Parameter.KEYWORD_ONLY, default=False if name == "quick" else None, annotation=kind)
            for name, kind in kinds.items()
        ]
    )
    group = experiment_app if experiment.command != experiment.name else app
    group.command(experiment.name, help=getdoc(task))(command)


def _do(
    task: type[Task], given: dict[str, Any], quick: bool, out: Path | None, resume: Path | None, console: Any
) -> int:
    from dynmoe_tutel.experiments import experiment

    if resume is None:
        return experiment.start(task(task.settings_type.of_options(given, quick)), out, console)
    moved = {name: given.pop(name) for name in task.movable if name in given}
    if given or quick or out is not None:
        names = [*given, *["quick"] * quick, *["out"] * (out is not None)]
        refused = ", ".join(f"--{name.replace('_', '-')}" for name in names)
        raise ValueError(f"--resume continues the job as it was started: leave out {refused}")
    return experiment.resume(resume, task, console, **moved)


for each in EXPERIMENTS:
    _add(each)


@app.command()
def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            help="Folder of a run, an experiment or a model of transformers, a checkpoint, or a safetensors or torch "
            "state dict."
        ),
    ],
) -> None:
    """Print slots, active experts, thresholds, load and k of every MoE layer."""

    def run(console: Any) -> int:
        from dynmoe_tutel.cli import inspection

        inspection.inspect(path, console)
        return 0

    _run(run)


@app.command()
def doctor() -> None:
    """Say what this machine can run, what is missing, and what to do about it."""

    def run(console: Any) -> int:
        from dynmoe_tutel.cli import doctor

        return 0 if doctor.report(console) else 1

    _run(run)


@app.command()
def zoo(
    folder: Annotated[Path, typer.Argument(help="Folder of a DynMoE-StableLM, -Phi-2 or -Qwen checkpoint.")],
    image: Annotated[Path | None, typer.Option(help="An image to ask about.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What to ask.")] = None,
    stats: Annotated[
        Path | None,
        typer.Option(metavar="DATA", help="File of prompts, over which k is averaged: JSON, JSON lines, or text."),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the images that DATA names. Default: DATA's.")] = None,
    max_k: Annotated[int | None, typer.Option(help="Most experts a token may activate.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of an answer. Default: 256; with --stats, no answer.")
    ] = None,
    picture: Annotated[Path, typer.Option(help="Where to draw k over the tokens.")] = Path("zoo_k.png"),
    image_tower: Annotated[
        Path | None, typer.Option(help="Folder with the image tower's config.json. Default: OpenAI's CLIP-L by name.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: the file's.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute, such as cuda. Default: the CPU.")] = None,
) -> None:
    """Ask a vision-language checkpoint of DynMoE, and show how many experts each token activates."""

    def run(console: Any) -> int:
        from dynmoe_tutel.cli import zoo as command

        setting = command.Setting(folder, image_tower, max_k, dtype, device, max_new_tokens)
        if (prompt is None) == (stats is None):
            raise ValueError("give --prompt, with --image if it is about one, or --stats")
        if stats is not None:
            return command.average_k(setting, stats, images, console)
        assert prompt is not None
        return command.ask(setting, command.Question(prompt, image), picture, console)

    _run(run)


@app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})
def run(
    arguments: Annotated[list[str], typer.Argument(metavar="SCRIPT ARGS", show_default=False)],
) -> None:
    """Run an unedited script that imports tutel, with this package's gate types, whether Tutel is installed or not.

    ARGS go to the script. -m MODULE instead of SCRIPT runs a module, as python -m does.
    """
    from dynmoe_tutel.cli.run_script import main

    raise typer.Exit(main(arguments))


def _run(command: Callable[[Any], int]) -> None:
    """Exit with what the command returns; what the user can mend becomes one line in red and exit code 1 or 2."""
    try:
        from rich.console import Console
        from rich.markup import escape
    except ImportError:
        sys.exit("dynmoe-tutel needs rich, which is not installed: pip install 'dynmoe_tutel[experiments]'")
    from dynmoe_tutel.cli.output import lasting

    try:
        code = command(Console(file=lasting(sys.stdout)))
    except (ValueError, ImportError, OSError) as error:
        message = " ".join(str(error).split())
        Console(file=lasting(sys.stderr)).print(f"[red]Error: {escape(message)}[/red]", highlight=False, soft_wrap=True)
        code = 1 if isinstance(error, ImportError) else 2
    raise typer.Exit(code)
