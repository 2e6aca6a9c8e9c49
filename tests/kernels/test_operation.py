"""The operations' input checks, which name the argument, and the behaviour that their declaration gives them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dynmoe_tutel import kernels
from dynmoe_tutel.kernels import operation

T, D, H, E, O = 6, 8, 5, 3, 4


def inputs() -> dict[str, Any]:
    bits = kernels.pack_bits(torch.ones(T, E, dtype=torch.bool))
    names = ("expert_offsets", "token_offsets", "token_of_row", "row_of_assignment")
    index = dict(zip(names, kernels.ragged_index(bits, E), strict=True))
    return {
        "x_TD": torch.randn(T, D), "w_DE": torch.randn(D, E), "threshold_E": torch.zeros(E),
        "active_E": torch.ones(E, dtype=torch.bool), "scale": torch.ones(()), "fallback": False,
        "token_mask_T": torch.ones(T, dtype=torch.bool), "bits_TW": bits, "num_experts": E, "capacity": 20,
        "block_counts": None, "margin_TE": torch.randn(T, E), "rows_AD": torch.randn(T * E, D), "mean": True, **index,
        "gate_A": torch.ones(T * E), "w1_EDH": torch.randn(E, D, H), "b1_EH": torch.randn(E, H),
        "w3_EDH": torch.randn(E, D, H), "b3_EH": torch.randn(E, H), "w2_EHO": torch.randn(E, H, O),
        "b2_EO": torch.randn(E, O), "activation": "gelu", "apply_gate": False, "save": True,
        "w_EDO": torch.randn(E, D, O), "b_EO": torch.randn(E, O), "value_TE": torch.rand(T, E), "centred": False,
        "unrouted_T": torch.zeros(T, dtype=torch.bool), "sample_ND": torch.zeros(4, D),
        "state": torch.tensor([0, 1, 0]), "chosen_T": torch.ones(T, dtype=torch.bool),
        "thresholds_E": torch.zeros(E), "score_TE": torch.rand(T, E), "inv_norm_T": torch.ones(T),
        "unit_ED": torch.randn(E, D), "inv_norm_E": torch.ones(E), "dtype": torch.float32,
    }  # fmt: skip


def arguments(operation: str, given: dict[str, Any]) -> list[Any]:
    names = OPERATIONS[operation]
    return [given[n] if isinstance(n, str) else n(*(given[field] for field in n._fields)) for n in names]


INDEX = ("token_offsets", "token_of_row", "row_of_assignment")
OPERATIONS: dict[str, tuple[Any, ...]] = {  # each operation's arguments by name; a group lists its fields
    "threshold_gate": ("x_TD", "w_DE", "threshold_E", "active_E", "scale", "fallback", "token_mask_T"),
    "ragged_index": ("bits_TW", "num_experts", "capacity", "block_counts"),
    "bound_assignments": ("bits_TW", "margin_TE", "capacity"),
    "dispatch": ("x_TD", *INDEX),
    "combine": ("rows_AD", *INDEX, "mean"),
    "row_gates": ("value_TE", "threshold_E", "unrouted_T", kernels.Index, "centred"),
    "unpack_bits": ("bits_TW", "num_experts"),
    "vector_losses": ("w_DE", "active_E"),
    "keep_strided": ("sample_ND", "state", "x_TD", "chosen_T"),
    "grouped_ffn": ("x_TD", "gate_A", kernels.Index, kernels.ExpertWeights, "activation", "apply_gate", "save"),
    "top_any_ffn": (
        "x_TD", kernels.Router, kernels.Index, kernels.ExpertWeights, "activation", "centred", "dtype", "save",
    ),
    "grouped_linear": ("rows_AD", "expert_offsets", "w_EDO", "b_EO"),
}  # fmt: skip
BAD = [
    ("threshold_gate", "active_E", torch.ones(E, dtype=torch.int64)),
    ("threshold_gate", "active_E", torch.ones(E + 1, dtype=torch.bool)),
    ("threshold_gate", "threshold_E", torch.zeros(1)),
    ("threshold_gate", "threshold_E", torch.zeros(E, dtype=torch.int64)),
    ("threshold_gate", "w_DE", torch.zeros(D + 1, E)),
    ("threshold_gate", "w_DE", torch.zeros(D, 0)),
    ("threshold_gate", "scale", torch.ones((), dtype=torch.int64)),
    ("threshold_gate", "scale", torch.ones(2)),
    ("threshold_gate", "token_mask_T", torch.ones(T + 1, dtype=torch.bool)),
    ("threshold_gate", "token_mask_T", torch.ones(T)),
    ("threshold_gate", "x_TD", torch.ones(T, D, dtype=torch.int32)),
    ("threshold_gate", "x_TD", torch.ones(T, D).to(torch.float8_e4m3fn)),
    ("threshold_gate", "x_TD", torch.ones(D)),
    ("ragged_index", "num_experts", 65),
    ("ragged_index", "num_experts", 0),
    ("ragged_index", "num_experts", -1),
    ("ragged_index", "capacity", -2),
    ("ragged_index", "capacity", 2**31),
    ("ragged_index", "bits_TW", torch.zeros(T, 1, dtype=torch.int32)),
    ("ragged_index", "bits_TW", torch.zeros(T, dtype=torch.int64)),
    ("ragged_index", "block_counts", torch.zeros(2, dtype=torch.int32)),
    ("unpack_bits", "bits_TW", torch.zeros(T, 1)),
    ("bound_assignments", "bits_TW", torch.zeros(T, 2, dtype=torch.int64)),
    ("bound_assignments", "margin_TE", torch.zeros(T, E, dtype=torch.int32)),
    ("bound_assignments", "margin_TE", torch.zeros(T + 1, E)),
    ("bound_assignments", "capacity", -1),
    ("dispatch", "x_TD", torch.ones(T, D, dtype=torch.int64)),
    ("dispatch", "token_offsets", torch.zeros(T, dtype=torch.int32)),
    ("dispatch", "token_of_row", torch.zeros(T * E, dtype=torch.int64)),
    ("dispatch", "token_of_row", torch.zeros(2 * T * E, dtype=torch.int32)[::2]),
    ("dispatch", "token_offsets", torch.zeros(2 * T + 2, dtype=torch.int32)[::2]),
    ("row_gates", "value_TE", torch.zeros(T, E, dtype=torch.int64)),
    ("row_gates", "threshold_E", torch.zeros(E + 1)),
    ("row_gates", "unrouted_T", torch.zeros(T)),
    ("row_gates", "expert_offsets", torch.zeros(E, dtype=torch.int32)),
    ("row_gates", "row_of_assignment", torch.zeros(2, dtype=torch.int32)),
    ("vector_losses", "w_DE", torch.zeros(D)),
    ("vector_losses", "active_E", torch.ones(E, dtype=torch.int64)),
    ("keep_strided", "sample_ND", torch.zeros(1, D)),
    ("keep_strided", "state", torch.zeros(3, dtype=torch.int32)),
    ("keep_strided", "x_TD", torch.zeros(T, D + 1)),
    ("keep_strided", "chosen_T", torch.ones(T)),
    ("combine", "rows_AD", torch.zeros(T * E + 1, D)),
    ("combine", "row_of_assignment", torch.zeros(2, dtype=torch.int32)),
    ("grouped_ffn", "w3_EDH", torch.zeros(E, D, H + 1)),
    ("grouped_ffn", "b1_EH", torch.zeros(H)),
    ("grouped_ffn", "b2_EO", torch.zeros(E, O + 1)),
    ("grouped_ffn", "w2_EHO", torch.zeros(E, H + 1, O)),
    ("grouped_ffn", "expert_offsets", torch.zeros(E, dtype=torch.int32)),
    ("grouped_ffn", "activation", "tanh"),
    ("grouped_linear", "b_EO", torch.zeros(E)),
    ("grouped_linear", "expert_offsets", torch.zeros(E + 2, dtype=torch.int32)),
]


@pytest.mark.parametrize(("operation", "name", "value"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_what_does_not_fit_is_refused_by_name(operation: str, name: str, value: Any) -> None:
    good = inputs()
    call = getattr(kernels, operation)
    call(*arguments(operation, good))
    with pytest.raises(ValueError, match="bits_TW" if isinstance(value, int) and value == 65 else name):
        call(*arguments(operation, good | {name: value}))


@pytest.mark.parametrize("name_of_operation", [name for name in OPERATIONS if name != "unpack_bits"])
def test_tensors_of_two_devices_are_refused_by_name(name_of_operation: str) -> None:
    """For any argument, also in a group; Triton's error gives only a pointer's position."""
    good, groups = inputs(), OPERATIONS[name_of_operation]
    names = [field for name in groups for field in ([name] if isinstance(name, str) else name._fields)]
    for name in names[1:]:
        if isinstance(good[name], Tensor):
            elsewhere = good | {name: good[name].to("meta")}
            with pytest.raises(ValueError, match=rf"{name} is on meta, {names[0]} on cpu"):
                operation.OPERATIONS[name_of_operation].run(*arguments(name_of_operation, elsewhere))


def test_bits_are_packed_of_bools() -> None:
    with pytest.raises(ValueError, match="assigned_TE must be bool"):
        kernels.pack_bits(torch.ones(2, 3))


def test_a_gpu_implementation_is_checked_and_runs_with_the_device_of_its_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Triton launches on the current device: with tensors on cuda:1 and cuda:0 current, it read invalid addresses."""

    def twice(x: Tensor) -> Tensor:
        raise AssertionError("the GPU's implementation runs")

    order: list[str] = []
    declared = operation.Operation(twice, lambda x: order.append("check"), {"triton": "gpu.twice"})

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        order.append(f"enter {tuple(tensor.shape)}")
        yield
        order.append("leave")

    def implementation(x: Tensor) -> Tensor:
        order.append("run")
        return 2 * x

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(operation, "import_module", lambda *_: SimpleNamespace(twice=implementation))
    monkeypatch.setattr(operation, "triton_is_installed", lambda: True)
    assert declared.run_on_gpu(torch.ones(3)).tolist() == [2, 2, 2]
    assert order == ["check", "enter (3,)", "run", "leave"]


