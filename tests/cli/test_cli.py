"""The command line: its output and exit codes; bad input gives one line and no traceback."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PATIENCE
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner, Result

from dynmoe_tutel import __version__, moe
from dynmoe_tutel.cli import app, doctor, inspection
from dynmoe_tutel.experiments.run_folder import EVENTS, METRICS, checkpoints_of, read_log
from dynmoe_tutel.metrics import RoutingMeter

FILES = {"config.json", "runs", "table.md", "table.json", "accuracy.png", "experts.png", "k_histogram.png", "load.png",
         "trade_off.png"}  # fmt: skip
OF_RUN = {"config.json", METRICS, EVENTS, "checkpoints"}


def call(*arguments: str | Path) -> Result:
    """Run the command in this process; unexpected exceptions propagate."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "100"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(*arguments: str | Path) -> str:
    """The one-line error message."""
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("Error: ")
    return result.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a real, short job."""
    folder = tmp_path_factory.mktemp("cli") / "new" / "run"
    options = ["--rows", "top-1,dynmoe", "--seeds", "1", "--steps", "6", "--test-domain", "0", "--out", str(folder)]
    result = call("train", *options)
    assert result.exit_code == 0, result.output
    assert "Best out of domain" in result.stdout
    assert "Test domain: 0 degrees" in result.stdout
    return folder


def test_version_and_help() -> None:
    assert call("--version").stdout == f"dynmoe-tutel {__version__}\n"
    text = call("--help").stdout
    assert all(command in text for command in ("train", "inspect", "doctor"))
    done = subprocess.run(
        [sys.executable, "-m", "dynmoe_tutel", "--version"], capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.returncode, done.stdout) == (0, f"dynmoe-tutel {__version__}\n"), done.stderr


def test_train_leaves_everything_in_its_folder(run: Path) -> None:
    assert {path.name for path in run.iterdir()} == FILES
    runs = [run / "runs" / name for name in ("top-1-seed0", "dynmoe-seed0")]
    assert set((run / "runs").iterdir()) == set(runs)
    for folder in runs:
        assert {path.name for path in folder.iterdir()} - {"tensorboard"} == OF_RUN
    config = json.loads((run / "config.json").read_text())
    assert config["torch"] == torch.__version__
    protocol = config["protocol"]
    assert (config["experiment"], protocol["steps"], protocol["test_domain"]) == ("train", 6, 0)
    for folder, row in zip(runs, ("top-1", "dynmoe"), strict=True):
        assert json.loads((folder / "config.json").read_text())["axes"] == {"rows": ["top-1", "dynmoe"], "seeds": [0]}
        lines = read_log(folder, METRICS)
        assert [(line["row"], line["step"]) for line in lines if line["kind"] == "eval"] == [(row, 0), (row, 6)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--rows", "dense,best"],
            "rows must be different ones of dense, top-1, top-2, dynmoe, dynmoe-k2, quantile-top-1, quantile-top-2, "
            "got dense, best",
        ),
        (["--rows", ""], "rows must be"),
        (["--seeds", "0"], "--seeds must be at least 1 and at most 1000, a number of seeds, got 0"),
        (["--seeds", "99999999999"], "--seeds must be at least 1 and at most 1000, a number of seeds, got 99999999999"),
        (["--steps", "-5"], "steps must be an integer of at least 1, got -5"),
        (["--test-domain", "10"], "test_domain must be one of [0, 15, 30, 45, 60, 75], got 10"),
        (["--threads", "0"], "threads must be an integer of at least 1, got 0"),
        (["--threads", "100000"], "threads must be at most 1024, got 100000"),
        (["--resume", "x", "--steps", "5", "--quick"], "leave out --steps, --quick"),
        (["--resume", "nowhere"], "nowhere is not a run folder: it has no config.json"),
    ],
)
def test_bad_options_give_one_line(options: list[str], message: str, tmp_path: Path) -> None:
    arguments = options if "--resume" in options else [*options, "--out", str(tmp_path / "run")]
    assert message in refused("train", *arguments)
    assert not (tmp_path / "run").exists()


def test_train_refuses_a_folder_that_is_taken(run: Path, tmp_path: Path) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    assert "holds runs of another protocol" in refused("train", "--out", run)
    assert "holds a job of 'train', not of 'vision'" in refused("experiment", "vision", "--out", run)
    assert "is not empty and holds no experiment: name another" in refused("train", "--out", run / "runs")
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*")) == before
    taken = tmp_path / "file"
    taken.write_text("")
    assert f"folder {taken} cannot be written: File exists" in refused("train", "--out", taken)


def test_train_refuses_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "run"
    assert f"folder {below} cannot be written: Not a directory" in refused("train", "--out", below)
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o500)
    if not os.access(closed, os.W_OK):  # a superuser may write anywhere
        assert "cannot be written: permission denied" in refused("train", "--out", closed / "run")


def test_resume_refuses_what_is_no_job(run: Path, tmp_path: Path) -> None:
    """Damaged configurations are refused, in today's layout ("protocol") and the earlier one ("job")."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    config = json.loads((folder / "config.json").read_text())
    settings = {**config["protocol"], "rows": ["dense"], "seeds": [0]}
    for content, message in [
        ("{", "is not valid JSON"),
        ("[]", "does not hold a configuration"),
        ("{}", "holds no job of 'train'"),
        *[
            (json.dumps({**config, key: content}), message)
            for key, whole in (("protocol", config["protocol"]), ("job", settings))
            for content, message in (
                ({"steps": 3}, "of another job or version"),
                ({**whole, "steps": "3"}, "steps must be an integer"),
                ({**whole, "model": {"width": 3}}, "of another job or version"),
            )
        ],
        (json.dumps({**config, "job": {**settings, "rows": 3}}), "of another job or version"),
    ]:
        (folder / "config.json").write_text(content)
        assert message in refused("train", "--resume", folder)
    (folder / "config.json").write_text(json.dumps(config))
    assert "holds a job of 'train', not of 'vision'" in refused("experiment", "vision", "--resume", folder)
    of_run = folder / "runs" / "dynmoe-seed0" / "config.json"
    of_run.write_text(json.dumps({**json.loads(of_run.read_text()), "axes": {"rows": 3, "seeds": [0]}}))
    assert "has a run whose config.json has no axes" in refused("train", "--resume", folder)


