"""Operations on tensors that the layer is made of, one a file.

Each is a custom operation of torch in the namespace `dynmoe_tutel` with a kernel in torch operations (made for CPUs; a
device without a kernel of its own runs it too), a fake kernel (shapes for `torch.compile`) and an autograd formula;
`operation` declares them, `operands` has the groups of tensors that they take. A function of another engine with the
name of an operation takes and gives what that operation does. Nothing here knows modules, gates or Tutel.
"""

# In a checkout this folder is also found under the name `kernels`, by transformers among others, which looks for a
# package of that name. Registering the operations a second time would destroy the first ones.
if __name__ == "dynmoe_tutel.kernels":
    from .activations import ACTIVATIONS, activation_name
    from .dispatch_combine import combine, dispatch, row_gates
    from .grouped_ffn import grouped_ffn, grouped_linear
    from .operands import ExpertWeights, Index, Router
    from .ragged_index import bound_assignments, pack_bits, ragged_index, unpack_bits
    from .router_losses import vector_losses
    from .strided_sample import keep_strided, thinned
    from .threshold_gate import gate_dtype, threshold_gate
    from .top_any_ffn import top_any_ffn

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
