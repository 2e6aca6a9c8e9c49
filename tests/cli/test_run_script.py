"""`dynmoe-tutel run` runs a script as python does, lets it find `tutel`, and restores the process afterwards."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import PATIENCE
from script_case import call, write

from dynmoe_tutel import tutel_stand_in
from dynmoe_tutel.cli.run_script import run

if tutel_stand_in.tutel_is_importable():
    pytest.skip("Tutel is installed: its own tests run scripts with it", allow_module_level=True)

# what python sets, as a script sees it
SEES = """
import json, os, sys
main = sys.modules["__main__"]
print(json.dumps([sys.argv, sys.path[0], __name__, __file__, __package__ or "", main.__dict__ is globals()]))
"""

UPSTREAM = """
import argparse
import logging
import torch
import torch.nn as nn
from tutel import moe as tutel_moe
import tutel.impls.moe_layer as moe_layer

parser = argparse.ArgumentParser()
parser.add_argument("--gate_type", required=True)
parser.add_argument("--max_expert_num", type=int, default=6)
args = parser.parse_args()
torch.manual_seed(0)


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mlp = tutel_moe.moe_layer(
            gate_type={"type": args.gate_type, "max_expert_num": args.max_expert_num, "adaptive_experts": True,
                       "fp32_gate": True},
            experts={"type": "ffn", "count_per_node": 2, "hidden_size_per_expert": 32,
                     "activation_fn": lambda x: nn.functional.gelu(x)},
            model_dim=dim, batch_prioritized_routing=True, is_gshard_loss=False, one_score_gate=False,
            normalize_one_score_gate=False, update_momentum=0.0)

    def forward(self, x):
        y = self.mlp(self.norm(x))
        self.aux_loss = y.l_aux
        return x + y


model = nn.Sequential(nn.Linear(8, 16), Block(16), Block(16), nn.Linear(16, 2))
layers = [m for m in model.modules() if isinstance(m, moe_layer.MOELayer)]
assert len(layers) == 2 and all(m.max_num_local_experts == args.max_expert_num for m in layers)
for m in layers:
    weight = torch.randn(32, 16) / 4
    m.experts.batched_fc1_w.data.copy_(weight.expand_as(m.experts.batched_fc1_w))
    m.gates[0].experts_mask.requires_grad = False
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
x = torch.randn(64, 5, 8)
target = (x[..., 0] * x[..., 1] > 0).long()
losses, counts = [], []
for step in range(16):
    if step % 8 == 4:
        for m in layers:
            m.begin_record_routing()
    loss = nn.functional.cross_entropy(model(x).flatten(0, 1), target.flatten())
    loss = loss + 0.01 * sum(block.mlp.l_aux for block in (model[1], model[2]))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    if step % 8 == 7:
        for m in layers:
            assert int(m.get_routing_records().sum()) > 0
            m.adaptive_update_experts()
            counts.append(m.num_global_experts)
assert losses[-1] < losses[0], losses
print("experts", *counts)
"""


def python(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the same with plain python."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=cwd)


@pytest.mark.parametrize("gate_type", ["gated_multi_gate", "gated_multi_gate_t"])
def test_an_upstream_script_trains_and_adapts(gate_type: str, tmp_path: Path) -> None:
    script = write(tmp_path, UPSTREAM)
    done = call(script, "--gate_type", gate_type, "--max_expert_num", "4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()  # no layer prints
    assert done.stderr.count("dynmoe_tutel INFO: adaptive update: from ") == 4
    counts = [int(count) for count in line.removeprefix("experts ").split()]
    assert len(counts) == 4
    assert all(1 <= count <= 4 for count in counts)


OPTIONS = ["--help", "-m", "x", "--", "-h", "--version", ""]


@pytest.mark.parametrize(
    "arguments",
    [
        ["code/script.py", *OPTIONS],
        ["{folder}/code/script.py"],
        ["link.py", "run"],
        ["{folder}/package", "a"],
        ["-m", "package", *OPTIONS],
        ["-mother", "-x"],
    ],
)
def test_a_script_sees_what_python_shows_it(arguments: list[str], tmp_path: Path) -> None:
    for folder in ("code", "package"):
        (tmp_path / folder).mkdir()
    write(tmp_path / "code", SEES)
    write(tmp_path / "package", SEES, "__main__.py")
    write(tmp_path, SEES, "other.py")
    (tmp_path / "link.py").symlink_to(tmp_path / "code" / "script.py")
    given = [argument.format(folder=tmp_path) for argument in arguments]
    by_python, ours = python(*given, cwd=tmp_path), call(*given, cwd=tmp_path)
    assert ours.returncode == 0, ours.stderr
    assert json.loads(ours.stdout) == json.loads(by_python.stdout)


def test_a_thread_that_the_script_leaves_still_finds_tutel(tmp_path: Path) -> None:
    code = """
