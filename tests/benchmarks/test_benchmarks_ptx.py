"""Which matrix products may read copies in shared memory without a fence, by assembly written for the test."""

from __future__ import annotations

import pytest

from benchmarks.common.ptx import unfenced_products

WAIT = "cp.async.wait_group \t2;"
FENCE = "fence.proxy.async.shared::cta; // %r344"
PRODUCT = "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, 1, 1, 1, 0, 0;"
ELECTED = "@%p24 tcgen05.mma.cta_group::1.kind::f16 [ %r367 + 0 ], %rd68, %rd69, %r160, %p23;"


def found(*lines: str) -> int:
    """Of a kernel with these lines."""
    body = "\n\t".join(lines)
    return unfenced_products(f".visible .entry kernel(\n)\n{{\n$L__func_begin0:\n\t{body}\n\tret;\n}}")


@pytest.mark.parametrize("product", [PRODUCT, ELECTED])
def test_a_fence_between_the_wait_and_the_product(product: str) -> None:
    assert found(WAIT, "bar.sync \t0;", FENCE, product, product) == 0
    assert found(WAIT, "bar.sync \t0;", product, product) == 2
    assert found(FENCE, WAIT, product, FENCE, product) == 1, "a fence before the wait orders nothing"
    assert found(product) == 0, "operands that were not copied"


@pytest.mark.parametrize(
    ("fence", "wait", "expected"),
    [
        ("fence.proxy.async;", "cp.async.wait_all;", 0),
        ("@%p1 fence.proxy.async;", WAIT, 1),  # some threads only
        ("fence.proxy.async.global;", WAIT, 1),
        ("fence.acq_rel.cta;", WAIT, 1),
        ("wgmma.fence.sync.aligned;", WAIT, 1),  # of registers
        ("// fence.proxy.async;", WAIT, 1),
        ("bar.sync 0;", "cp.async.bulk.wait_group 0;", 0),  # these copies are made by the async proxy itself
    ],
)
def test_which_instructions_count(fence: str, wait: str, expected: int) -> None:
    assert found(wait, fence, PRODUCT) == expected


def test_a_loop_brings_the_wait_before_the_product() -> None:
    """In the order of the text, each of these has its fence."""
    head, again = "$L__BB0_2:   // =>This Inner Loop Header: Depth=1", "@%p1 bra \t$L__BB0_2;"
    assert found(WAIT, FENCE, head, PRODUCT, WAIT, again) == 1
    assert found(WAIT, head, FENCE, PRODUCT, WAIT, again) == 0
    assert found(WAIT, FENCE, head, PRODUCT, WAIT, FENCE, again) == 0


def test_a_path_around_the_fence() -> None:
    around = ["@%p1 bra \t$L__BB0_2;", FENCE, "$L__BB0_2:"]
    assert found(WAIT, *around, PRODUCT) == 1
    elected = ["@!%p1 bra.uni \t$L__BB0_2;", ELECTED, "$L__BB0_2:"]
    assert found(WAIT, FENCE, *elected) == 0
    assert found(WAIT, *elected, ELECTED) == 2


def test_what_no_path_reaches() -> None:
    assert found("bra.uni \t$L__BB0_2;", "$L__BB0_1:", WAIT, "ret;", "$L__BB0_2:", PRODUCT) == 0
    assert found(FENCE, "bra.uni \t$L__BB0_3;", "$L__BB0_2:", PRODUCT, "ret;", "$L__BB0_3:", WAIT) == 0
    assert found("bra.uni \t$L__BB0_3;", "$L__BB0_2:", PRODUCT, "ret;", "$L__BB0_3:", WAIT, "bra \t$L__BB0_2;") == 1
