"""The arithmetic of the benchmarks' clocks and counters, on a made-up device whose clock advances with calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from benchmarks.common import timing

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