import sys, threading, time
def script_runs():
    frame = sys._current_frames()[threading.main_thread().ident]
    while frame and frame.f_code.co_filename != __file__:
        frame = frame.f_back
    return bool(frame)
def late():
    while script_runs():
        time.sleep(0.01)
    from tutel import net
    print(net.get_world_size())
threading.Thread(target=late).start()
"""
    done = call(write(tmp_path, code), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


CHILD = """
import multiprocessing, os, sys

def seen(queue):
    import tutel.impls.moe_layer
    from tutel import net
    queue.put([net.get_world_size(), os.getcwd(), sys.path, sys.argv])

def child(queue, context, depth):
    if depth == 0:
        return seen(queue)
    process = multiprocessing.get_context(context).Process(target=child, args=(queue, context, depth - 1))
    process.start()
    process.join()

if __name__ == "__main__":
    os.chdir(sys.argv[2])
    from tutel import moe
    import tutel.impls.moe_layer
    context = multiprocessing.get_context(sys.argv[1])
    queue, parent = context.Queue(), multiprocessing.get_context("fork").SimpleQueue()
    child(queue, sys.argv[1], 2)
    seen(parent)
    got, own = queue.get(), parent.get()
    assert got[0] == 1 and got[2:4] == own[2:4], (got, own)
    print("alike")
"""


@pytest.mark.parametrize("context", ["spawn", "forkserver", "fork"])
@pytest.mark.parametrize("as_module", [False, True])
def test_children_of_children_find_tutel(context: str, as_module: bool, tmp_path: Path) -> None:
    """They start in a folder from which this package cannot be imported."""
    script = write(tmp_path, CHILD)
    (tmp_path / "elsewhere").mkdir()
    target = ["-m", "script"] if as_module else [script]
    done = call(*target, context, tmp_path / "elsewhere", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "alike\n", "")


PRELOADED = """
import multiprocessing
from tutel import net

def rank(queue):
    queue.put(net.get_world_size())

if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "tutel.moe"])
    queue = context.SimpleQueue()
    context.Process(target=rank, args=(queue,)).start()
    print(queue.get())
