"""`python -m dynmoe_tutel` runs `dynmoe-tutel`."""

from __future__ import annotations

from dynmoe_tutel.cli import main

main()
