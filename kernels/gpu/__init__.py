"""Triton kernels of the operations, one file an operation, for CUDA and ROCm devices.

Each file has the kernels, with inputs, outputs, grid and bytes moved at their head, and host functions with the names
and arguments of the operations. Nothing here is imported before a tensor on a GPU comes. The same kernels run on a CPU
in Triton's interpreter (bf16 too, as the tests mend it), which is how they are tested without a GPU.
"""
