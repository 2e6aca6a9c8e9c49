"""The tensor operations that make up the layer, one per file.

Each is a custom operation of torch in the namespace `dynmoe_tutel`. It has a kernel in torch operations (made for CPUs;
a device without its own kernel runs it too), a fake kernel (shapes for `torch.compile`) and an autograd formula.
`operation` declares them; `operands` defines the groups of tensors that they take. Another engine implements an
operation as a function with the same name, arguments and results. Nothing here knows modules, gates or Tutel.
"""

# In a checkout, Python also finds this folder as `kernels`, and transformers imports a package of that name.
# Registering the operations a second time would destroy the first ones.
if __name__ == "dynmoe_tutel.kernels":
    from .activations import ACTIVATIONS, activation_name
    from .dispatch_combine import combine, dispatch, row_gates
    from .flop_counter import register_when_imported
    from .grouped_ffn import grouped_ffn, grouped_linear
    from .operands import ExpertWeights, Index, Router
    from .ragged_index import bound_assignments, pack_bits, ragged_index, unpack_bits
    from .router_losses import vector_losses
    from .strided_sample import keep_strided, thinned
    from .threshold_gate import gate_dtype, threshold_gate
    from .top_any_ffn import top_any_ffn

    register_when_imported()

__all__ = [
    "ACTIVATIONS",
    "ExpertWeights",
    "Index",
    "Router",
    "activation_name",
    "bound_assignments",
    "combine",
    "dispatch",
    "gate_dtype",
    "grouped_ffn",
    "grouped_linear",
    "keep_strided",
    "pack_bits",
    "ragged_index",
    "row_gates",
    "thinned",
    "threshold_gate",
    "top_any_ffn",
    "unpack_bits",
    "vector_losses",
]
