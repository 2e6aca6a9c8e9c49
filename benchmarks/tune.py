"""Measure candidate tiles of the experts' products on this GPU and write the table that `kernels.gpu.tiles` reads.

    python -m benchmarks.tune [--product NAME ...] [--shape NAME ...] [--candidates 12] [--seconds N] [--out FILE.json]

For each product and shape every candidate runs on the same inputs; those that do not compile or fit are left out. The
defaults fit 8 minutes: two products, three shapes, twelve candidates near the rule's. `--product all`, `--shape all`
and `--candidates 0` take all there are, which is hours. The best goes to kernels/tuned/<architecture>.json (or --out),
which keeps its entries for other shapes and is written after every product. Run `python -m benchmarks.aot` afterwards:
it compiles every entry of the table and fails on spills.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from dynmoe_tutel.kernels.gpu import gemm, tiles
from dynmoe_tutel.kernels.gpu.tiles import GemmConfig

from .common.results import reason, usable
from .common.shapes import GPU_SHAPES, Shape
from .common.timing import check_outputs, duration, environment, seconds, unable, whole, write
from .launches.kernel_calls import TINY, Inputs

PRODUCTS = ("up", "activation_gradient", "weight_gradient", "linear", "linear_pair")
FEW_PRODUCTS, FEW_SHAPES = ("up", "activation_gradient"), ("vit-s", "bert-l", "llm-4k")


def candidates(start: GemmConfig) -> list[GemmConfig]:
    """The rule's configuration, then other tiles of its stages, the nearest first, then tiles of other stages."""
    found = [start]
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
        for stages in (3, 4, 2):
            tile = replace(start, block_m=block_m, block_n=block_n, num_warps=warps, num_stages=stages)
            small = block_m * block_n <= 64 * 128
            for programs in (1, 2, 3) if small else (1, 2):  # per multiprocessor
                limit = None
                if programs * warps > 8 and torch.version.hip is None:  # otherwise they do not fit in 64 Ki registers
                    limit = (1 << 16) // (32 * programs * warps) // 8 * 8
                pieces = min(max(start.pieces, 1), block_n // 16)
                found.append(replace(tile, programs=programs, pieces=pieces, max_registers=limit))

    def distance(other: GemmConfig) -> tuple[bool, int]:
        sizes = (other.block_m / start.block_m, other.block_n / start.block_n)
        fields = zip(asdict(other).values(), asdict(start).values(), strict=True)
        factors = sum(abs(round(math.log2(size))) for size in sizes)
        return other.num_stages != start.num_stages, factors + sum(a != b for a, b in fields)

    return sorted(dict.fromkeys(found), key=distance)


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


@contextmanager
def chosen(key: str, config: GemmConfig) -> Iterator[None]:
    """The product of this key takes this configuration, whatever choices are remembered."""
    original = tiles.tuned
    tiles.tuned = lambda _: {key: config}  # type: ignore[assignment,misc]
    _forget_choices()
    try:
        yield
    finally:
        tiles.tuned = original
        _forget_choices()


def _forget_choices() -> None:
    for module in (tiles, gemm):
        for function in vars(module).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()


def best(
    run: Callable[[], Any],
    key: str,
    start: GemmConfig,
    device: torch.device,
    repeats: int,
    few: int | None = None,
    end: float = math.inf,
) -> tuple[GemmConfig, float, float]:
    """The fastest candidate, its seconds, and the rule's seconds. Only the rule's begins after `end`."""
    found: list[tuple[float, GemmConfig]] = []
    for candidate in candidates(start)[:few]:
        if found and time.monotonic() > end:
            break
        with chosen(key, candidate):
            try:
                found.append((statistics.median(seconds([run], device, repeats)), candidate))
            except Exception as error:  # any error of a compiler or a launch rules the candidate out
                if candidate == start or not usable(device):
                    raise
                print(f"  {candidate} does not run: {reason(error)}")
    seconds_of_best, config = min(found, key=lambda pair: pair[0])
    return config, seconds_of_best, found[0][0]


def tune(
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    few: int | None = None,
    wanted: Sequence[str] = PRODUCTS,
    end: float = math.inf,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield entries of the table, each as soon as it is known; begin none after `end` of the monotonic clock."""
    for shape in shapes:
        inputs = Inputs(shape, dtype, device, 0)
        for kind, (run, key) in products(inputs).items():
            name = key.split("/")[0].removesuffix("_gated")
            if name not in wanted:
                continue
            if time.monotonic() > end:
                print(f"skipped, no time is left: {shape}: {kind}")
                continue
            start = tiles.gemm(key.split("/")[0], device, dtype, -(-inputs.A // shape.E), *map(int, _sizes(key)))
            try:
                config, fastest, rule = best(run, key, start, device, repeats, few, end)
            except Exception as error:  # the next product may still run
                if not usable(device):
                    raise
                print(f"FAILED {shape}: {kind}: {reason(error)}", flush=True)
                continue
            print(f"{shape}: {kind} {1e6 * rule:.1f} us by rule, {1e6 * fastest:.1f} us with {config}", flush=True)
            yield key, asdict(config)


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
    every = ["all", *GPU_SHAPES]
    parser.add_argument("--product", nargs="+", choices=["all", *PRODUCTS], default=FEW_PRODUCTS)
    parser.add_argument("--shape", nargs="+", choices=every, default=FEW_SHAPES)
    parser.add_argument("--candidates", type=whole(0), default=12, help="of each product and shape; 0: all")
    parser.add_argument("--seconds", type=duration(), default=math.inf, help="begin no candidate after this time")
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
    end, few = time.monotonic() + args.seconds, args.candidates or None
    names = list(GPU_SHAPES) if "all" in args.shape else args.shape
    device, shapes = torch.device("cuda"), [GPU_SHAPES[name] for name in names]
    dtype, wanted = getattr(torch, args.dtype), PRODUCTS if "all" in args.product else args.product
    if args.interpreter:
        device, shapes, dtype, few, wanted = torch.device("cpu"), [TINY], torch.float32, 2, PRODUCTS
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
    about, found = environment(device), 0
    for key, entry in tune(shapes, dtype, device, args.repeats, few, wanted, end):
        known[key] = entry
        write(out, {"environment": about, "configs": known})
        found += 1
    print(f"{found} entries written to {out}")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
