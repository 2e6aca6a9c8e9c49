"""The arithmetic of the benchmarks' clocks and counters, on a made-up device whose clock advances with calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.common import timing
from benchmarks.common.shapes import Shape

GPU = torch.device("cuda")
MICROSECOND = 1e-6


class MadeUp:
    """A GPU that is only a clock: a call advances it, and a graph replay advances it by the captured calls."""

    def __init__(self) -> None:
        self.now, self.captures, self.replays, self.eager = 0.0, 0, 0, 0
        self.capturing: list[float] | None = None

    def call(self, seconds: float) -> Callable[[], None]:
        def run() -> None:
            if self.capturing is not None:
                self.capturing.append(seconds)
            else:
                self.now += seconds
                self.eager += 1

        return run

    def event(self, **_: Any) -> Any:
        device = self

        class Event:
            def record(self) -> None:
                self.at = device.now

            def synchronize(self) -> None: ...

            def elapsed_time(self, other: Event) -> float:
                return 1e3 * (other.at - self.at)  # milliseconds, as CUDA's

        return Event()

    def graph(self) -> Any:
        device = self

        class Graph:
            def replay(self) -> None:
                device.now += sum(self.work)
                device.replays += 1

        return Graph()

    @contextmanager
    def capture(self, graph: Any) -> Iterator[None]:
        self.capturing = graph.work = []
        self.captures += 1
        yield
        self.capturing = None


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    made_up = MadeUp()

    class Stream:
        def __init__(self, *_: object) -> None: ...

        def wait_stream(self, other: Stream) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    replaced = {
        "Event": made_up.event,
        "CUDAGraph": made_up.graph,
        "graph": made_up.capture,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: stream,
        "synchronize": lambda *_: None,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return made_up


def test_a_graph_of_sets_in_turn_is_divided_by_their_number(gpu: MadeUp) -> None:
    """Two sets of 100 and 300 us: 200 us a call, in a graph of 5 rounds that lasts 2 ms."""
    times = timing.seconds([gpu.call(100 * MICROSECOND), gpu.call(300 * MICROSECOND)], GPU, 7)
    assert times == pytest.approx([200 * MICROSECOND] * 7)
    assert gpu.captures == 1
    assert gpu.replays == 7 + 3  # three are warm-up
    assert gpu.eager == 2 * 2 + 2 * 2  # compile and allocate, then find the number of rounds


def test_a_long_call_is_one_round(gpu: MadeUp) -> None:
    assert timing.seconds([gpu.call(0.5)], GPU, 2) == pytest.approx([0.5, 0.5])


def test_without_a_graph_the_calls_themselves_are_timed(gpu: MadeUp) -> None:
    assert timing.seconds([gpu.call(1e-3)], GPU, 4, graph=False) == pytest.approx([1e-3] * 4)
    assert gpu.captures == gpu.replays == 0
    assert gpu.eager == 2 + 2 + 2 * (4 + 3)  # two rounds of 1 ms fill the time


def test_bounds_count_bytes_read_and_written_and_two_operations_a_term(
    gpu: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy takes 3 s and the product 5 s."""
    monkeypatch.setattr(timing, "COPY_BYTES", 4096)
    monkeypatch.setattr(timing, "PRODUCT", 10)
    made_up = iter([[3.0, 3.0, 3.0], [5.0, 5.0, 5.0]])
    monkeypatch.setattr(timing, "seconds", lambda *_: next(made_up))
    draw = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, **_: draw(*size))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **_: empty(*size))
    rates = timing.bounds(GPU, torch.float32)
    assert rates == {"bytes_per_second": 2 * 4096 / 3.0, "flops_per_second": 2 * 1000 / 5.0}


def test_peak_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for name, value in {"max_memory_allocated": 7, "memory_allocated": 3}.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: called.append(name))
    assert timing.peak_bytes(GPU) == 7
    assert called == []
    assert timing.peak_bytes(GPU, fresh=True) == 3
    assert called == ["empty_cache", "reset_peak_memory_stats"]
    assert timing.peak_bytes(torch.device("cpu")) == 0


@pytest.fixture
def measured_on_a_gpu(gpu: MadeUp, monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    """The programs take the way of a GPU, with tensors on the CPU: events, graphs and memory are made up."""
    from benchmarks import kernels, layer_gpu, peers

    properties = SimpleNamespace(name="X", multi_processor_count=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    for name, value in {"max_memory_allocated": 3 << 20, "memory_allocated": 1 << 20}.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    shapes = {"vit-s": Shape(40, 16, 24, 4, 2), "llm-2k": Shape(40, 16, 24, 4, 2, gated=True)}
    rates = {"bytes_per_second": 1e12, "flops_per_second": 1e12}
    cpu = torch.device("cpu")
    for module, made in ((layer_gpu, "Case"), (peers, "PeerCase"), (kernels, "Inputs")):
        on_a_gpu = getattr(module, made)

        def on_the_cpu(shape: Shape, dtype: Any, _: Any, *more: Any, on_a_gpu: Any = on_a_gpu) -> Any:
            return on_a_gpu(shape, dtype, cpu, *more)

        monkeypatch.setattr(module, made, on_the_cpu)
    for module in (layer_gpu, kernels):
        monkeypatch.setattr(module, "bounds", lambda *_: dict(rates))
        monkeypatch.setattr(module, "GPU_SHAPES", shapes)
        monkeypatch.setattr(module, "usable", lambda _: True)
    clock = iter(range(1, 1 << 20))
    monkeypatch.setattr(timing, "_elapsed", lambda run: (run(), 1e-3 * next(clock))[1])  # a call takes no made-up time
    return gpu


def test_the_layer_as_on_a_gpu(measured_on_a_gpu: MadeUp, tmp_path: Path) -> None:
    """Every line of the benchmark runs: graphs and eager steps, memory, the fit, peers; nothing fails."""
    from benchmarks import layer_gpu

    out = tmp_path / "layer.json"
    assert layer_gpu.run(GPU, ["float32"], 600, 2, out) == 0
    found = json.loads(out.read_text())
    assert found["failures"] == found["compiled"] == []
    assert found["environment"]["gpu"] == "X"
    steps = ["vit-s, float32", "affine", "vit-s, float32, further", "llm-2k, float32"]
    assert found["finished"][:4] == steps
    for result in found["results"]:
        assert len(result["milliseconds"]) == 9
        assert set(result["peak_bytes"].values()) == {2 << 20}
        assert "ours" in result["peers"]
    assert measured_on_a_gpu.captures > 0


def test_the_kernels_as_on_a_gpu(measured_on_a_gpu: MadeUp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Several sets of inputs, equal and skewed loads; the kernels themselves are made up, torch's product is not."""
    from benchmarks import kernels

    def kernels_of(inputs: Any) -> Iterator[Any]:
        for name in ("gate", *kernels.PRODUCTS):
            yield kernels.Kernel(name, lambda: inputs.x_TD * 2, 1, 1, lambda: inputs.x_TD + inputs.x_TD)

    monkeypatch.setattr(kernels, "kernels_of", kernels_of)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    out = tmp_path / "kernels.json"
    options = ["--dtype", "float32", "--repeats", "2", "--out", str(out), "--shape", "vit-s", "llm-2k"]
    assert kernels.main(["--device", "cuda", *options]) == 0
    found = json.loads(out.read_text())
    assert found["finished"] == ["vit-s", "vit-s, skewed", "llm-2k"]
    assert len(found["results"]) == (1 + 12) + 12 + (1 + 12)
    assert found["failures"] == []
    assert measured_on_a_gpu.captures == len(found["results"])
