"""Fixtures for tests that need stock Tutel; without it, each file skips with the reason."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def registered() -> Iterator[None]:
    """Register the top-any gates in Tutel during the test."""
    from dynmoe_tutel import tutel_backend

    tutel_backend.register()
    try:
        yield
    finally:
        tutel_backend.unregister()
