"""A program, since Triton must not be interpreted: what the benchmarks launch on tensors with values, against what
`launches.rehearsal` says. Operations compute on the CPU, and beside it their Triton host functions are recorded, on
tensors of the same sizes, strides and offsets. Prints, for each shape of the arguments, launches in one set alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from benchmarks import kernels, layer_gpu, peers, smoke
from benchmarks.common.shapes import Shape
from benchmarks.launches.record import Launch, recording
from benchmarks.launches.rehearsal import run_benchmarks
from benchmarks.layer_case import Case
from dynmoe_tutel.kernels.gpu import tiles
from dynmoe_tutel.kernels.operation import OPERATIONS, takes_triton

CPU, DTYPE = torch.device("cpu"), torch.bfloat16


def without_values(tensor: Tensor) -> Tensor:
    """A meta tensor with the same size, strides and offset."""
    storage = torch.empty(tensor.untyped_storage().nbytes() // tensor.element_size(), dtype=tensor.dtype, device="meta")
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


class Beside(TorchDispatchMode):
    """Operations compute on the CPU; those that a GPU would run on Triton are recorded too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace != "dynmoe_tutel":
            return func(*args, **(kwargs or {}))
        declared = OPERATIONS[func.name().split("::")[1]]
        if "triton" in declared.engines and takes_triton(args):
            declared.engines["triton"](*declared.grouped(tree_map_only(Tensor, without_values, list(args))))
            return func(*args)
        with self:
            return declared.run(*args)


def launched(shape: Shape) -> set[Launch]:
    """Of the benchmarks of the layer and the kernels, of smoke and of the fit against the assignments."""

    def failed(_: str, error: Exception) -> None:
        raise error

    with tiles.assume("sm_90"), recording() as launches, Beside():
        for _ in layer_gpu.measure(shape, DTYPE, CPU, 1, failed):
            pass
        for _ in layer_gpu.measure_peers((), peers.PeerCase(shape, DTYPE, CPU), 1):
            pass
        layer_gpu.affine(DTYPE, CPU, shape, 1)
        for _ in smoke.checks(Case(shape, DTYPE, CPU), 1):
            pass
        rates = {"bytes_per_second": 1.0, "flops_per_second": 1.0}
        for skewed in (False, True):
            for result in kernels.measure(shape, DTYPE, CPU, rates, 1, skewed):
                error = result.get("failed")  # what was recorded has no result
                if error is not None and "differs from the torch operation" not in str(error):
                    raise error
    return set(launches)


def rehearsed(shape: Shape) -> set[Launch]:
    """What `benchmarks.warm` compiles."""
    with recording() as launches:
        run_benchmarks("sm_90", shape, DTYPE)
    return set(launches)


def lines(shape: Shape) -> Iterator[str]:
    """What differs, then how many launches are in both sets."""
    found, expected = launched(shape), rehearsed(shape)
    for what, launches in (("launched only", found - expected), ("compiled only", expected - found)):
        for launch in launches:
            about = f"{launch.kernel} ({launch.configuration}) {launch.signature} {launch.attributes}"
            yield f"{shape}: {what}: {about}\n"
    yield f"{shape}: {len(found & expected)} in both\n"


if __name__ == "__main__":
    for sizes in sys.argv[1:]:
        sys.stdout.writelines(lines(Shape(*eval(sizes))))
