"""A layer of one shape, and what `benchmarks.layer_gpu` times on it; also without values, on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe_tutel import MoELayer

from .common.shapes import Shape
from .common.tensors import generator_on


class Case:
    """A layer of one shape with the shape's mean k, tokens, and an output gradient."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        generator = generator_on(device, 0)

        def draw() -> Tensor:
            return torch.randn(shape.T, shape.D, generator=generator, device=device).to(dtype)

        self.x_TD, self.d_y_TD = draw().requires_grad_(), draw()
        self._unused = drawn_layer(shape, dtype, device, generator)
        gate = self._unused.gates[0]
        with torch.no_grad():
            x = self.x_TD[:4096].float()
            cos_TE = F.normalize(x, dim=1) @ F.normalize(gate.sim_matrix.float(), dim=0)
            gate.gates.copy_(cos_TE.quantile(1 - shape.k / shape.E, dim=0))
        self.layer = self.make("exact", "auto")
        self.rows = shape.rows
        if device.type != "meta":
            with torch.no_grad():
                self.rows = int(self.layer.route(self.x_TD).num_assignments)

    def make(self, capacity: Any, engine: str) -> MoELayer:
        """A layer with the same weights: copied, since drawing many weights takes seconds."""
        layer = copy.deepcopy(self._unused)
        layer.capacity, layer.experts.engine = capacity, engine
        return layer

    def step(self, layer: nn.Module) -> Callable[[], Any]:
        """Forward and backward with gradients of tokens and all parameters."""
        parameters = [self.x_TD, *layer.parameters()]
        one = torch.ones((), device=self.device)

        def run() -> Any:
            y_TD = layer(self.x_TD)
            return torch.autograd.grad((y_TD, y_TD.l_aux), parameters, (self.d_y_TD, one))

        return run

    def bare(self) -> Callable[[], Any]:
        """The forward and backward products on contiguous rows of one large matrix."""
        s, g = self.shape, 2 if self.shape.gated else 1

        def draw(*size: int) -> Tensor:
            return torch.randn(size, device=self.device).to(self.dtype)

        x, h, a, d_row = draw(self.rows, s.D), draw(self.rows, g * s.H), draw(self.rows, s.H), draw(self.rows, s.D)
        w1, w2 = draw(s.D, g * s.H), draw(s.H, s.D)

        def run() -> None:
            torch.mm(x, w1)
            torch.mm(a, w2)
            torch.mm(d_row, w2.t())
            torch.mm(a.t(), d_row)
            torch.mm(h, w1.t())
            torch.mm(x.t(), h)

        return run

    def dense(self) -> Callable[[], Any]:
        """A dense MLP on A rows."""
        s = self.shape
        x = torch.randn(self.rows, s.D, device=self.device).to(self.dtype).requires_grad_()
        d_y = torch.randn(self.rows, s.D, device=self.device).to(self.dtype)
        up, down = (nn.Linear(*size, device=self.device, dtype=self.dtype) for size in ((s.D, s.H), (s.H, s.D)))
        gate = nn.Linear(s.D, s.H, device=self.device, dtype=self.dtype) if s.gated else None
        parameters = [x, *up.parameters(), *down.parameters(), *(gate.parameters() if gate else ())]

        def run() -> Any:
            hidden = F.silu(up(x)) * gate(x) if gate else F.gelu(up(x))
            return torch.autograd.grad(down(hidden), parameters, d_y)

        return run

    def saved_share(self) -> float:
        """Bytes kept for the backward, over the bytes of x, the pre-activations and an index of 8 A."""
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y_TD = self.layer(self.x_TD)
        for parameter in self.layer.parameters():
            kept.pop(parameter.untyped_storage().data_ptr(), None)
        del y_TD
        n, s = self.x_TD.element_size(), self.shape
        pre = n * self.rows * s.H * (2 if s.gated else 1)
        return sum(kept.values()) / (n * s.T * s.D + pre + 8 * self.rows)


def drawn_layer(shape: Shape, dtype: torch.dtype, device: torch.device, generator: Any) -> MoELayer:
    """A layer whose experts are drawn on the device: on a CPU, the largest shape's would take a minute."""

    def make(hidden_size: int) -> MoELayer:
        experts = {"num_experts_per_device": shape.E, "hidden_size_per_expert": hidden_size}
        kind = {"type": "ffn", "activation_fn": F.gelu}
        if shape.gated:
            kind = {"type": "llama_ffn", "activation_fn": F.silu}
        return MoELayer({"type": "top_any"}, shape.D, experts | kind, seeds=(0, 0)).to(dtype)

    small = make(1)
    with torch.device("meta"):
        layer = make(shape.H)
    layer.to_empty(device=device)
    others = dict([*small.named_parameters(), *small.named_buffers()])
    with torch.no_grad():
        for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
            if name.startswith("experts."):
                tensor.normal_(0, shape.D**-0.5, generator=generator)
            else:
                tensor.copy_(others[name])
    return layer


Contestant = tuple[str, Callable[[], Any], bool]  # name, timed call, whether it runs as a CUDA graph


def first_contestants(case: Case) -> Iterator[Contestant]:
    """What the targets and the choice of an engine need; each is built on its turn."""
    yield "bare", case.bare(), True
    yield "ours, bounded, graph", case.step(case.make(1.25 * case.shape.k, "auto")), True
    yield "ours, exact", case.step(case.layer), False
    yield "grouped_mm", case.step(case.make("exact", "grouped_mm")), False
    yield "bare", case.bare(), True


def further_contestants(case: Case) -> Iterator[Contestant]:
    """The others; bare again, so that its spread shows changes of the clocks."""
    full = case.make("full", "auto")
    yield "ours, bounded", case.step(case.make(1.25 * case.shape.k, "auto")), False
    yield "ours, full", case.step(full), False
    yield "ours, full, graph", case.step(full), True
    del full
    yield "loop", case.step(case.make("exact", "torch")), False
    yield "dense", case.dense(), True
    yield "bare", case.bare(), True


Group = Callable[[Case], Iterator[Contestant]]
GROUPS: tuple[Group, ...] = (first_contestants, further_contestants)
