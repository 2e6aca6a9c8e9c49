"""`python -m dynmoe_tutel` is `dynmoe-tutel`."""

from __future__ import annotations

from dynmoe_tutel.cli import main

main()