def test_float64_and_the_engines_of_torch_are_seen_in_groups_too() -> None:
    x, index, wide = torch.ones(2), [torch.ones(2, dtype=torch.int32)], torch.ones(2, dtype=torch.float64)
    assert operation.takes_triton((x, index, [x, None], "gelu", "auto"))
    assert not operation.takes_triton((x, index, [None, wide], "gelu", "auto"))
    assert not operation.takes_triton((x, index, [x], "gelu", "grouped_mm"))


@pytest.mark.parametrize("leaves", [("x_TD",), ("thresholds_E",), ("b2_EO",), ("w_DE", "b2_EO"), ("x_TD", "scale")])
def test_a_backward_is_told_what_is_asked_for(leaves: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen weights cost no gradient work; a single tensor of a group can still get a gradient."""
    module = sys.modules["dynmoe_tutel.kernels.top_any_ffn"]
    backward, wanted = module.top_any_ffn_backward, []  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "top_any_ffn_backward", lambda *args: wanted.append(args[-2]) or backward(*args))
    good = inputs() | {"w3_EDH": None, "b3_EH": None}
    for leaf in leaves:
        good[leaf].requires_grad_()
    kernels.top_any_ffn(*arguments("top_any_ffn", good))[0].sum().backward()
    assert wanted == ["b2_EO" in leaves]
    found = {name for name, value in good.items() if isinstance(value, Tensor) and value.grad is not None}
    assert found == set(leaves)


def test_a_gradient_has_none_of_its_own() -> None:
    rows, w = torch.randn(T * E, D, requires_grad=True), torch.randn(E, D, O, requires_grad=True)
    out = kernels.grouped_linear(rows, inputs()["expert_offsets"], w, None)
    (d_rows,) = torch.autograd.grad(out.sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="grouped_linear_backward has no gradient"):
        d_rows.sum().backward()


def test_what_an_operation_changes_has_a_new_version() -> None:
    """Autograd uses the version to detect that a saved tensor has changed."""
    good = inputs()
    before = good["sample_ND"]._version, good["x_TD"]._version
    kernels.keep_strided(*arguments("keep_strided", good))
    assert good["sample_ND"]._version > before[0]
    assert good["x_TD"]._version == before[1]
