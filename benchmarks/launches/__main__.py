"""How many launches a training step of a layer makes, and the host's time for it on a stub; needs no GPU.

    python -m benchmarks.launches [--mode exact ...] [--names] [--repeats N]

One row a mode, bf16 on the tiles of sm_90: the launches of Triton's kernels and of torch's operations in forward and
backward, and microseconds of processor time; see `launches.step` for what the stub leaves out. With an exact capacity a
GPU also copies one count to the host, and waits for nothing from the count's arrival to the launch of `up`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..common.timing import whole
from .step import MODES, launches, microseconds


def row(mode: str, repeats: int, names: bool) -> str:
    """The mode's row of the table; with `names`, the launches below it."""
    both = launches(MODES[mode])
    of_torch = [sum(name.startswith("aten.") for name in part) for part in both]
    parts = [f"{len(part) - n} + {n}" for part, n in zip(both, of_torch, strict=True)]
    times = microseconds(MODES[mode], repeats) if repeats else {}
    cells = [mode, *parts, str(sum(map(len, both))), *(f"{time:.0f}" for time in times.values())]
    text = " | ".join(["", *cells, ""]).strip()
    return text + "".join(f"\n    {', '.join(part)}" for part in both if names and part)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--names", action="store_true", help="name the launches")
    parser.add_argument("--repeats", type=whole(0), default=30, help="of 20 steps each; 0 times nothing (default: 30)")
    args = parser.parse_args(argv)
    columns = ["mode", "forward: Triton + torch", "backward", "launches"]
    columns += ["forward, us", "step, us", "count to `up`, us"] if args.repeats else []
    print(" | ".join(["", *columns, ""]).strip())
    print("|---" * len(columns) + "|")
    for mode in args.mode:
        print(row(mode, args.repeats, args.names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
