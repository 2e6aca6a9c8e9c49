"""The fence between copies to shared memory and the matrix cores that read them, where Triton's compiler has none.

`cp.async` writes shared memory through the generic proxy; `wgmma` (sm_90) and `tcgen05.mma` (sm_100) read it through
the async proxy, and only `fence.proxy.async` orders the two. Triton puts it there since 3.7.1 (triton-lang/triton#9610,
#10537); torch 2.11 comes with 3.6.0. `benchmarks.aot` looks for it in the code of every kernel.
"""

import logging
import re
from functools import cache

import triton
import triton.language as tl
from triton import knobs


def leaves_out_the_fence(version: str) -> bool:
    """Whether this version of Triton does."""
    return tuple(map(int, re.findall(r"\d+", version)[:3])) < (3, 7, 1)


MISSING = tl.constexpr(leaves_out_the_fence(triton.__version__) and not knobs.runtime.interpret)


@tl.core.builtin
def _fence_on_sm_90(_semantic=None):
    """Not pure, so that it stays between the wait for the copies and the product."""
    if _semantic.builder.options.arch.startswith("sm9"):
        code = "fence.proxy.async.shared::cta; // $0"  # an operation has a result: a register that nothing writes
        tl.inline_asm_elementwise(code, "=r", [], tl.int32, is_pure=False, pack=1, _semantic=_semantic)


@triton.jit
def proxy_fence(operand, PRECISION: tl.constexpr):
    """Comes before each `tl.dot` of a loop that loads its operands; exact fp32 products use no matrix cores."""
    if MISSING and (operand.dtype != tl.float32 or PRECISION != "ieee"):
        _fence_on_sm_90()


def safe_stages(stages: int, chip: str) -> int:
    """The stages of a loop of matrix products: `stages`, or 1 where it must not copy ahead for want of a fence.

    On sm_100 products run in a stage of their own, in which Triton's pipeliner allows no inline assembly.
    """
    if not (MISSING.value and chip.startswith("sm_10")):
        return stages
    _warn_of_one_stage(chip)
    return 1


@cache
def _warn_of_one_stage(chip: str) -> None:
    logging.getLogger("dynmoe_tutel").warning(
        "Triton %s leaves out a memory fence on %s, so matrix products run without pipelining, more slowly. "
        "Triton 3.7.1 or later has the fence",
        triton.__version__, chip,
    )  # fmt: skip
