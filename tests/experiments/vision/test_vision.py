"""The experiment: the held-out domain never reaches training, selection or controller; resume, merge, refusals."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import picture_tree
import pytest
import torch
from rich.console import Console
from torch import Tensor
from torchvision_stand_in import import_timm
from typer.testing import CliRunner

from dynmoe_tutel.checkpoint import read_checkpoint
from dynmoe_tutel.cli import app
from dynmoe_tutel.experiments import experiment
from dynmoe_tutel.experiments.report import plots
from dynmoe_tutel.experiments.report.table import summarise
from dynmoe_tutel.experiments.run_folder import checkpoints_of
from dynmoe_tutel.experiments.runner import Run
from dynmoe_tutel.experiments.task import RunKey
from dynmoe_tutel.experiments.vision import task as vision
from dynmoe_tutel.experiments.vision.digits import RotatedDigits
from dynmoe_tutel.experiments.vision.task import VisionConfig, VisionTask

ESTIMATE = experiment.estimate  # the tests replace it
TINY = VisionConfig(
    rows=("dense", "dynmoe"),
    seeds=(0,),
    test_domains=("75",),
    steps=8,
    batch_per_domain=2,
    experts=2,
    slots=4,
    update_every=2,
    log_every=2,
    eval_every=4,
)


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    """Skip plots and estimates."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw", lambda *_: {})
        patch.setattr(experiment, "estimate", lambda *_: 0.0)
        yield


@pytest.fixture(autouse=True)
def _global_state() -> Iterator[None]:
    random = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), random)


def done(path: Path, config: VisionConfig = TINY) -> Path:
    assert experiment.start(VisionTask(config), path, Console(file=io.StringIO())) == 0
    return path


def lines(path: Path, kind: str) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in line.items() if name != "step_ms"}
        for line in experiment.read_runs(path)[0]
        if line["kind"] == kind
    ]


def end(path: Path, run: str) -> dict[str, Any]:
    """The gates and masks in a run's last checkpoint."""
    return dict(read_checkpoint(checkpoints_of(path / "runs" / run, run)[-1])["model"])


