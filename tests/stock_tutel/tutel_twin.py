"""A stock Tutel layer with the configuration and weights of a native one, and its results."""

from __future__ import annotations

from typing import Any

import helpers
import torch
from helpers import Case
from torch import Tensor, nn

from dynmoe_tutel import MoELayer

D, H, E = 16, 20, 5
LAYOUTS = ["packed", "padded"]


def tutel_twin(native: MoELayer, **options: Any) -> Any:
    """A layer of `tutel.moe` with the configuration and the weights of `native`, made by `make_case`."""
    from tutel import moe

    experts, gate = native.experts, native.gates[0]
    kind = "llama_ffn" if hasattr(experts, "W_fc1") else "ffn"
    config: dict[str, Any] = {
        "type": kind,
        "num_experts_per_device": native.num_global_experts,
        "hidden_size_per_expert": experts.hidden_size_per_expert,
        "activation_fn": experts.activation_fn,
    }
    if experts.output_dim != native.model_dim:
        config["output_dim"] = experts.output_dim
    gate_type: dict[str, Any] = {"type": "top_any", "max_expert_num": native.slots}
    if gate.temperature is not None:
        gate_type["init_t"] = 1.0
    options = {"combine_gradient": native.combine_gradients[0], "capacity": native.capacity, **options}
    layer = moe.moe_layer(gate_type=gate_type, experts=config, model_dim=native.model_dim, **options)
    layer.to(next(native.parameters()).dtype)
    layer.load_state_dict(native.state_dict())
    return layer


@torch.no_grad()
def draw(module: nn.Module, seed: int = 0) -> None:
    """Draw every parameter from a normal distribution: some versions of Tutel start all biases at 0, and equal numbers
    would not tell experts apart."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.normal_(0, 0.3, generator=generator)


def run(layer: nn.Module, case: Case, **call: Any) -> dict[str, Tensor]:
    """Output, loss and gradients by name, llama_ffn's as this package shapes them."""
    x = case.x.clone().requires_grad_()
    y = layer(x, **call)
    assert torch.equal(y.l_aux, layer.l_aux)
    layer.zero_grad()
    (y.double() * case.dy.double()).sum().backward()
    own = dict(case.layer.named_parameters())
    found = {name: g.reshape(own[name].shape) if name in own else g for name, g in helpers.gradients(layer, x).items()}
    return {"y": y.detach(), "l_aux": layer.l_aux.detach(), **found}
