"""When windows open and close, in optimizer steps."""

from __future__ import annotations

from typing import Any

import pytest

from dynmoe_tutel.adaptive.controller import Schedule


class TestSchedule:
    @pytest.mark.parametrize(
        ("schedule", "windows"),
        [
            (Schedule(every=5), [(0, 5), (5, 10), (10, 15), (15, 20), (20, 25)]),
            (Schedule(every=5, window=5, stop=14), [(0, 5), (5, 10)]),
            (Schedule(every=5, window=2), [(3, 5), (8, 10), (13, 15), (18, 20)]),
            (Schedule(every=5, window=1, stop=10), [(4, 5), (9, 10)]),
            (Schedule(every=6, start=3), [(3, 9), (9, 15), (15, 21)]),  # no whole window fits before step 3
            (Schedule(every=6, window=2, start=3), [(1, 3), (7, 9), (13, 15), (19, 21)]),
            (Schedule(every=9, window=3, start=6), [(3, 6), (12, 15)]),  # DynMoE-DeepSpeed's schedule, in hundreds
            (Schedule(every=1), [(i, i + 1) for i in range(21)]),
            (Schedule(every=7, window=3, start=17), [(14, 17)]),
        ],
    )
    def test_windows_and_updates(self, schedule: Schedule, windows: list[tuple[int, int]]) -> None:
        opened = [first for first, _ in windows]
        closed = [last for _, last in windows if last <= 21]
        assert [s for s in range(21) if schedule.opens_at(s)] == opened
        assert [s for s in range(22) if schedule.updates_at(s)] == closed
        inside = {s for first, last in windows for s in range(first, last)}
        assert [s for s in range(21) if schedule.records_at(s)] == sorted(inside & set(range(21)))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"every": 0}, "every must be an integer of at least 1, got 0"),
            ({"every": -3}, "every must be an integer of at least 1, got -3"),
            ({"every": 2.5}, "every must be an integer of at least 1, got 2.5"),
            ({"every": True}, "every must be an integer of at least 1, got True"),
            ({"window": 0}, "window must be an integer of at least 1, got 0"),
            ({"start": -1}, "start must be an integer of at least 0, got -1"),
            ({"stop": 0}, "stop must be an integer of at least 1, got 0"),
            ({"every": 10, "window": 11}, r"window must be at most every \(10\), got 11"),
            ({"every": 10, "start": 5, "stop": 14}, "stop must be at least 15, the first update, got 14"),
        ],
    )
    def test_bad_values_are_refused(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=f"schedule: {message}"):
            Schedule(**fields)

    def test_forms(self) -> None:
        assert Schedule.of(None) == Schedule()
        assert Schedule.of(7) == Schedule(every=7)
        assert Schedule.of({"every": 7, "window": 3}) == Schedule(every=7, window=3)
        with pytest.raises(ValueError, match="unknown key 'evry', allowed are every, window, start, stop"):
            Schedule.of({"evry": 7})
        with pytest.raises(ValueError, match=r"must be a Schedule, a dict, an int \(every\) or None, got '7'"):
            Schedule.of("7")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="every must be an integer of at least 1, got False"):
            Schedule.of(False)
