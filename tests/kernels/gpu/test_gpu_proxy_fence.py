"""What the kernels do where Triton leaves out the fence; the tests of `benchmarks.aot` read the compiled code."""

from __future__ import annotations

import pytest
import triton.language as tl

from dynmoe_tutel.kernels.gpu import proxy_fence


def test_versions_without_the_fence() -> None:
    without = ("3.6.0", "3.6.0+git9844da95", "3.7.0", "3.7.0rc1")
    having = ("3.7.1", "3.7.1+gitabc", "3.10.0", "4.0.0")
    found = [version for version in (*without, *having) if proxy_fence.leaves_out_the_fence(version)]
    assert found == list(without)


@pytest.mark.parametrize("missing", [True, False])
@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100", "sm_103", "sm_120", "gfx942", "interpreter"])
def test_loops_copy_ahead_except_on_sm_100_without_the_fence(
    chip: str, missing: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(proxy_fence, "MISSING", tl.constexpr(missing))
    proxy_fence._warn_of_one_stage.cache_clear()
    one = missing and chip in ("sm_100", "sm_103")
    assert [proxy_fence.safe_stages(3, chip) for _ in range(2)] == [1 if one else 3] * 2
    assert caplog.text.count("without pipelining") == one