def test_resume_of_a_finished_job_prints_the_table(run: Path) -> None:
    result = call("train", "--resume", run)
    assert result.exit_code == 0
    assert "dynmoe-seed0: done before" in result.stdout
    assert "Best out of domain" in result.stdout


def test_inspect_prints_every_layer_of_a_run_and_of_a_checkpoint(run: Path) -> None:
    whole = call("inspect", run).stdout
    assert all(f"{name}, step 6" in whole for name in ("top-1-seed0", "dynmoe-seed0"))
    last = [line for line in read_log(run / "runs" / "dynmoe-seed0", METRICS) if line["kind"] == "eval"][-1]
    folder = checkpoints_of(run / "runs" / "dynmoe-seed0", "dynmoe-seed0")[-1]
    for path in (folder, folder.parent):
        text = call("inspect", path).stdout
        assert "top-1" not in text
        for name, layer in last["layers"].items():
            assert f"{name}: {layer['experts']} of 8 slots active, mean k {layer['k']:.2f}" in text
            cells = text.split(name)[1].split("blocks")[0].split()
            assert f"{layer['load'][0]:.1%}" in cells
            assert cells.count("yes") == layer["experts"]
            assert cells.count("no") == 8 - layer["experts"]


def some_model() -> nn.Module:
    torch.manual_seed(0)
    experts = {"type": "ffn", "num_experts_per_device": 3, "hidden_size_per_expert": 4}
    model = nn.Module()
    for name, gate in [
        ("any", {"type": "top_any", "max_expert_num": 5}),
        ("warm", {"type": "gated_multi_gate_t", "max_expert_num": 5}),
        ("top", {"type": "top", "k": 2}),
        ("cosine", {"type": "cosine_top", "k": 1}),
    ]:
        layer = moe.moe_layer(gate_type=gate, experts=experts, model_dim=8)
        setattr(model, name, layer)
        gates: Any = layer.gates[0]
        if name in ("any", "warm"):
            with torch.no_grad():
                gates.gates[:3] = torch.tensor([0.0, 0.3, -0.2])
    return model


