"""What a layer refuses by name of torch's machinery, because its operations have no rule for it."""

from __future__ import annotations

from typing import NoReturn

import torch


def refuse_transforms(x: object) -> None:
    """NotImplementedError where the tokens `x` are in a transform, a trace or an export that a layer cannot follow."""
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting() and _is_in_onnx_export():
            _refuse_onnx()
        return
    if torch.autograd.forward_ad._current_level >= 0:
        raise NotImplementedError(
            "a MoELayer has no forward-mode differentiation (jvp, jacfwd, dual tensors): use the backward"
        )
    if torch.jit.is_tracing():
        if torch.onnx.is_in_onnx_export():
            _refuse_onnx()
        raise NotImplementedError("a MoELayer cannot be traced by torch.jit.trace: use torch.export or torch.compile")
    if isinstance(x, torch.fx.Proxy):
        raise NotImplementedError(
            "a MoELayer cannot be traced by torch.fx.symbolic_trace: use torch.export, or a tracer that takes it for a "
            "leaf (is_leaf_module)"
        )
    functorch = torch._C._functorch
    inner = functorch.peek_interpreter_stack()
    if inner is not None and inner.key() in (functorch.TransformType.Vmap, functorch.TransformType.Grad):
        raise NotImplementedError(
            "a MoELayer has no rule for torch.func's transforms (vmap, grad, vjp, jacrev): give the batch to one call "
            "and use the backward, once a sample where each sample's own gradient is wanted"
        )


def _is_in_onnx_export() -> bool:
    """Called by torch.compile while it traces: it takes torch's own function for False."""
    return torch.onnx.is_in_onnx_export()


# what torch.compiler.assume_constant_result sets, which would import torch._dynamo and Triton
_is_in_onnx_export._dynamo_marked_constant = True  # type: ignore[attr-defined]


def refuse_script() -> NoReturn:
    """For torch.jit.script."""
    raise NotImplementedError("a MoELayer cannot be compiled by torch.jit.script: use torch.export or torch.compile")


def _refuse_onnx() -> NoReturn:
    raise NotImplementedError(
        "a MoELayer cannot be exported to ONNX, which has no ragged operations: use torch.export, or export the dense "
        "model that revert() gives"
    )