"""


def test_a_fork_server_that_preloads_the_script(tmp_path: Path) -> None:
    done = call(write(tmp_path, PRELOADED), cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


OPEN = {
    "threads": "pool = concurrent.futures.ThreadPoolExecutor(2); print(pool.submit(int, 3).result())",
    "processes": "pool = concurrent.futures.ProcessPoolExecutor(1); print(pool.submit(int, 3).result())",
    "pool": "pool = multiprocessing.Pool(1); print(pool.apply(int, [3]))",
    "thread pool": "pool = multiprocessing.pool.ThreadPool(1); print(pool.apply(int, [3]))",
    "daemon": "threading.Thread(target=time.sleep, args=(1e6,), daemon=True).start()",
    "work left": "pool = concurrent.futures.ThreadPoolExecutor(1); [pool.submit(time.sleep, 1), pool.submit(print, 3)]",
    "an exception": "pool = concurrent.futures.ThreadPoolExecutor(1); pool.submit(int, 3); 1 / 0",
    "an exit code": "pool = concurrent.futures.ThreadPoolExecutor(1); pool.submit(int, 3); sys.exit(5)",
    "exit functions": "atexit.register(lambda: print(sys.argv[1:], vars(sys.modules['__main__']) is globals()))",
}


@pytest.mark.parametrize("left", OPEN)
def test_a_script_ends_when_python_would_end_it(left: str, tmp_path: Path) -> None:
    imports = "import atexit, concurrent.futures, multiprocessing.pool, sys, threading, time\n"
    script = write(tmp_path, f"{imports}if __name__ == '__main__':\n    {OPEN[left]}\n")
    by_python, ours = python(script, "a", cwd=tmp_path), call(script, "a", cwd=tmp_path)
    assert (ours.returncode, ours.stdout, ours.stderr) == (by_python.returncode, by_python.stdout, by_python.stderr)


def test_no_extra_is_needed(tmp_path: Path) -> None:
    """Modules of the extra that cannot be imported stand for an installation without them."""
    script = write(tmp_path, "import sys, tutel.moe\nprint('ran', sys.argv[1:])\n")
    code = "import sys\nfor name in ('typer', 'rich', 'click', 'safetensors', 'sklearn', 'matplotlib'):\n"
    code += "    sys.modules[name] = None\nfrom dynmoe_tutel.cli import main\nmain()\n"
    done = python("-c", code, "run", script, "--help", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ran ['--help']\n", "")
    done = python("-c", code, "run", "nowhere.py", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    done = python("-c", code, "run", "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "run -m MODULE ARGS..." in done.stdout
    done = python("-c", code, "train", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "dynmoe-tutel needs typer" in done.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit(3)",
        "import sys; sys.exit()",
        "import sys; sys.exit(-1)",
        "import sys; sys.exit('a reason')",
        "def f():\n    raise OSError('no')\nf()",
        "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise ValueError('from') from e",
        "x = (",
        "import nowhere_at_all",
        "raise ImportError('of the script')",
        "def f(x: 1 + 1): ...\nprint(f.__annotations__)",
        "import atexit; atexit.register(print, 'bye')",
        "import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))) is A)",
    ],
)
def test_exit_code_output_and_traceback_are_pythons(code: str, tmp_path: Path) -> None:
    script = write(tmp_path, code + "\n")
    by_python, ours = python(script, cwd=tmp_path), call(script, cwd=tmp_path)
    assert (ours.returncode, ours.stdout) == (by_python.returncode, by_python.stdout)
    assert ours.stderr == by_python.stderr


def test_an_interrupted_script_ends_with_130(tmp_path: Path) -> None:
    done = call(write(tmp_path, "raise KeyboardInterrupt"), cwd=tmp_path)
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == "KeyboardInterrupt"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.py", "--help"], "script 'nowhere.py' does not exist: give SCRIPT ARGS..."),
        (["empty"], "script 'empty' is a folder without __main__.py"),
        (["-m"], "-m '' is not the name of a module"),
        (["-m", "./script.py"], "-m './script.py' is not the name of a module"),
        (["-m", "nowhere.below"], "module 'nowhere.below' does not exist"),
        (["-m", "os.nowhere"], "module 'os.nowhere' does not exist"),
        (["-c", "1"], "unknown option '-c' before the script"),
    ],
)
def test_what_cannot_be_run_gives_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as refused:
        run(arguments)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="nothing to run"):
        run([])


def test_the_command_refuses_a_missing_script_with_2(tmp_path: Path) -> None:
    done = call("nowhere.py", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("Error: script 'nowhere.py' does not exist")


def test_the_process_is_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys, logging, tutel.moe\nsys.path.append('x')\nsys.argv.append('y')\nsys.exit(4)\n"
    logger = logging.getLogger("dynmoe_tutel")

    def state() -> list[object]:
        tutel = sorted(name for name in sys.modules if name.split(".")[0] == "tutel")
        log = [*logger.handlers, logger.level, logger.propagate]
        return [*sys.argv, *sys.path, *sys.meta_path, sys.modules["__main__"], *tutel, *log]

    before = state()
    assert run([str(write(tmp_path, code))]) == 4
    assert state() == before
    assert run([str(write(tmp_path, "import tutel\n1 / 0"))]) == 1
    assert state() == before
    assert "ZeroDivisionError" in capsys.readouterr().err
    tutel_stand_in.install()
    try:
        assert run([str(write(tmp_path, "import tutel"))]) == 0
        assert tutel_stand_in.installed(), "it was there before"
    finally:
        tutel_stand_in.remove()


def test_checkpoint_tools_need_tutel_and_say_so(tmp_path: Path) -> None:
    done = call("-m", "tutel.checkpoint.gather", "--help", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "needs Tutel" in done.stderr.splitlines()[-1]
    assert done.stderr.count("\n") == 1


def test_help_of_the_command(tmp_path: Path) -> None:
    done = call("--help", cwd=tmp_path, COLUMNS="100")
    assert done.returncode == 0
    assert "-m MODULE" in done.stdout
