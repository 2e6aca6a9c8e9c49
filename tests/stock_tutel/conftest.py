"""Fixtures of the tests that need stock Tutel; each file skips, with the reason, where it is absent."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def registered() -> Iterator[None]:
    """The top-any gates are in Tutel during the test."""
    from dynmoe_tutel import tutel_backend

    tutel_backend.register()
    try:
        yield
    finally:
        tutel_backend.unregister()
