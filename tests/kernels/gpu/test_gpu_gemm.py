"""The experts' products: they work only on tiles with rows; splits and precisions; the same numbers either way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import HAS_GPU
from test_gpu_grouped_ffn import Call, compare

from dynmoe_tutel.kernels import Index, pack_bits, ragged_index
from dynmoe_tutel.kernels.gpu import gemm as products
from dynmoe_tutel.kernels.gpu import grouped_ffn as gpu
from dynmoe_tutel.kernels.gpu import tiles, weight_gradient

D, H, O, E = 20, 40, 17, 4
LOADS = {
    "every token to every expert": [20] * E,  # the dense limit: k = E
    "no token": [0] * E,
    "one expert": [0, 20, 0, 0],
    "skewed": [17, 1, 0, 16],
}


def routed(load: list[int], spare: int, device: str) -> Call:
    """A call in which expert e has the first load[e] tokens."""
    call = Call(20, D, H, O, E, device=device, gated=True)
    assigned_TE = torch.arange(20)[:, None] < torch.tensor(load)[None, :]
    call.A = int(assigned_TE.sum())
    call.index = Index(*ragged_index(pack_bits(assigned_TE), E, call.A + spare if spare else -1))
    rows = call.index.rows
    call.tensors = (call.tensors[0], torch.ones(rows), call.index, call.tensors[3])
    call.d_rows = torch.randn(rows, O, generator=torch.Generator().manual_seed(0))
    return call


def up(size: int, block: int) -> int:
    """Blocks that hold `size`."""
    return -(-size // block)


@pytest.mark.parametrize("spare", [0, 50])
@pytest.mark.parametrize("name", LOADS)
def test_both_limits_and_what_lies_between(name: str, spare: int, device: str, poisoned: None) -> None:
    compare(routed(LOADS[name], spare, device), 1e-6)


@pytest.fixture
def dots(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], int]:
    """Counts the tile products of a call in the interpreter."""
    if HAS_GPU:
        pytest.skip("counted in the interpreter")
    from triton.runtime.interpreter import InterpreterBuilder

    create, count = InterpreterBuilder.create_dot, [0]

    def counted(self: Any, *args: Any) -> Any:
        count[0] += 1
        return create(self, *args)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counted)

    def of(call: Callable[[], Any]) -> int:
        count[0] = 0
        call()
        return count[0]

    return of


@pytest.mark.parametrize("spare", [0, 50])
@pytest.mark.parametrize("name", LOADS)
def test_work_follows_the_rows(name: str, spare: int, device: str, dots: Callable) -> None:
    """No tile for an expert without rows nor for unused rows, whose number only the device knows."""
    load = LOADS[name]
    call = routed(load, spare, device)
    found: list[Any] = []
    forward = dots(lambda: found.extend(gpu.grouped_ffn(*call.on_device(call.tensors), "silu", False, True)))
    arguments = (call.d_rows, *found[1:], *call.tensors, "silu", False, True)
    backward = dots(lambda: gpu.grouped_ffn_backward(*arguments))
    rows, columns = sum(up(n, 16) for n in load), [up(size, 32) for size in (D, H, O)]
    gated, plain = 2 * columns[0] * columns[1], columns[1] * columns[2]
    assert forward == rows * (gated + plain)
    biased = 2 * up(H, 16) * up(D, 32)  # a product with ones beside that with x
    weights = 2 * biased + up(H, 16) * up(O, 32)
    step = tiles.gemm("weight_gradient", call.d_rows.device, torch.float32, up(len(call.d_rows), E), D, H).block_k
    assert backward == rows * (gated + plain) + weights * sum(up(n, step) for n in load)


@pytest.mark.parametrize("rows", [1, 3])
def test_what_is_cleared_behind_the_last_row_is_not_a_row(rows: int, device: str, poisoned: None) -> None:
    """One tile, so that the program that clears has also written the rows; with more, another could repair them."""
    call = routed([rows, 0, 0, 0], 40, device)
    w = call.tensors[3].w1_EDH[:, :, :17]
    out = products.linear(torch.randn(rows + 40, D), w, call.index[0], zero_tail=True)
    assert out[:rows].all()
    assert not out[rows:].any()


def test_without_rows_no_product_is_launched(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = routed([0] * E, 0, device)
    for kernel in ("up_kernel", "linear_kernel", "activation_gradient_kernel"):
        monkeypatch.setattr(products.gemm_kernels, kernel, None)  # any launch would fail
    monkeypatch.setattr(weight_gradient, "weight_gradient_kernel", None)
    rows, h, u = gpu.grouped_ffn(*call.on_device(call.tensors), "gelu", False, True)
    gradients = gpu.grouped_ffn_backward(rows, h, u, *call.on_device(call.tensors), "gelu", False, True)
    assert rows.shape == (0, O)
    for gradient in (gradients[0], *gradients[2:]):
        assert not gradient.any()


def test_rows_are_multiplied_as_the_flag_of_torch_says() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        torch.set_float32_matmul_precision("highest")
        assert products.precision(torch.float32, "sm_90") == "ieee"
        torch.set_float32_matmul_precision("high")
        assert products.precision(torch.float32, "sm_90") == "tf32"
        assert products.precision(torch.float32, "gfx942") == "tf32"
        assert products.precision(torch.float32, "gfx90a") == "ieee"  # its compiler refuses tf32
        assert products.precision(torch.bfloat16, "sm_90") == "ieee"
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = "tf32"  # the newer flag, after which torch's older getter raises
        assert products.precision(torch.float32, "sm_90") == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before
