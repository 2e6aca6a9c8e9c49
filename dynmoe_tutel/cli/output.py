"""Output that no character and no lost reader can break: what is printed is also in the job's folder."""

from __future__ import annotations

import codecs
import io
import os
from typing import IO, Any

__all__ = ["lasting"]

_PLAIN = {"\N{PLUS-MINUS SIGN}": "+-"}
_HANDLER = "dynmoe_tutel.plain"


def lasting(stream: IO[str]) -> Any:
    """`stream` for a console: it writes what its encoding lacks in plain characters, and nothing once it is closed."""
    codecs.register_error(_HANDLER, _plain)
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors=_HANDLER)
    return _Lasting(stream)


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    known = _PLAIN.get(error.object[error.start])
    return (known, error.start + 1) if known else codecs.backslashreplace_errors(error)


class _Lasting:
    """Hands all to `stream`, whose file descriptor becomes the null device once its reader or terminal has gone."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._discard()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._discard()

    def _discard(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, self._stream.fileno())
        finally:
            os.close(null)
        self._stream.flush()