def assert_same_training(actual: Path, expected: Path) -> None:
    assert lines(actual, "train") == lines(expected, "train")
    assert experiment.read_runs(actual)[1] == experiment.read_runs(expected)[1]
    for run in sorted(folder.name for folder in (expected / "runs").iterdir()):
        first, second = end(actual, run), end(expected, run)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def whole(_quick: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return done(tmp_path_factory.mktemp("whole") / "job")


class Spoilt(RotatedDigits):
    """The held-out domain's images are noise and its labels all 0."""

    def images(self, domain: str, index_B: Tensor) -> Tensor:
        images = super().images(domain, index_B)
        if domain == "75":
            return torch.rand(images.shape, generator=torch.Generator().manual_seed(1))
        return images

    def labels(self, domain: str) -> Tensor:
        return super().labels(domain) * (domain != "75")


def test_the_domain_left_out_reaches_neither_training_nor_selection_nor_controller(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With any images and labels there, everything except its own accuracy is bitwise the same."""
    monkeypatch.setattr(vision, "RotatedDigits", Spoilt)
    spoilt = done(tmp_path / "spoilt")
    assert_same_training(spoilt, whole)
    assert experiment.read_runs(whole)[1], "the tiny job is chosen so that experts change"
    pairs = list(zip(lines(spoilt, "eval"), lines(whole, "eval"), strict=True))
    assert all(first["validation_accuracy"] == second["validation_accuracy"] for first, second in pairs)
    assert any(first["out_accuracy"] != second["out_accuracy"] for first, second in pairs)
    chosen = [summarise(experiment.read_runs(path)[0], TINY.rows, 8, "validation") for path in (spoilt, whole)]
    for first, second in zip(*chosen, strict=True):
        assert first.in_accuracy == second.in_accuracy
        assert first.experts_end == second.experts_end


def test_evaluation_forwards_are_not_recorded(whole: Path, tmp_path: Path) -> None:
    """Evaluating after every step, inside the record windows, changes neither training nor growth."""
    assert_same_training(done(tmp_path / "often", replace(TINY, eval_every=1)), whole)


def test_training_reads_training_images_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    task = VisionTask(replace(TINY, test_domains=("30",)))
    asked: list[tuple[str, list[int]]] = []

    def training_images(domain: str, index_B: Tensor, streams: Sequence[int]) -> Tensor:
        asked.append((domain, index_B.tolist()))
        return RotatedDigits.images(task.data, domain, index_B)  # type: ignore[arg-type]

    monkeypatch.setattr(task.data, "training_images", training_images)
    for _ in task.batches(RunKey("dense", 0, "30"), 0):
        pass
    split = task._leave_out(0, "30")
    assert {domain for domain, _ in asked} == {"0", "15", "45", "60", "75"}
    for domain, index in asked:
        assert set(index) <= set(split.training[domain].tolist())
        assert not set(index) & set(split.validation[domain].tolist())


def test_every_domain_of_a_tree_is_left_out_in_turn(tmp_path: Path) -> None:
    config = VisionConfig.of_options(
        {"data": picture_tree.write_tree(tmp_path / "PACS"), "seeds": (0,), "image_size": 16}, False
    )
    assert [key.test for key in VisionTask(config).plan if key.row == "dynmoe"] == ["art", "photo", "sketch"]
    assert (config.steps, config.learning_rate, config.constant_rate) == (5000, 3e-5, True)


def test_parts_are_validation_images_and_the_target() -> None:
    task = VisionTask(TINY)
    parts = {part.name: part for part in task.parts(RunKey("dense", 0, "75"), 0)}
    assert [part.kind for part in parts.values()] == ["validation"] * 5 + ["out"]
    split = task._leave_out(0, "75")
    for name, part in parts.items():
        index = split.target["75"] if name == "75, left out" else split.validation[name]
        assert sum(len(label) for _, label in part.batches) == len(index)


def test_ctrl_c_inside_a_window_and_resume_is_the_uninterrupted_job(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, train_step = tmp_path / "job", Run.train_step

    def interrupted(run: Run) -> None:
        train_step(run)
        if run.row == "dynmoe" and run.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Run, "train_step", interrupted)
    console = Console(file=io.StringIO(), width=200)
    assert experiment.start(VisionTask(TINY), folder, console) == 130
    assert "experiment vision --resume" in console.file.getvalue()  # type: ignore[attr-defined]
    monkeypatch.setattr(Run, "train_step", train_step)
    assert experiment.resume(folder, VisionTask, console) == 0
    assert_same_training(folder, whole)
    assert lines(folder, "eval") == lines(whole, "eval")


def test_rows_seeds_and_test_domains_merge_in_any_order(whole: Path, tmp_path: Path) -> None:
    folder = done(tmp_path / "job", replace(TINY, rows=("dynmoe",)))
    done(folder, replace(TINY, rows=("dense",), test_domains=("0",)))
    done(folder, TINY)
    runs = sorted(path.name for path in (folder / "runs").iterdir())
    assert runs == ["dense-seed0-0", "dense-seed0-75", "dynmoe-seed0-75"]
    assert [line for line in lines(folder, "eval") if line["test"] == "75"] == lines(whole, "eval")
    dense = summarise(experiment.read_runs(folder)[0], ("dense",), 8, "validation")[0]
    assert {"0", "0, left out", "75", "75, left out"} <= set(dense.parts), "validation and target are not mixed"
    with pytest.raises(ValueError, match=r"another protocol.*batch_per_domain: 2 there, 3 now"):
        done(folder, replace(TINY, batch_per_domain=3))


def test_rows_start_as_the_dense_model_computes() -> None:
    """A row's experts are copies of the dense FFN, and everything else starts equal too."""
    task = VisionTask(TINY)
    image = task.data.images("0", torch.arange(20))
    with torch.no_grad():
        dense = task.build(RunKey("dense", 0, "75"))(image)
        for row in ("top-2-of-4", "dynmoe"):
            model = task.build(RunKey(row, 0, "75")).eval()  # in eval every token is routed
            assert torch.allclose(model(image), dense, atol=1e-5), row


@pytest.mark.parametrize("steps", [1, 2])
def test_jobs_of_fewer_steps_than_are_timed_have_an_estimate(steps: int) -> None:
    """Regression: a task has batches only for its steps, and the third ended in StopIteration."""
    task = VisionTask(replace(TINY, steps=steps))
    assert ESTIMATE(task, task.plan[:1]) > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"test_domains": ("20",)}, "different ones of 0, 15, 30, 45, 60, 75, got 20"),
        ({"rows": ("top-9-of-8",)}, "K at most E"),
        ({"experts": 20}, r"experts must be at most slots \(16\), got 20"),
        ({"arch": "vit_tiny_patch16_224"}, "arch is about a tree of images"),
        ({"weights": "w.pth"}, "weights is about a tree of images"),
        ({"workers": -1}, "workers is about a tree of images"),
        ({"drop_path": 1.0}, "drop_path must be at least 0 and below 1, got 1.0"),
        ({"data": Path("nowhere")}, "nowhere is not a folder"),
        ({"device": "cuda"}, "device is about a tree of images"),
    ],
)
def test_bad_choices_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisionConfig.of_options(given, False)


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "meta", ""])
def test_a_device_that_is_not_here_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match=f"device must be one that .*{device}"):
        VisionConfig(device=device)


def test_a_tree_of_images_with_a_model_of_timm_from_the_command_line(tmp_path: Path) -> None:
    """A small PACS: fine-tuned from a local file, resumed by name, and refused with other files."""
    timm = import_timm()
    tree = picture_tree.write_tree(tmp_path / "PACS")
    weights = tmp_path / "weights.pth"
    with torch.random.fork_rng(devices=[]):
        torch.save({"model": timm.create_model("vit_tiny_patch16_224", img_size=32).state_dict()}, weights)
    out = tmp_path / "job"
    options = f"--data {tree} --arch vit_tiny_patch16_224 --weights {weights} --image-size 32 --out {out} --workers 0"
    few = "--rows dense,dynmoe --seeds 1 --steps 2 --batch-per-domain 2 --test-domains sketch --device cpu"
    ran = CliRunner().invoke(app, ["experiment", "vision", *options.split(), *few.split()])
    assert ran.exit_code == 0, ran.output
    evaluations = lines(out, "eval")
    assert {line["test"] for line in evaluations} == {"sketch"}
    assert list(evaluations[-1]["parts"]) == ["art", "photo", "sketch, left out"]
    assert set(evaluations[-1]["parts"]["sketch, left out"]["k"]) == {"blocks.8.mlp", "blocks.10.mlp"}
    assert CliRunner().invoke(app, ["experiment", "vision", "--resume", str(out)]).exit_code == 0
    (tree / "art" / "dog" / "pic_001.jpg").unlink()
    refused = CliRunner().invoke(app, ["experiment", "vision", "--resume", str(out)])
    assert refused.exit_code == 2
    assert "files_digest" in refused.output
