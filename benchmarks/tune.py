"""Measure candidate tiles of the experts' products on this GPU and write the table that `kernels.gpu.tiles` reads.

    python -m benchmarks.tune [--shape vit-s ...] [--dtype bfloat16] [--repeats 10] [--out FILE.json]

For each kind of product and shape every candidate runs on the same inputs; those that do not compile or fit are left
out. The best goes to kernels/tuned/<architecture>.json (or --out), which keeps its entries for other shapes. Run
`python -m benchmarks.aot` afterwards: it compiles every entry of the table and fails on spills.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from dynmoe_tutel.kernels.gpu import tiles
from dynmoe_tutel.kernels.gpu.tiles import GemmConfig

from .common.shapes import GPU_SHAPES, Shape
from .common.timing import check_outputs, environment, seconds, unable, whole, write
from .kernels import TINY, Inputs


def candidates(start: GemmConfig) -> Iterator[GemmConfig]:
    """The rule's configuration, and a few others of its depth: each takes a second or two to compile."""
    yield start
    for block_m, block_n, warps in (
        (64, 64, 4),
        (64, 128, 4),
        (128, 64, 4),
        (128, 64, 8),
        (128, 128, 4),
        (128, 128, 8),
        (128, 256, 8),
        (256, 128, 8),
    ):
        for stages in (2, 3, 4):
            tile = replace(start, block_m=block_m, block_n=block_n, num_warps=warps, num_stages=stages)
            for programs in (1, 2):  # per multiprocessor
                limit = 128 if programs * warps > 8 and torch.version.hip is None else None  # otherwise two do not fit
                pieces = min(max(start.pieces, 1), block_n // 16)
                yield replace(tile, programs=programs, pieces=pieces, max_registers=limit)


def products(inputs: Inputs) -> dict[str, tuple[Callable[[], Any], str]]:
    """By kind: a call of the product, and its key in the table."""
    from dynmoe_tutel.kernels.gpu import grouped_ffn

    i, s = inputs, inputs.shape
    gated = "_gated" if s.gated else ""
    mean_rows = -(-i.A // s.E)

    def key(kind: str, K: int, N: int) -> str:
        return tiles.gemm_key(kind, i.dtype, mean_rows, K, N)

    up = (i.x_TD, i.index, i.weights, i.activation, True, True)
    h, u, a = grouped_ffn.up(*up)
    kept = i.activation_gradient(h, u)
    return {
        f"up{gated}": (lambda: grouped_ffn.up(*up), key(f"up{gated}", s.D, s.H)),
        "linear": (lambda: grouped_ffn.linear(a, i.w2, i.index[0], bias_EN=i.b2), key("linear", s.H, s.D)),
        f"activation_gradient{gated}": (
            lambda: i.activation_gradient(h, u),
            key(f"activation_gradient{gated}", s.D, s.H),
        ),
        "weight_gradient": (
            lambda: grouped_ffn.weight_gradient(kept.a_AH, i.d_y_TD, i.index, i.w2, b_from_tokens=True),
            key("weight_gradient", s.H, s.D),
        ),
        **(
            {
                "linear_pair": (
                    lambda: grouped_ffn.token_rows(kept, i.w1, i.w3, i.index[0]),
                    key("linear_pair", s.H, s.D),
                ),
                "weight_gradient of the first": (
                    lambda: grouped_ffn.weight_gradient(i.x_TD, kept.d_h_AH, i.index, i.w1, i.b1, a_from_tokens=True),
                    key("weight_gradient", s.D, s.H),
                ),
            }
            if s.gated
            else {}
        ),
    }


def best(
    run: Callable[[], Any], key: str, start: GemmConfig, device: torch.device, repeats: int, few: int | None = None
) -> tuple[GemmConfig, float, float]:
    """The fastest candidate, its seconds, and the rule's seconds."""
    original, found = tiles.tuned, []
    try:
        for candidate in list(dict.fromkeys(candidates(start)))[:few]:
            tiles.tuned = lambda _, c=candidate: {key: c}  # type: ignore[assignment,misc]
            try:
                found.append((statistics.median(seconds([run], device, repeats)), candidate))
            except Exception as error:  # any error of a compiler or a launch rules the candidate out
                if candidate == start:
                    raise
                print(f"  {candidate} does not run: {type(error).__name__}")
    finally:
        tiles.tuned = original
    seconds_of_best, config = min(found, key=lambda pair: pair[0])
    return config, seconds_of_best, found[0][0]


def tune(
    shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device, repeats: int, few: int | None = None
) -> dict[str, dict[str, Any]]:
    """Entries of the table, by key."""
    table: dict[str, dict[str, Any]] = {}
    for shape in shapes:
        inputs = Inputs(shape, dtype, device, 0)
        for kind, (run, key) in products(inputs).items():
            start = tiles.gemm(key.split("/")[0], device, dtype, -(-inputs.A // shape.E), *map(int, _sizes(key)))
            config, fastest, rule = best(run, key, start, device, repeats, few)
            table[key] = asdict(config)
            print(f"{shape}: {kind} {1e6 * rule:.1f} us by rule, {1e6 * fastest:.1f} us with {config}", flush=True)
    return table


def _sizes(key: str) -> tuple[str, str]:
    """K and N of an entry's key."""
    *_, K, N = key.split("/")
    return K.removeprefix("K"), N.removeprefix("N")


def read_table(path: Path) -> dict[str, dict[str, Any]]:
    """Entries of the table in an existing file; raises ValueError if it holds no table."""
    try:
        found = json.loads(path.read_text())["configs"]
        for key, values in found.items():
            numbers = [value for value in asdict(GemmConfig(**values)).values() if value is not None]
            if any(type(number) is not int for number in numbers):
                raise TypeError(f"{key} holds what is no whole number")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=list(GPU_SHAPES), default=list(GPU_SHAPES))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--repeats", type=whole(1), default=10)
    parser.add_argument("--interpreter", action="store_true", help="two candidates on a tiny shape, to try the program")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    why = unable("cpu" if args.interpreter else "cuda")
    if why is not None and args.interpreter:
        parser.error(f"argument --interpreter: {why}")
    if why is not None:
        parser.error(f"{why}; tiles are tuned on the GPU they are for, allowed elsewhere: --interpreter")
    if args.interpreter:
        device, shapes, dtype, few = torch.device("cpu"), [TINY], torch.float32, 2
    else:
        device, shapes, few = torch.device("cuda"), [GPU_SHAPES[name] for name in args.shape], None
        dtype = getattr(torch, args.dtype)
    chip = tiles.architecture(device)
    out = args.out or tiles.TABLES / f"{chip}.json"
    check_outputs(parser, "--out", [out])
    try:
        known = read_table(out) if out.exists() else {}
    except ValueError as error:
        parser.error(
            f"argument --out: came {str(out)!r}, which is no table of tiles ({error}), "
            "allowed: a new file, or one that benchmarks.tune wrote"
        )
    found = tune(shapes, dtype, device, args.repeats, few)
    write(out, {"environment": environment(device), "configs": known | found})
    print(f"{len(found)} entries written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
