"""Runs the benchmarks for their launches alone: the same code, on tensors without values.

On the meta device the operations would only tell shapes. Inside `as_on_a_gpu` each runs its Triton host function, as a
GPU would have it, and an operation that names another engine runs as torch operations, in which the operations inside
it are Triton's again. Launches must be replaced meanwhile (`record.recording`, `warm.compiling`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dynmoe_tutel import layer
from dynmoe_tutel.kernels.gpu import tiles
from dynmoe_tutel.kernels.operation import OPERATIONS, takes_triton

from .. import kernels, layer_gpu, peers
from ..common.shapes import Shape

META = torch.device("meta")


class _HostFunctions(TorchDispatchMode):
    """Runs every operation as a GPU would; `rows` is the number of assignments that none can count here."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace != "dynmoe_tutel":
            return func(*args, **(kwargs or {}))
        declared = OPERATIONS[func.name().split("::")[1]]
        if "triton" in declared.engines and takes_triton(args):
            found = declared.engines["triton"](*declared.grouped(args))
            if declared.name == "ragged_index" and declared.signature.bind(*args).arguments.get("capacity", -1) < 0:
                return self._counted(found)
            return found
        if "grouped_mm" in declared.engines:  # a product of torch's, which reads the experts' loads
            return func(*args)
        with self:
            return declared.engines["torch"](*declared.grouped(args))

    def _counted(self, index: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """An index in which all assignments have room, cut to the rows that there would be."""
        *offsets, token_of_row, row_of_assignment = index
        return *offsets, token_of_row[: self.rows], row_of_assignment[: self.rows]


@contextmanager
def as_on_a_gpu(rows: int) -> Iterator[None]:
    """Operations on meta tensors launch what a GPU would; a layer of exact capacity finds `rows` assignments."""
    has_no_data = layer.has_no_data
    layer.has_no_data = lambda tensor: False  # else the layer gives the exact capacity another meaning
    try:
        with _HostFunctions(rows):
            yield
    finally:
        layer.has_no_data = has_no_data


def _raise(_: str, error: Exception) -> None:
    raise error


def run_benchmarks(architecture: str, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> None:
    """Make all calls of the layer's and the kernels' benchmarks for a shape."""
    rates = {"bytes_per_second": 1.0, "flops_per_second": 1.0}
    with tiles.assume(architecture), as_on_a_gpu(shape.rows + 1):  # any number of rows but a multiple of 16
        for _ in layer_gpu.measure(shape, dtype, META, 1, _raise):
            pass
        for _ in layer_gpu.measure_peers((), peers.PeerCase(shape, dtype, META), 1):
            pass
        for result in kernels.measure(shape, dtype, META, rates, 1):
            if "failed" in result:
                raise result["failed"]
