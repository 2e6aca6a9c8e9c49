"""The counts of machine code and the model of the products' time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
ROOT = Path(__file__).resolve().parents[2]


def evaluate(code: str) -> Any:
    """What the code prints as JSON, in a process in which Triton compiles."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", f"import json\nfrom benchmarks.static import *\n{code}"]
    return json.loads(subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, check=True).stdout)


def test_instructions_of_the_loop_and_of_the_rest_of_a_tile() -> None:
    """A set-up; a loop over tiles with a loop without a product, one of three instructions with two, and a store."""
    lines = [
        "MOV R1, R2", "IADD3 R1, R1, 0x1, RZ", "FADD R2, R2, R3", "@P1 BRA 0x20", "LDS R4, [R5]",
        "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4]", "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8]", "@!P0 BRA 0x50",
        "STG.E.128 desc[UR4][R2.64], R8", "@P2 BRA `(.L_x_1) 0x10", "EXIT", "BRA 0xb0",
    ]  # fmt: skip
    sass = "\n".join(f"        /*{16 * i:04x}*/    {line} ;    /* 0x0 */" for i, line in enumerate(lines))
    found = evaluate(f"c = count(instructions({sass!r})); print(json.dumps([c.loop, c.matrix, c.epilogue]))")
    assert found == [3, 2, 6]


def test_a_longer_epilogue_costs_in_turn_only_where_a_program_is_alone() -> None:
    code = """
constants = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}
launch = Launch("m", "up_kernel", tuple((n, "constexpr") for n in constants), tuple(enumerate(constants.values())), (),
                (("num_warps", 8),))
shape = Shape(8448, 1024, 1024, 1, 1)
rows = []
for registers, epilogue in ((120, 100), (120, 4000), (200, 100), (200, 4000)):
    product = Product(launch, (264,), Code(100, 4, epilogue), registers, 65536, 0)
    found = product.times(shape)
    rows.append([product.residents, found["tensor"], found["in turn"], found["predicted"]])
print(json.dumps(rows))
"""
    shared, long, alone, turns = evaluate(code)
    assert [row[0] for row in (shared, long, alone, turns)] == [2, 2, 1, 1]
    tensor = 2 * 8448 * 1024 * 1024 / (2 * 2048 * 132 * 1750)  # operations over those of a microsecond: no wave is lost
    assert all(abs(row[1] / tensor - 1) < 1e-6 for row in (shared, long, alone, turns))
    assert shared[2] == long[2] == 0
    assert turns[2] > alone[2] > alone[1]
    assert turns[3] == turns[2]
