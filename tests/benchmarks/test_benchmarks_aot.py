"""Ahead-of-time compilation of the Triton kernels: it compiles and judges all of them, and finds the wrong ones.

The test process may run Triton's interpreter, in which nothing compiles, so each compilation has its own process.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import PATIENCE

pytest.importorskip("triton", reason="Triton is not installed")
ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")

TOYS = '''
import triton
import triton.language as tl
from dynmoe_tutel.kernels.gpu.proxy_fence import proxy_fence


@triton.jit
def spilling_kernel(x, out, N: tl.constexpr):
    """More live values than registers: all of them are needed again after their sum."""
    n = tl.arange(0, N)
    v = tl.load(x + n)
    tl.store(out + n, v / tl.sum(v, axis=0))


@triton.jit
def matrix_kernel(x, out, M: tl.constexpr):
    """One product, [M, 64] by [64, 64]."""
    m, k = tl.arange(0, M), tl.arange(0, 64)
    a = tl.load(x + m[:, None] * 64 + k[None, :])
    b = tl.load(x + k[:, None] * 64 + k[None, :])
    tl.store(out + m[:, None] * 64 + k[None, :], tl.dot(a, b).to(tl.bfloat16))


@triton.jit
def looped_kernel(x, out, K, FENCE: tl.constexpr):
    """A product in a loop that copies ahead, [64, K] by [K, 64], with the package's fence or with Triton's alone."""
    m, k = tl.arange(0, 64), tl.arange(0, 64)
    acc = tl.zeros((64, 64), tl.float32)
    for k0 in range(0, K, 64):
        a = tl.load(x + m[:, None] * K + (k0 + k)[None, :])
        b = tl.load(x + (k0 + k)[:, None] * 64 + m[None, :])
        if FENCE:
            proxy_fence(a, "ieee")
        acc = tl.dot(a, b, acc)
    tl.store(out + m[:, None] * 64 + m[None, :], acc.to(tl.bfloat16))


@triton.jit
def rows_kernel(x, out, N, REDUCED: tl.constexpr):
    """One product, stored as rows [64, N] from a column on that the compiler knows the alignment of, or does not."""
    m, k = tl.arange(0, 64), tl.arange(0, 64)
    a = tl.load(x + m[:, None] * 64 + k[None, :])
    first = tl.program_id(0) * 64
    if REDUCED:
        first = tl.min(first + k, axis=0)
    n = first + k
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(a, a).to(tl.bfloat16), mask=n[None, :] < N)


@triton.jit
def arguments_kernel(tensor, none, one, sixteen, seventeen, large, flag, ratio, BLOCK: tl.constexpr):
    """Arguments of every kind."""
    tl.store(tensor + tl.arange(0, BLOCK), ratio)
'''


def python(code: str, directory: Path, **environment: str) -> str:
    """Run the code without Triton's interpreter, with the kernels of module `toys`; return what it prints."""
    (directory / "toys.py").write_text(TOYS)
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT), str(directory)])
    program = ["import json, toys, torch", "from dataclasses import asdict, replace"]
    program += ["from benchmarks import aot", "from benchmarks.launches import record", code]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(program)],
        cwd=ROOT,
        env={**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def toy(call: str, tmp_path: Path, arch: str = "sm_90", module: str = "toys") -> dict:
    """The report and judgement of the one launch that `call` makes."""
    code = f"""
with record.recording() as found:
    {call}
report = aot.compile_one({arch!r}, found[0])
report = replace(report, module={module!r})
print(json.dumps({{**asdict(report), "problems": aot.judge(report)}}))
"""
    return json.loads(python(code, tmp_path).splitlines()[-1])


@pytest.mark.slow
def test_every_kernel_of_the_representative_set_is_right(tmp_path: Path) -> None:
    """`make test` guards this: no spill, no overflow of shared memory, matrix instructions; four architectures."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.aot", "--jobs", "1", "--out", str(tmp_path / "reports.json")]
    done = subprocess.run(command, cwd=ROOT, env={**kept, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    for arch in ARCHITECTURES:
        assert f"### {arch}, Triton" in done.stdout
    reports = json.loads((tmp_path / "reports.json").read_text())
    assert "threshold_gate_kernel" in {r["kernel"] for r in reports if r["arch"] == "sm_89"}
    by_size = {"join_pieces_kernel"}  # launched where a product is split, which the number of multiprocessors decides
    seen = {arch: {r["kernel"] for r in reports if r["arch"] == arch} - by_size for arch in ARCHITECTURES}
    assert len({frozenset(kernels) for kernels in seen.values()}) == 1, "an architecture misses a kernel"
    sources = "".join(path.read_text() for path in (ROOT / "kernels" / "gpu").glob("*.py"))
    defined = set(re.findall(r"^def (\w+_kernel)\(", sources, re.MULTILINE))
    reached = {r["kernel"] for r in reports}
    assert defined - reached <= NOT_IN_THE_SET, f"no launch of {defined - reached}"
    assert all(r["registers"] > 0 for r in reports)
    for name in ("up_kernel", "linear_kernel", "activation_gradient_kernel", "weight_gradient_kernel"):
        assert all(r["matrix"]["wgmma"] for r in reports if (r["arch"], r["kernel"]) == ("sm_90", name))


# only for the widest reduction and fixed-k gates: --all compiles it
NOT_IN_THE_SET = {"join_pieces_kernel"}


class TestJudgement:
    @pytest.mark.parametrize(("arch", "N"), [("sm_90", 2**14), ("gfx942", 2**16)])
    def test_a_spilling_kernel(self, arch: str, N: int, tmp_path: Path) -> None:
        """One warp needs 512 and 1,024 values per thread but has 255 and 512 registers."""
        tensors = "*(torch.empty(65536, device='meta'),) * 2"
        found = toy(f"toys.spilling_kernel[(1,)]({tensors}, {N}, num_warps=1)", tmp_path, arch)
        assert found["spilled"] > 0
        assert any(p.startswith("spills") for p in found["problems"])

    def test_too_much_shared_memory(self, tmp_path: Path) -> None:
        code = """
report = aot.Report("sm_80", "m", "k", "bf16", "", shared_memory=200 * 1024)
print(json.dumps([aot.judge(report), aot.judge(replace(report, arch="sm_90")),
                  aot.judge(replace(report, arch="gfx942", shared_memory=64 * 1024 + 1))]))
"""
        small, large, amd = json.loads(python(code, tmp_path))
        assert "shared memory" in small[0]
        assert large == []
        assert "gfx942 has 65536" in amd[0]

    @pytest.mark.parametrize("rows", [16, 64])
    def test_wgmma_is_asked_of_the_expert_networks_on_sm_90(self, rows: int, tmp_path: Path) -> None:
        """The compiler uses wgmma with 64 rows and 4 warps; 16 rows are too few, and two warps are no warpgroup."""
        call = "toys.matrix_kernel[(1,)](*(torch.empty(64, 64, device='meta', dtype=torch.bfloat16),) * 2, {})"
        found = toy(call.format(f"{rows}, num_warps=4"), tmp_path, module="gemm_kernels")
        assert bool(found["matrix"]["wgmma"]) == (rows >= 64)
        assert found["matrix"]["wgmma"] or found["matrix"]["mma"]
        assert found["problems"] == []
        assert found["dots"] == [{"M": rows, "N": 64, "K": 64, "dtype": "bf16"}]

    def test_a_matrix_kernel_without_wgmma(self, tmp_path: Path) -> None:
        code = """
dots = (aot.Dot(128, 128, 64, "bf16"),)
report = aot.Report("sm_90", "gemm_kernels", "up_kernel", "bf16", "", warps=8, dots=dots, matrix={"mma": 32})
variants = [report, replace(report, module="threshold_gate"), replace(report, arch="sm_80"),
            replace(report, matrix={"wgmma": 4}), replace(report, matrix={}),
            replace(report, matrix={}, dots=(aot.Dot(128, 128, 64, "f32"),))]
print(json.dumps([aot.judge(r) for r in variants]))
"""
        found = json.loads(python(code, tmp_path))
        assert found[0] == ["is a matrix kernel without wgmma"]
        assert found[1:4] == [[], [], []]
        assert "has a product in half precision and no matrix instruction" in found[4]
        assert found[5] == []

    @pytest.mark.parametrize("reduced", [False, True])
    def test_rows_that_are_stored_element_by_element(self, reduced: bool, tmp_path: Path) -> None:
        """The epilogues once did this: the compiler knows no alignment of a first column that a reduction gives."""
        call = (
            f"toys.rows_kernel[(1,)](*(torch.empty(64, 64, device='meta', dtype=torch.bfloat16),) * 2, 64, {reduced})"
        )
        found = toy(call, tmp_path, module="gemm_kernels")
        assert bool(found["single_stores"]) == reduced
        assert any("element by element" in problem for problem in found["problems"]) == reduced

    def test_a_product_that_reads_copies_without_a_fence(self, tmp_path: Path) -> None:
        """Triton before 3.7.1 leaves it out: the package's rule of versions is what the installed compiler does."""
        code = """
from dynmoe_tutel.kernels.gpu import proxy_fence
with record.recording() as found:
    for fence in (False, True):
        toys.looped_kernel[(1,)](*(torch.empty(16384, device='meta', dtype=torch.bfloat16),) * 2, 256, fence)
reports = [aot.compile_one("sm_90", launch) for launch in found]
assert all(report.matrix["wgmma"] for report in reports)
print(json.dumps([proxy_fence.MISSING.value, [aot.judge(report) for report in reports]]))
"""
        missing, (without, with_fence) = json.loads(python(code, tmp_path))
        assert without == ["has no fence between copies to shared memory and 4 matrix instructions"] * missing
        assert with_fence == []

    def test_a_kernel_that_does_not_compile_is_reported(self, tmp_path: Path) -> None:
        found = toy("toys.matrix_kernel[(1,)](*(torch.empty(64, device='meta'),) * 2, 63)", tmp_path)
        assert found["problems"][0].startswith("does not compile: ")


REFUSING = """
import errno, subprocess
from benchmarks.common import patience
patience.time.sleep = lambda seconds: slept.append(seconds)
slept, tools, start = [], [], subprocess.Popen

class Refusing(start):
    def __init__(self, command, *rest, **options):
        tools.append(str(command[0]).rsplit("/", 1)[-1])
        if len([tool for tool in tools if tool == TOOL]) <= TIMES and tools[-1] == TOOL:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        super().__init__(command, *rest, **options)

subprocess.Popen = Refusing
with record.recording() as found:
    toys.matrix_kernel[(1,)](*(torch.empty(64, 64, device='meta', dtype=torch.bfloat16),) * 2, 64, num_warps=4)
aot.record = lambda *_: found
status = aot.main(["--arch", "sm_90", "--jobs", "1"])
print(json.dumps([status, slept, tools]))
"""


class TestABusyMachine:
    """Regression: if a tool could not start, the kernel was "wrong: does not compile"."""

    @pytest.mark.parametrize("tool", ["ptxas", "cuobjdump"])
    @pytest.mark.parametrize("times", [2, 99])
    def test_a_refused_tool_is_tried_again_and_no_wrong_kernel(self, tool: str, times: int, tmp_path: Path) -> None:
        code = f"TOOL, TIMES = {tool!r}, {times}\n{REFUSING}"
        *said, last = python(code, tmp_path, TRITON_CACHE_DIR=str(tmp_path / "cache")).splitlines()
        status, slept, tools = json.loads(last)
        assert tool in tools
        assert slept == [0.5, 2.0, 8.0][:times]
        text = "\n".join(said)
        assert ", 0 wrong" in text
        assert "WRONG" not in text
        assert status == (0 if times == 2 else 101)
        assert ("1 not judged: a tool could not be started" in text) == (times == 99)
        assert ("NOT STARTED sm_90 matrix_kernel" in text) == (times == 99)

    def test_one_that_waited_in_vain_is_followed_by_single_tries(self, tmp_path: Path) -> None:
        """The single tries last until a tool starts again."""
        code = """
from benchmarks.common import patience
slept, calls = [], []
patience.time.sleep = slept.append
class Kernel:
    def compile(self, target):
        calls.append(target)
        raise OSError("no memory") if len(calls) != 6 else ValueError("wrong")
    module, kernel, configuration = "m", "k", "c"
    types = lambda self: "bf16"
found = list(aot.compile_all([("sm_90", Kernel())] * 5, 1))
print(json.dumps([[bool(r.not_started) for r in found], [bool(r.error) for r in found], slept]))
"""
        not_started, wrong, slept = json.loads(python(code, tmp_path))
        assert not_started == [True, True, False, True, True]
        assert wrong == [False, False, True, False, False]
        assert slept == [0.5, 2.0, 8.0] * 2

    def test_a_process_that_ends_is_no_wrong_kernel(self, tmp_path: Path) -> None:
        """Another process compiles the kernels that it had not reported, or they are not judged."""
        (tmp_path / "ending.py").write_text("""
import os, signal
from benchmarks import aot

def compile_one(arch, launch):
    if launch.kernel == "up_kernel":
        os.kill(os.getpid(), signal.SIGKILL)
    return aot.Report(arch, "m", launch.kernel, "bf16", "")
""")
        code = """
import ending
from benchmarks.common import patience
patience.time.sleep = lambda seconds: None
launch = record.Launch("m", "k", (), (), (), ())
tasks = [("sm_90", replace(launch, kernel=name)) for name in ("a", "b", "up_kernel", "c")]
aot.compile_one = ending.compile_one
found = list(aot.compile_all(tasks, 2))
print(json.dumps([[r.kernel, bool(r.not_started), aot.judge(r)] for r in found]))
"""
        found = json.loads(python(code, tmp_path))
        assert found == [["a", False, []], ["b", False, []], ["up_kernel", True, []], ["c", False, []]]


def test_what_is_wrong_is_the_exit_status(tmp_path: Path) -> None:
    """The command returns the number of kernels with a spill, an overflow, no wgmma or no fence.

    101 if some could not be judged and none is wrong.
    """
    code = """
right = aot.Report("sm_90", "gemm_kernels", "up_kernel", "bf16", "", 8, 128, 1024, 0, (aot.Dot(128, 128, 64, "bf16"),),
                   {"wgmma": 4})
wrong = [replace(right, spilled=8), replace(right, shared_memory=228 * 1024), replace(right, matrix={"mma": 32}),
         replace(right, single_stores=64), replace(right, unfenced=4), replace(right, error="CompilationError")]
aot.record = lambda *_: []
found = []
unknown = replace(right, not_started="BlockingIOError")
for reports in ([right], *([right, report] for report in wrong), [right, *wrong], [right, unknown], [unknown, *wrong]):
    aot.compile_all = lambda tasks, jobs, reports=reports: iter(reports)
    found.append(aot.main(["--arch", "sm_90"]))
print(json.dumps(found))
"""
    assert json.loads(python(code, tmp_path).splitlines()[-1]) == [0, 1, 1, 1, 1, 1, 1, 6, 101, 6]


AS_IF_MISSING = """
from benchmarks.common.ptx import unfenced_products
from dynmoe_tutel.kernels.gpu import proxy_fence
proxy_fence.MISSING = type(proxy_fence.MISSING)(True)
own, compiler = "fence.proxy.async.shared::cta; //", "fence.proxy.async.shared::cta;\\n"
"""


def test_our_fence_stays_before_the_product(tmp_path: Path) -> None:
    """On sm_90, under every version of Triton; sm_80 and AMD have no such instruction."""
    code = f"""{AS_IF_MISSING}
with record.recording() as found:
    toys.looped_kernel[(1,)](*(torch.empty(16384, device='meta', dtype=torch.bfloat16),) * 2, 256, True)
code = {{arch: found[0].compile(aot.ARCHITECTURES[arch].target).asm for arch in ("sm_80", "sm_90", "gfx942")}}
ptx = code["sm_90"]["ptx"].replace(compiler, "")
print(json.dumps([ptx.count(own), unfenced_products(ptx), unfenced_products(ptx.replace(own, "//")),
                  own in code["sm_80"]["ptx"], own in code["gfx942"]["amdgcn"]]))
"""
    assert json.loads(python(code, tmp_path)) == [1, 0, 4, False, False]


@pytest.mark.slow
def test_every_loop_of_products_has_our_fence_where_triton_has_none(tmp_path: Path) -> None:
    """Triton's own fences are taken out of the code."""
    code = f"""{AS_IF_MISSING}
launches = aot.record("sm_90", [(aot.Shape(4096, 64, 64, 64, 2), torch.bfloat16, aot.VARIANTS["default"], False)])
found = {{}}
for launch in {{l.kernel: l for l in launches if dict(l.options).get("num_stages", 1) > 1}}.values():
    ptx = launch.compile(aot.ARCHITECTURES["sm_90"].target).asm["ptx"].replace(compiler, "")
    if "wgmma.mma_async" in ptx:
        found[launch.kernel] = unfenced_products(ptx), unfenced_products(ptx.replace(own, "//")) > 0
print(json.dumps(found))
"""
    names = ("up", "linear", "activation_gradient", "weight_gradient", "threshold_gate", "unit_gradient")
    assert json.loads(python(code, tmp_path)) == {f"{name}_kernel": [0, True] for name in names}


def test_without_a_fence_on_sm_100_no_product_copies_ahead(tmp_path: Path) -> None:
    """Triton's pipeliner takes no inline assembly there: every loop of products has one stage."""
    code = """
from dynmoe_tutel.kernels.gpu import proxy_fence
found = []
for missing in (True, False):
    proxy_fence.MISSING = type(proxy_fence.MISSING)(missing)
    launches = aot.record("sm_100", [(aot.Shape(4096, 64, 64, 8, 2), torch.bfloat16, aot.VARIANTS["default"], False)])
    with_stages = {l.kernel for l in launches if dict(l.options).get("num_stages", 1) > 1}
    found.append(sorted(with_stages))
print(json.dumps(found))
"""
    missing, fenced = json.loads(python(code, tmp_path))
    # the gradient of the scores multiplies 16 rows: without tcgen05.mma
    assert missing == [name for name in fenced if name == "cosine_gradient_kernel"]
    assert {"up_kernel", "weight_gradient_kernel", "threshold_gate_kernel", "unit_gradient_kernel"} < set(fenced)


def test_launches_are_specialised_as_triton_does(tmp_path: Path) -> None:
    code = """
x = torch.empty(64, dtype=torch.bfloat16, device="meta")
with record.recording() as found:
    for tensor in (x, x[1:]):
        toys.arguments_kernel[(4,)](tensor, None, 1, 16, 17, 2**31, True, 0.5, BLOCK=16, num_warps=8)
with record.recording(hip=True) as hip:
    toys.arguments_kernel[lambda meta: (meta["BLOCK"],)](x, None, 1, 16, 17, 2**31, True, 0.5, BLOCK=16)
print(json.dumps([[dict(l.signature), l.constants, l.attributes, l.options] for l in (*found, *hip)]))
"""
    whole, view, hip = json.loads(python(code, tmp_path))
    assert whole[0] == {
        "tensor": "*bf16", "none": "constexpr", "one": "constexpr", "sixteen": "i32", "seventeen": "i32",
        "large": "i64", "flag": "i1", "ratio": "fp32", "BLOCK": "constexpr",
    }  # fmt: skip
    assert whole[1] == [[1, None], [2, 1], [8, 16]]
    divisible = ["tt.divisibility", 16]
    assert whole[2] == [[0, [divisible]], [3, [divisible]], [5, [divisible]]]
    assert whole[3] == [["num_warps", 8]]
    assert view[2] == whole[2][1:], "a view at an odd offset is not divisible"
    assert hip[2][0] == [0, [divisible, ["tt.pointer_range", 32]]]


def test_an_empty_grid_is_refused(tmp_path: Path) -> None:
    code = """
with record.recording():
    try:
        toys.arguments_kernel[(0,)](torch.empty(16, device="meta"), None, 1, 16, 17, 5, True, 0.5, BLOCK=16)
    except ValueError as error:
        print(error)
"""
    assert "has no program" in python(code, tmp_path)


def test_the_interpreter_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.aot"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "Unset it" in done.stderr


def test_an_entry_of_the_tuned_table_is_compiled(tmp_path: Path) -> None:
    """For each entry some operation uses exactly its bucket."""
    code = """
from dynmoe_tutel.kernels.gpu import tiles
asked, choose = set(), tiles.gemm
def gemm(kind, device, dtype, rows, K, N):
    asked.add(tiles.gemm_key(kind, dtype, rows, K, N))
    return choose(kind, device, dtype, rows, K, N)
tiles.gemm = gemm
entries = {tiles.gemm_key(kind, torch.bfloat16, 512, 256, 768): tiles.default_gemm(
    kind, "sm_90", torch.bfloat16, 512, 256, 768) for kind in tiles.GEMM_KINDS}
tiles.tuned = lambda chip: entries
cases = [(s, d, aot.VARIANTS["default"], False) for s, d in aot.tuned_shapes("sm_90")]
aot.record("sm_90", cases)
print(json.dumps(sorted(set(entries) - asked)))
"""
    assert json.loads(python(code, tmp_path).splitlines()[-1]) == []


def test_numbers_that_change_every_step_make_no_new_kernel(tmp_path: Path) -> None:
    """Regression: rows, capacities and splits of 1 or multiples of 16 compiled new kernels in the middle of a run."""
    code = """
from dynmoe_tutel.kernels.gpu import dispatch_combine, gemm_kernels, ragged_index
numbers = {"R", "capacity", "SPLIT", "S"}
for module in (dispatch_combine, gemm_kernels, ragged_index):
    for kernel in (value for name, value in vars(module).items() if name.endswith("_kernel")):
        for parameter in getattr(kernel, "params", ()):
            if parameter.name in numbers and not parameter.do_not_specialize:
                print(kernel.fn.__name__, parameter.name)
bits = torch.empty(64, 1, dtype=torch.int64, device="meta")
with record.recording() as found:
    for capacity in (1, 16, 17):
        ragged_index.ragged_index(bits, 8, capacity)
        ragged_index.bound_assignments(bits, torch.empty(64, 8, device="meta"), capacity)
print(len([l for l in found if l.kernel in ("fill_kernel", "drop_kernel")]))
"""
    assert python(code, tmp_path).splitlines() == ["2"]