def test_inspect_reads_any_state_dict_with_such_layers(tmp_path: Path) -> None:
    model = some_model()
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    torch.save({"model": model.state_dict()}, tmp_path / "model.pt")
    for path in tmp_path.iterdir():
        text = call("inspect", path).stdout
        parts = dict(zip(["any", "cosine", "top", "warm"], re.split(r"\n  (?=\w+:)", text)[1:], strict=True))
        assert parts["any"].startswith("any: 3 of 5 slots active, k not stored, load not stored")
        assert parts["top"].startswith("top: 3 of 3 slots active")
        assert parts["cosine"].startswith("cosine: 3 of 3 slots active")
        # sigmoid(0.3) and, with upstream's temperature of 10, sigmoid(3)
        assert "0.574" in parts["any"]
        assert "0.953" in parts["warm"]
        assert "threshold" not in parts["top"] + parts["cosine"]


def test_inspect_sorts_layers_by_their_numbers() -> None:
    keys = [f"blocks.{block}.mlp.gates.0.sim_matrix" for block in (10, 9, 1)]
    names = [layer.name for layer in inspection.layers_in(dict.fromkeys(keys, torch.ones(4, 2)))]
    assert names == ["blocks.1.mlp", "blocks.9.mlp", "blocks.10.mlp"]


def test_inspect_agrees_with_the_layers_own_routing() -> None:
    model = some_model()
    layers = {layer.name: layer for layer in inspection.layers_in(model.state_dict())}
    for name in ("any", "warm"):
        routing = getattr(model, name).route(torch.randn(4, 8))
        assert layers[name].thresholds == pytest.approx(routing.thresholds.tolist())
        assert layers[name].active == [True, True, True, False, False]


def test_inspect_prints_what_a_budget_holds(tmp_path: Path) -> None:
    """The shift, as far as weights tell; a checkpoint of the job knows the target and k too."""
    gate = {"type": "top_any", "max_expert_num": 4, "budget": {"target_k": 2.5}}
    model = torch.nn.ModuleDict(
        {"a": moe.moe_layer(gate, 8, {"num_experts_per_device": 4, "hidden_size_per_expert": 4})}
    )
    model["a"].gates[0].budget_shift.fill_(-0.125)
    meter = RoutingMeter(model)
    model["a"](torch.randn(20, 8))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    assert "a budget shifts thresholds by -0.1250" in call("inspect", tmp_path / "model.pt").stdout
    layer = inspection._with_statistics(inspection.layers_in(model.state_dict())[0], meter.read())
    meter.close()
    assert inspection._headline(layer).endswith("a budget shifts thresholds by -0.1250 to hold k at 2.5")
    assert f"mean k {layer.k:.2f}" in inspection._headline(layer)


@pytest.mark.parametrize(
    ("gate", "headline", "rows"),
    [
        ({"type": "relu", "target_k": 1.5, "coefficient": 0.25}, ", coefficient 0.25, to hold k at 1.5", []),
        ({"type": "top_p", "target_k": 2.0}, ", logit_scale 1, p 0.4, error 0, to hold k at 2", []),
        ({"type": "expert_threshold"}, ", steps 0, to hold k at 1", ["threshold"]),
        ({"type": "null_experts", "target_k": 1.0}, ", null_bias 0, to hold k at 1", []),
        ({"type": "quantile_top_k"}, "mean k 1.00", ["score_bias"]),
        ({"type": "top", "k": 2}, "mean k 2.00", []),
    ],
)
def test_inspect_prints_what_a_router_holds(gate: dict[str, Any], headline: str, rows: list[str]) -> None:
    model = torch.nn.ModuleDict(
        {"a": moe.moe_layer(gate, 8, {"num_experts_per_device": 3, "hidden_size_per_expert": 4})}
    )
    with RoutingMeter(model) as meter:
        model["a"](torch.randn(20, 8))
        layer = inspection._with_statistics(inspection.layers_in(model.state_dict())[0], meter.read())
    assert inspection._headline(layer).endswith(headline)
    table = inspection._slot_tables(layer, 100)[0]
    assert [name.strip() for name in table.columns[0].cells] == ["active", *rows, "load"]


def test_inspect_wraps_many_slots_and_names_further_gates(tmp_path: Path) -> None:
    layer = moe.moe_layer(
        gate_type=[{"type": "top_any", "max_expert_num": 40}, {"type": "top_any", "max_expert_num": 40}],
        experts={"type": "ffn", "num_experts_per_device": 33, "hidden_size_per_expert": 2},
        model_dim=64,
    )
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    text = call("inspect", tmp_path / "layer.pt").stdout
    assert "layer: 33 of 40 slots active" in text
    assert "gates.1: 33 of 40 slots active" in text
    assert text.split().count("yes") == 66
    assert max(map(len, text.splitlines())) <= 100


