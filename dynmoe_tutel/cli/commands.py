"""The command line `dynmoe-tutel`: options in, exit code out. The work is done in `experiments`.

Exit codes: 0 done, 1 something needed is missing, 2 bad input, 128 + n stopped by signal n with the state saved.
Imports what a command needs only when it runs, so that `--help` is quick.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from dynmoe_tutel.version import __version__

try:
    import typer
except ImportError:
    sys.exit("dynmoe-tutel needs typer, which is not installed: pip install 'dynmoe_tutel[experiments]'")

MOST_SEEDS = 1000

app = typer.Typer(
    name="dynmoe-tutel",
    help="DynMoE: every token chooses how many experts it activates, and training how many experts there are.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


experiment_app = typer.Typer(help="Fine-tune converted models on real data and compare the rows.", no_args_is_help=True)
app.add_typer(experiment_app, name="experiment")


def main() -> None:
    """The entry point of the console script."""
    app()


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


@app.command()
def train(
    rows: Annotated[
        str | None, typer.Option(help="Rows of the table, by comma: dense, top-1, top-2, dynmoe. Default: all.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Number of seeds: 0, 1, ... Default: 3, with --quick 1.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of each run.")] = None,
    test_domain: Annotated[
        int | None, typer.Option(help="The angle left out: 0, 15, 30, 45, 60 or 75 degrees. Default: 75.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One seed and fewer steps: under 40 seconds.")] = False,
    out: Annotated[Path | None, typer.Option(help="Run folder, new or empty. Default: runs/<time>.")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the job in this run folder, exactly where it was.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of torch. The last bits of the result depend on it. Default: 1.")
    ] = None,
) -> None:
    """Train dense, top-1, top-2 and DynMoE on rotated digits and print how they compare on an unseen rotation."""

    def run(console: Any) -> int:
        from dynmoe_tutel.experiments import job
        from dynmoe_tutel.experiments.train import TrainConfig

        given = _given(
            rows=_names(rows),
            seeds=None if seeds is None else _first_seeds(seeds),
            steps=steps,
            test_domain=test_domain,
            threads=threads,
        )
        if resume is not None:
            _refuse_with_resume(given, quick, out)
            return job.resume(resume, console)
        config = TrainConfig().quick() if quick else TrainConfig()
        return job.start(replace(config, **given), out, console)

    _run(run)


Rows = Annotated[
    str | None, typer.Option(help="Rows, by comma: dense, top-K-of-E (such as top-2-of-8), dynmoe. Default: eight.")
]
Seeds = Annotated[
    str | None, typer.Option(help="Number of seeds (0, 1, ...), or seeds by comma. Default: 3, with --quick 1.")
]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps of each run.")]
LearningRate = Annotated[float | None, typer.Option(help="Of all rows.")]
Out = Annotated[
    Path | None, typer.Option(help="Folder, new or of the same protocol, whose table grows. Default: runs/<time>.")
]
Resume = Annotated[Path | None, typer.Option(help="Do what is left in this folder, exactly from where it stopped.")]


@experiment_app.command()
def language(
    rows: Rows = None,
    seeds: Seeds = None,
    steps: Steps = None,
    task: Annotated[
        str | None, typer.Option(help="sentiment (default), or a GLUE task: sst2, mnli, rte, mrpc, qqp.")
    ] = None,
    train_domains: Annotated[
        str | None, typer.Option(help="Of sentiment, by comma: films, products, tweets, editorials.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Texts on this machine: archive or folder; of GLUE tasks saved data sets.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A model's folder or name on the hub, instead of the default.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers whose FFNs become experts, by comma. Default: 2,4.")
    ] = None,
    learning_rate: LearningRate = None,
    batch: Annotated[int | None, typer.Option(help="Texts of a step.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of torch. Default: 2.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Three rows, one seed, fewer steps: under 5 minutes.")] = False,
    out: Out = None,
    resume: Resume = None,
) -> None:
    """Fine-tune a BERT, dense and as fixed-k and DynMoE mixtures, and test it in domain and out of domain."""

    def run(console: Any) -> int:
        from dynmoe_tutel.experiments import experiment
        from dynmoe_tutel.experiments.language.task import LanguageConfig, LanguageTask

        given = _given(
            rows=_names(rows),
            seeds=_seeds(seeds),
            steps=steps,
            task=task,
            train_domains=_names(train_domains),
            data=None if data is None else str(data.absolute()),
            model=model,
            layers=None if layers is None else _numbers("layers", layers),
            learning_rate=learning_rate,
            batch=batch,
            threads=threads,
        )
        if resume is not None:
            where = given.pop("data", "")  # the texts may have moved; all else is as it was started
            _refuse_with_resume(given, quick, out)
            return experiment.resume(resume, lambda _, settings: LanguageTask.of(settings, where), console)
        config = LanguageConfig().quick() if quick else LanguageConfig()
        return experiment.start(LanguageTask(replace(config, **given)), out, console)

    _run(run)


@experiment_app.command()
def vision(
    rows: Rows = None,
    seeds: Seeds = None,
    test_domains: Annotated[
        str | None,
        typer.Option(help="Domains left out, each in runs of its own, by comma. Default: all; of the digits 0,75."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Images as DATA/<domain>/<class>/<image>. Default: rotated digits.")
    ] = None,
    arch: Annotated[
        str | None, typer.Option(help="With --data: a ViT of timm. Default: deit_small_patch16_224.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="With --data: pretrained weights of it, .safetensors or .pth.")
    ] = None,
    steps: Steps = None,
    learning_rate: LearningRate = None,
    batch_per_domain: Annotated[int | None, typer.Option(help="Images of a step from each training domain.")] = None,
    image_size: Annotated[int | None, typer.Option(help="With --data: pixels of a side. Default: 224.")] = None,
    workers: Annotated[int | None, typer.Option(help="With --data: processes that read images.")] = None,
    device: Annotated[
        str | None, typer.Option(help="With --data: cuda or cpu. Default: cuda where there is one.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of torch. Default: 1.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="One seed, one test domain, fewer steps: of the digits under 3 minutes.")
    ] = False,
    out: Out = None,
    resume: Resume = None,
) -> None:
    """Train a ViT on all domains but one, dense and as fixed-k and DynMoE mixtures, and test it on the one left out."""

    def run(console: Any) -> int:
        from dynmoe_tutel.experiments import experiment
        from dynmoe_tutel.experiments.vision.task import VisionTask, make_config

        given = _given(
            rows=_names(rows),
            seeds=_seeds(seeds),
            test_domains=_names(test_domains),
            data=data,
            arch=arch,
            weights=None if weights is None else str(weights.absolute()),
            steps=steps,
            learning_rate=learning_rate,
            batch_per_domain=batch_per_domain,
            image_size=image_size,
            workers=workers,
            device=device,
            threads=threads,
        )
        if resume is not None:
            _refuse_with_resume(given, quick, out)
            return experiment.resume(resume, lambda _, settings: VisionTask.of(settings), console)
        return experiment.start(VisionTask(make_config(given, quick)), out, console)

    _run(run)


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


@app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})
def run(
    arguments: Annotated[list[str], typer.Argument(metavar="SCRIPT ARGS", show_default=False)],
) -> None:
    """Run an unedited script that imports tutel, with this package's gate types, whether Tutel is installed or not.

    ARGS go to the script. -m MODULE instead of SCRIPT runs a module, as python -m does.
    """
    from dynmoe_tutel.cli.run_script import run

    _run(lambda console: run(arguments))


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def _refuse_with_resume(given: dict[str, Any], quick: bool, out: Path | None) -> None:
    if given or quick or out is not None:
        names = [*given, *["quick"] * quick, *["out"] * (out is not None)]
        options = ", ".join(f"--{name.replace('_', '-')}" for name in names)
        raise ValueError(f"--resume continues the job as it was started: leave out {options}")


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(name.strip() for name in text.split(","))


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise ValueError(f"--{option} must be numbers by comma, got {text!r}") from None


def _seeds(text: str | None) -> tuple[int, ...] | None:
    """ "3" is 0, 1, 2; "1,2" is 1, 2; "2," is 2 alone."""
    if text is None:
        return None
    numbers = _numbers("seeds", text.rstrip(","))
    if "," in text:
        return numbers
    return _first_seeds(numbers[0])


def _first_seeds(number: int) -> tuple[int, ...]:
    if not 1 <= number <= MOST_SEEDS:
        raise ValueError(f"--seeds must be at least 1 and at most {MOST_SEEDS}, a number of seeds, got {number}")
    return tuple(range(number))


def _run(command: Callable[[Any], int]) -> None:
    """Exit with what the command returns; what the user can mend becomes one line in red and exit code 1 or 2."""
    try:
        from rich.console import Console
        from rich.markup import escape
    except ImportError:
        sys.exit("dynmoe-tutel needs rich, which is not installed: pip install 'dynmoe_tutel[experiments]'")
    try:
        code = command(Console())
    except (ValueError, ImportError, OSError) as error:
        message = " ".join(str(error).split())
        Console(stderr=True).print(f"[red]Error: {escape(message)}[/red]", highlight=False, soft_wrap=True)
        code = 1 if isinstance(error, ImportError) else 2
    raise typer.Exit(code)
