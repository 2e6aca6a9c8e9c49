"""Loops on a CPU, compiled by numba where it is installed (the extra `[cpu]`), for tokens and weights in fp32 or bf16.

Each makes one pass over memory where torch's operations make several. Results equal those of the engine "torch" to
rounding.
"""
