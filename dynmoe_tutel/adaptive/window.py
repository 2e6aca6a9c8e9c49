"""`RecordWindow`: the one record window that a controller has open at all of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class RecordWindow:
    """Opens and closes the window of the `layers`, and notices another hand at it.

    It is `open` until the controller has updated the experts; it is `ended` if its forwards are over before that.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self._layers = layers
        self._numbers: list[int] = []  # by layer, the number of the window that was opened last
        self.begun = -1  # the optimizer step after which it was opened by hand
        self.open = self.ended = False

    def set(self, is_open: bool, step: int = -1) -> None:
        """Open an empty window after optimizer step `step`, or close it."""
        for layer in self._layers:
            if is_open:
                layer.begin_record_routing()
            else:
                layer.end_record_routing()
        self.open, self.ended, self.begun = is_open, False, step
        self._numbers = [layer.record_window for layer in self._layers]

    def begin(self, step: int) -> None:
        """Open an empty window; go on in the one that was begun after the same step, in an earlier micro-batch."""
        if not self.open or self.begun != step:
            self.set(True, step)
            return
        self.check()
        self.ended = False
        for layer in self._layers:
            layer.record_routing = True

    def end(self) -> None:
        """Record no further forwards; the window stays open for the update."""
        self.ended = True
        for layer in self._layers:
            layer.end_record_routing()

    def close(self) -> None:
        """Stop recording; a window that another controller has opened since stays open."""
        if self.open:
            for layer, number in zip(self._layers, self._numbers, strict=True):
                if layer.record_window == number:
                    layer.end_record_routing()

    def check(self) -> None:
        """RuntimeError if the window was opened or closed by another hand: the record would hold other forwards."""
        ours = all(
            (layer.record_routing or self.ended) and layer.record_window == number
            for layer, number in zip(self._layers, self._numbers, strict=True)
        )
        if self.open and not ours:
            raise RuntimeError(
                "the record window of this ExpertController is not open any more: close() or end_record_routing() has "
                "closed it, or another controller has opened one on the same layers since. Step only the controller "
                "that was made last, one a model"
            )