def test_inspect_reads_a_folder_of_transformers_whose_config_is_not_ours(tmp_path: Path) -> None:
    """`save_pretrained` and the Trainer write such folders, with one file or several."""
    layer = moe.moe_layer("top_any", 8, {"num_experts_per_device": 3, "hidden_size_per_expert": 4})
    state = {f"a.{name}": tensor for name, tensor in layer.state_dict().items()}
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    names = sorted(state)
    save_file({name: state[name] for name in names[:4]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({name: state[name] for name in names[4:]}, tmp_path / "model-00002-of-00002.safetensors")
    assert "a: 3 of 3 slots active" in call("inspect", tmp_path).stdout


def test_inspect_refuses_what_it_cannot_read(run: Path, tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "dense.pt")
    torch.save({"gates.0.sim_matrix": torch.ones(4, 3), "gates.0.experts_mask": torch.ones(2)}, tmp_path / "odd.pt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "folder").mkdir()
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoints_of(run / "runs" / "dynmoe-seed0", "dynmoe-seed0")[-1], damaged)
    with (damaged / "tensors.safetensors").open("r+b") as file:
        file.truncate(1000)
    (tmp_path / "distributed").mkdir()
    (tmp_path / "distributed" / ".metadata").write_bytes(b"")
    (tmp_path / "started").mkdir()
    (tmp_path / "started" / "config.json").write_text("{}")
    for name, message in [
        ("dense.pt", "has no MoE layer"),
        ("odd.pt", "experts_mask has shape [2], sim_matrix has 3 slots"),
        ("text.pt", "truncated or foreign"),
        ("folder", "neither a run folder (with config.json) nor a checkpoint"),
        ("damaged", "truncated"),
        ("started", "has no checkpoint yet"),
        ("distributed", "is a distributed checkpoint: load it by dynmoe_tutel.checkpoint.distributed"),
        ("absent", "is not a file"),
    ]:
        assert message in refused("inspect", tmp_path / name)


def test_doctor_says_what_there_is_and_what_is_missing() -> None:
    result = call("doctor")
    assert result.exit_code == 0
    lines = {line.split("  ")[0]: line for line in result.stdout.splitlines() if line}
    assert torch.__version__ in lines["torch"]
    for name in ("Python", "threads", "bf16 on the CPU", "GPU", "triton", "C++ compiler", "Tutel", "scikit-learn"):
        assert name in lines
    assert "can    train the layer, on the CPU" in result.stdout
    for command in ("train", "experiment vision --data", "experiment language"):
        assert f"`dynmoe-tutel {command}`" in result.stdout


def test_doctor_names_the_extra_of_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = doctor.importlib.util.find_spec
    gone = ("matplotlib", "tutel", "datasets")
    monkeypatch.setattr(
        doctor.importlib.util, "find_spec", lambda name, *rest: None if name in gone else find_spec(name, *rest)
    )
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = {finding.name: finding for finding in doctor.examine()}
    assert found["matplotlib"].status == "absent"
    assert found["matplotlib"].advice == "pip install 'dynmoe_tutel[experiments]'"
    assert found["datasets"].advice == "pip install 'dynmoe_tutel[language]'"
    assert found["Tutel"].detail == "not installed"
    assert found["C++ compiler"].status == "absent"
    assert "no-such-compiler" in found["C++ compiler"].detail
    text = call("doctor").stdout
    assert "cannot `dynmoe-tutel train`" in text
    assert "cannot `dynmoe-tutel experiment language`" in text


def test_doctor_tries_tutel_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Tutel that aborts on import does not kill the doctor."""
    package = tmp_path / "tutel"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "_version", lambda *names: None)  # Tutel itself may be installed
    for content, status, detail in [
        ("", "ok", "installed"),
        ("raise ImportError('libcuda.so is missing')", "absent", "ImportError: libcuda.so is missing"),
        ("import os; os.abort()", "absent", "its import ended with code -6"),
    ]:
        (package / "moe.py").write_text(content)
        finding = doctor._tutel()
        assert finding.status == status
        assert detail in finding.detail
    assert str(getattr(sys.modules.get("tutel"), "__file__", "")) != str(package / "__init__.py")
