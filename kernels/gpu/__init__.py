"""Triton kernels of the operations, one file per operation, for CUDA and ROCm devices.

Each kernel opens with its inputs, outputs, grid and bytes moved. Host functions have the names and arguments of the
operations. This folder is imported when an operation first gets a tensor on a GPU. Without a GPU, the tests run the
kernels in Triton's interpreter on a CPU (in bf16 too, which the tests patch).
"""
