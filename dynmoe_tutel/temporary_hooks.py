"""Forward hooks that serve an owner, such as a meter or a training, and end with it.

They are no part of the module: its copies and pickles are made without them.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Owner = TypeVar("Owner", bound="HookOwner")


class TemporaryHook:
    """Base of the forward hooks of an owner. A hook must not refer to its owner but weakly."""

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        raise NotImplementedError

    def counts(self) -> Iterable[Tensor]:
        """The tensors to which a call adds in place."""
        return ()


class HookOwner:
    """Base of objects with hooks elsewhere, which end by `close`, with a `with` block, or with the object itself."""

    _detach: Any

    def _own(self, handles: Iterable[RemovableHandle]) -> None:
        """Take over the handles; once, at the end of construction."""
        self._detach = weakref.finalize(self, _remove, list(handles))
        self._detach.atexit = False

    @property
    def attached(self) -> bool:
        """Whether the hooks are still there; not those of a copy of this object, which has none."""
        return bool(self._detach.alive)

    def close(self) -> None:
        """Remove the hooks; a second call does nothing."""
        self._detach()

    def __enter__(self: Owner) -> Owner:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _remove(handles: Sequence[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def without_temporary_hooks(state: dict[str, Any]) -> dict[str, Any]:
    """The `__dict__` of a module for a copy or a pickle: without its temporary hooks."""
    hooks = state["_forward_hooks"]
    if not any(isinstance(hook, TemporaryHook) for hook in hooks.values()):
        return state
    kept = ((key, hook) for key, hook in hooks.items() if not isinstance(hook, TemporaryHook))
    return {**state, "_forward_hooks": OrderedDict(kept)}
