"""Checkpoints load bit for bit and are whole or absent; anything else is refused by name."""

from __future__ import annotations

import errno
import json
import os
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

from dynmoe_tutel.checkpoint import (
    STATE,
    TENSORS,
    files,
    read_checkpoint,
    read_state_dict,
    write_checkpoint,
    write_file,
)

NESTED: dict[str, Any] = {
    "step": 7,
    "learning_rate": 0.1 + 0.2,
    "big": 2**60,
    "nothing": None,
    "yes": True,
    "special": [float("inf"), -float("inf")],
    "betas": (0.9, 0.999),
    "state": {0: {"exp_avg": torch.randn(3, 2)}, 5: {"step": torch.tensor(4.0)}},
    "$tensor": "not a reference",
    "empty": {"list": [], "dict": {}, "tensor": torch.zeros(0, 4), "text": ""},
    "dtypes": {str(d): torch.ones(2, dtype=d) for d in (torch.bfloat16, torch.float64, torch.bool, torch.int64)},
    "view": torch.arange(12.0).view(3, 4).t(),
    "umlaut/slash": "ä\n",
    # paths that look alike name different tensors
    "a": {"b": torch.ones(2)},
    "a/b": torch.zeros(2),
    "keys": {1: torch.full((1,), 3.0), "1": torch.full((1,), 4.0)},
}


def same(actual: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        return actual.dtype == expected.dtype and torch.equal(actual, expected)
    if isinstance(expected, dict):
        return list(actual) == list(expected) and all(same(actual[key], expected[key]) for key in expected)
    if isinstance(expected, (list, tuple)):
        return type(actual) is type(expected) and all(map(same, actual, expected)) and len(actual) == len(expected)
    return type(actual) is type(expected) and bool(actual == expected)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "whole", NESTED)


def test_a_state_comes_back_bit_for_bit(whole: Path) -> None:
    assert same(read_checkpoint(whole), NESTED)
    assert {path.name for path in whole.iterdir()} == {STATE, TENSORS}


def test_shared_memory_and_nan_come_back(tmp_path: Path) -> None:
    weight = torch.randn(4, 4)
    write_checkpoint(tmp_path / "c", {"a": weight, "b": weight, "part": weight[1], "loss": float("nan")})
    state = read_checkpoint(tmp_path / "c")
    assert torch.equal(state["a"], weight)
    assert torch.equal(state["b"], weight)
    assert torch.equal(state["part"], weight[1])
    assert state["loss"] != state["loss"]


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_continues_from_its_checkpoint(tmp_path: Path, fused: bool) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()

    step(model, optimizer)
    write_checkpoint(tmp_path / "c", {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()})
    state = read_checkpoint(tmp_path / "c")
    other = nn.Linear(3, 3)
    other_optimizer = torch.optim.AdamW(other.parameters(), fused=fused)
    other.load_state_dict(state["model"])
    other_optimizer.load_state_dict(state["optimizer"])
    for pair in ((model, optimizer), (other, other_optimizer)):
        step(*pair)
    assert torch.equal(model.weight, other.weight)


def test_nothing_is_overwritten(whole: Path) -> None:
    with pytest.raises(ValueError, match="exists already"):
        write_checkpoint(whole, {})
    assert same(read_checkpoint(whole), NESTED)


@pytest.mark.parametrize("value", [object(), {1, 2}, {("a",): 1}, {True: 1}, nn.Linear(1, 1), b"bytes"])
def test_what_cannot_be_kept_is_named(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ValueError, match=r"cannot hold outer/inner of type"):
        write_checkpoint(tmp_path / "c", {"outer": {"inner": value}})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("name", [STATE, TENSORS])
def test_truncated_files_are_refused_by_name(whole: Path, name: str, share: float) -> None:
    content = (whole / name).read_bytes()
    (whole / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=rf"{name}.*truncated"):
        read_checkpoint(whole)


@pytest.mark.parametrize("place", [0, 100, -1])
def test_a_changed_byte_in_the_tensors_is_found(whole: Path, place: int) -> None:
    content = bytearray((whole / TENSORS).read_bytes())
    content[place] ^= 1
    (whole / TENSORS).write_bytes(content)
    with pytest.raises(ValueError, match="SHA-256"):
        read_checkpoint(whole)


def test_tensors_of_another_checkpoint_are_refused(whole: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", {**NESTED, "view": torch.arange(1.0, 13).view(3, 4).t()})
    shutil.copy(other / TENSORS, whole / TENSORS)
    with pytest.raises(ValueError, match="belongs elsewhere"):
        read_checkpoint(whole)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "foreign"),
        ('{"model": "gpt"}', "foreign"),
        (json.dumps({"format": files.FORMAT, "version": 99}), "version 99; this package reads 1"),
        ("\x80\x02pickle", "foreign"),
    ],
)
def test_foreign_files_are_refused(whole: Path, content: str, message: str) -> None:
    (whole / STATE).write_bytes(content.encode("latin1"))
    with pytest.raises(ValueError, match=message):
        read_checkpoint(whole)


@pytest.mark.parametrize("missing", [STATE, TENSORS])
def test_a_missing_file_is_named(whole: Path, missing: str) -> None:
    (whole / missing).unlink()
    with pytest.raises(ValueError, match=missing):
        read_checkpoint(whole)
    assert files.is_checkpoint(whole) == (missing == TENSORS)


@pytest.mark.parametrize("fails", [TENSORS, STATE, "rename"])
def test_no_space_leaves_no_trace_and_the_other_checkpoint(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    write = files.write_synced

    def full(path: Path, content: bytes) -> None:
        if path.name == fails:
            write(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)

    def no_rename(_source: Any, _target: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "write_synced", full)
    if fails == "rename":
        monkeypatch.setattr(os, "rename", no_rename)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(tmp_path / "next", NESTED)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    assert same(read_checkpoint(whole), NESTED)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.md"
    write_file(path, "first")

    def full(path: Path, content: bytes) -> None:
        path.write_bytes(content[:2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "write_synced", full)
    with pytest.raises(OSError, match="No space left"):
        write_file(path, "second")
    assert path.read_text() == "first"
    monkeypatch.undo()
    write_file(path, b"third")
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("table.md", "third")]


WEIGHTS = {"gates.0.sim_matrix": torch.randn(4, 3), "experts.batched_fc1_w": torch.randn(3, 5, 4)}


def test_state_dicts_are_read_from_safetensors_and_torch_files(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "a.safetensors")
    torch.save(WEIGHTS, tmp_path / "b.pt")
    torch.save({"epoch": 3, "state_dict": WEIGHTS}, tmp_path / "c.bin")
    torch.save({"module": {"model": WEIGHTS}}, tmp_path / "d")
    torch.save(WEIGHTS, tmp_path / "e.pt", _use_new_zipfile_serialization=False)
    for path in tmp_path.iterdir():
        assert same(dict(sorted(read_state_dict(path).items())), dict(sorted(WEIGHTS.items()))), path.name


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "old.pt"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_truncated_weights_are_refused(tmp_path: Path, name: str, share: float) -> None:
    path = tmp_path / name
    if name == "a.safetensors":
        save_file(WEIGHTS, path)
    else:
        torch.save(WEIGHTS, path, _use_new_zipfile_serialization=name == "a.pt")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match="truncated or foreign"):
        read_state_dict(path)


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def test_pickled_objects_are_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": WEIGHTS, "hook": Malicious()}, "bad.pt")
    with pytest.raises(ValueError, match="Python objects beyond tensors"):
        read_state_dict("bad.pt")
    assert not Path("executed").exists()


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not weights")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "no_tensors.pt")
    for name, message in [
        ("notes.txt", "truncated or foreign"),
        ("list.pt", "no state dict"),
        ("no_tensors.pt", "no state dict"),
        ("absent.pt", "is not a file"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_state_dict(tmp_path / name)


def test_the_package_imports_without_the_extras_and_names_the_extra_that_is_missing(tmp_path: Path) -> None:
    program = """
import sys

class Missing:
    names = {"sklearn", "matplotlib", "rich", "typer", "safetensors", "tensorboard", "tutel", "triton"}
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Missing())
import dynmoe_tutel
from dynmoe_tutel import checkpoint
from dynmoe_tutel.experiments.report import plots
from dynmoe_tutel.experiments.vision import digits
for use in (
    lambda: checkpoint.write_checkpoint("c", {}),
    lambda: digits.load_digits(75, 0),
    lambda: plots.accuracy([], []),
):
    try:
        use()
    except ImportError as error:
        assert "pip install 'dynmoe_tutel[experiments]'" in str(error), error
    else:
        raise AssertionError("no error")
try:
    import dynmoe_tutel.cli
except SystemExit as end:
    assert "dynmoe_tutel[experiments]" in str(end.code), end.code
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())
