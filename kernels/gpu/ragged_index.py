"""Both directions of the index by prefix sums, and the assignments that a bounded capacity drops. No sort, no atomics.

Index:  count (only without the gate's counts)  ->  scan (only of many blocks)  ->  fill, all on blocks of
        `block_tokens(E)` tokens
Bound:  select, four times, each for eight bits of the limit  ->  drop; if everything fits, all selects but the first
        return at once, and drop copies

The kernels read bits as int32 words: expert e is bit e % 32 of word e // 32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operation import OPERATIONS
from ..ragged_index import block_tokens
from .launch import kernel
from .sizes import cdiv, power_of_two

MOST_EXPERTS = 512  # fit in registers with a tile of 16 tokens; with more, torch operations run on the device
SCAN_BLOCKS, SCAN_EXPERTS = 128, 16  # tile of the scan
MOST_CHUNKS = 8  # runs of blocks that are scanned in parallel; `fill` adds the totals of the runs before its own
FEW_COUNTS = 8192  # up to so many blocks times experts `fill` adds up itself, without a scan: 32 KB from L2 a program
FILL_COUNTS = 2048  # of them at a time
TAIL = 1024  # unused entries that a program writes at once
SELECT_ELEMENTS = 2048  # tile of the selection: tokens by experts
SELECT_PROGRAMS = 128  # each has one run of tokens
PASSES = 4
BINS: tl.constexpr = tl.constexpr(256)


@triton.jit
def _assigned(bits, t0, t, e, T, E, WORDS):
    """Tile [tokens, experts] of int32 0 and 1, for tokens t0 + t."""
    mask = (t < T - t0)[:, None] & (e < E)[None, :]
    base = bits + (t * 0 + t0).to(tl.int64)[:, None] * WORDS
    word = tl.load(base + t[:, None] * WORDS + (e // 32)[None, :], mask=mask, other=0)
    return (word >> (e % 32)[None, :]) & 1


@kernel
def count_kernel(bits, counts, T, E, WORDS, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr):
    """Assignments of each expert in each block of tokens.

    In: bits [T, WORDS] int32. Out: counts [blocks, E] int32. Grid: blocks. Bytes: 4 T WORDS + 4 blocks E.
    """
    block = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    assigned = _assigned(bits, block * BLOCK_T, tl.arange(0, BLOCK_T), e, T, E, WORDS)
    tl.store(counts + block.to(tl.int64) * E + e, tl.sum(assigned, axis=0), mask=e < E)


@kernel
def scan_kernel(counts, before, totals, BLOCKS, E, CHUNK, STEP: tl.constexpr, BLOCK_E: tl.constexpr):
    """For each expert: its assignments in the chunk before each block, and in the whole chunk.

    In: counts [BLOCKS, E] int32. Out: before [BLOCKS, E], totals [chunks, E] int32; a chunk is CHUNK blocks.
    Grid: (chunks, groups of BLOCK_E experts). Bytes: 8 BLOCKS E.
    """
    chunk = tl.program_id(0)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    step = tl.arange(0, STEP)
    total_E = tl.zeros((BLOCK_E,), tl.int32)
    for first in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, BLOCKS), STEP):
        block = first + step
        mask = (block < BLOCKS)[:, None] & (e < E)[None, :]
        at = block.to(tl.int64)[:, None] * E + e[None, :]
        count = tl.load(counts + at, mask=mask, other=0)
        tl.store(before + at, tl.cumsum(count, axis=0) - count + total_E[None, :], mask=mask)
        total_E += tl.sum(count, axis=0)
    tl.store(totals + chunk * E + e, total_E, mask=e < E)


@kernel(do_not_specialize=["R"])
def fill_kernel(
    bits, before, totals, expert_offsets, token_offsets, token_of_row, row_of_assignment,
    T, E, WORDS, CHUNK, CHUNKS, R,
    PAD: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """The offsets and the two row arrays, with -1 past A (PAD).

    A row is its expert's first row, plus the expert's assignments in earlier blocks, plus those of earlier tokens in
    the block (the tile's column prefix). A place in row_of_assignment is its token's first plus the row prefix.
    In: bits [T, WORDS] int32; totals [CHUNKS, E], the sums of CHUNK blocks, and before [blocks, E], the sums before
    each block in its chunk; None with chunks of one block. Out: expert_offsets [E+1], token_offsets [T+1],
    token_of_row [R], row_of_assignment [R], all int32. Grid: blocks. Bytes: 4 T WORDS + 4 blocks E + 4 T + 8 R, and
    for each block the totals, from L2.
    """
    block = tl.program_id(0)
    e, c, t = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_T)
    total_E, before_E = tl.zeros((BLOCK_E,), tl.int32), tl.zeros((BLOCK_E,), tl.int32)
    for c0 in range(0, CHUNKS, BLOCK_C):
        at = totals + (c0 + c)[:, None] * E + e[None, :]
        total_CE = tl.load(at, mask=(c0 + c < CHUNKS)[:, None] & (e < E)[None, :], other=0)
        total_E += tl.sum(total_CE, axis=0)
        before_E += tl.sum(tl.where((c0 + c < block // CHUNK)[:, None], total_CE, 0), axis=0)
    if before is not None:
        before_E += tl.load(before + block.to(tl.int64) * E + e, mask=e < E, other=0)
    start_E = tl.cumsum(total_E, axis=0) - total_E
    A = tl.sum(total_E, axis=0)

    t0 = block * BLOCK_T
    assigned = _assigned(bits, t0, t, e, T, E, WORDS)
    k_T = tl.sum(assigned, axis=1)
    start_T = tl.sum(before_E, axis=0) + tl.cumsum(k_T, axis=0) - k_T
    most = A
    if PAD:  # a capacity below A: clamp offsets to the row arrays
        most = tl.minimum(A, R)
    tl.store(token_offsets + t0 + t, tl.minimum(start_T, most), mask=t < T - t0)
    if block == 0:
        tl.store(token_offsets + T, most)
        tl.store(expert_offsets + e, tl.minimum(start_E, most), mask=e < E)
        tl.store(expert_offsets + E, most)
    row = (start_E + before_E)[None, :] + tl.cumsum(assigned, axis=0) - assigned
    place = start_T[:, None] + tl.cumsum(assigned, axis=1) - assigned
    chosen = assigned != 0
    tl.store(token_of_row + row, tl.broadcast_to((t0 + t)[:, None], (BLOCK_T, BLOCK_E)), mask=chosen & (row < R))
    if PAD:  # assignments that are cut off point to the last row, so that no read is out of bounds
        tl.store(row_of_assignment + place, tl.minimum(row, R - 1), mask=chosen & (place < R))
    else:
        tl.store(row_of_assignment + place, row, mask=chosen & (place < R))
    if PAD:
        tail = tl.arange(0, TAIL)
        stride = tl.num_programs(0).to(tl.int64) * TAIL
        for first in range(A.to(tl.int64) + block.to(tl.int64) * TAIL, R, stride):
            at = first + tail
            none = tl.full((TAIL,), -1, tl.int32)
            tl.store(token_of_row + at, none, mask=at < R)
            tl.store(row_of_assignment + at, none, mask=at < R)


@triton.jit
def _keys(margin, t0, t, e, mask, stride_t, stride_e):
    """int32 in the order of the fp32 margins; -0 equals 0, and NaN is above +inf."""
    at = (t0 + t).to(tl.int64)[:, None] * stride_t + e.to(tl.int64)[None, :] * stride_e
    word = tl.load(margin + at, mask=mask, other=0.0).to(tl.float32).to(tl.int32, bitcast=True)
    word = tl.where(word == -2147483648, 0, word)
    key = tl.where(word < 0, word ^ 2147483647, word)
    return tl.where((word & 2147483647) > 2139095040, 2147483647, key)


@triton.jit
def _excess(totals, PROGRAMS, capacity, BLOCK_P: tl.constexpr):
    """Assignments beyond the capacity, int64."""
    p = tl.arange(0, BLOCK_P)
    return tl.sum(tl.load(totals + p, mask=p < PROGRAMS, other=0).to(tl.int64), axis=0) - capacity


@triton.jit
def _narrow(histograms, states, excess, PROGRAMS, PASS: tl.constexpr):
    """(prefix, rank, bin, size of the bin) from the histograms of pass PASS - 1.

    `prefix` holds the limit's bits so far; the limit is the rank-th smallest key with that prefix.
    """
    prefix, rank = tl.zeros((), tl.int32), excess.to(tl.int32)
    if PASS > 1:
        prefix, rank = tl.load(states + 2 * PASS - 4), tl.load(states + 2 * PASS - 3)
    bins, part = tl.arange(0, BINS), tl.arange(0, 16)
    count = tl.zeros((BINS,), tl.int32)
    for p0 in range(0, PROGRAMS, 16):
        at = (p0 + part)[:, None] * BINS + bins[None, :]
        count += tl.sum(tl.load(histograms + at, mask=(p0 + part < PROGRAMS)[:, None], other=0), axis=0)
    upto = tl.cumsum(count, axis=0)
    digit = tl.sum((upto < rank).to(tl.int32), axis=0)
    size = tl.sum(tl.where(bins == digit, count, 0), axis=0)
    rank -= tl.sum(tl.where(bins == digit, upto - count, 0), axis=0)
    # the first digit is signed
    prefix = digit - BINS // 2 if PASS == 1 else (prefix << 8) | digit
    return prefix, rank, digit, size


@kernel(do_not_specialize=["capacity"])
def select_kernel(
    bits, margin, totals, histograms, states, T, E, WORDS, stride_t, stride_e, capacity, PROGRAMS, TILES,
    PASS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Histogram of the next eight bits of the margins' keys, over the keys with the limit's prefix.

    In: bits [T, WORDS] int32, margin [T, E], histograms [PASSES, PROGRAMS, BINS] of earlier passes. Out: the histogram
    of this pass; totals [PROGRAMS], assignments (first pass); states [PASSES, 2], prefix and rank. All int32.
    Grid: PROGRAMS, each with a run of TILES tiles of tokens. Bytes: bits, margins of assignments, 4 PROGRAMS BINS.
    """
    p = tl.program_id(0)
    e, t = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_T)
    excess, prefix = tl.full((), 1, tl.int64), tl.zeros((), tl.int32)
    own = histograms + PASS * PROGRAMS * BINS
    if PASS > 0:
        excess = _excess(totals, PROGRAMS, capacity, BLOCK_P)
    if excess > 0:
        if PASS > 0:
            prefix, rank, _, _ = _narrow(own - PROGRAMS * BINS, states, excess, PROGRAMS, PASS)
            if p == 0:
                tl.store(states + 2 * PASS - 2, prefix)
                tl.store(states + 2 * PASS - 1, rank)
        count = tl.zeros((BINS,), tl.int32)
        for tile in range(p * TILES, (p + 1) * TILES):
            chosen = _assigned(bits, tile * BLOCK_T, t, e, T, E, WORDS) != 0
            key = _keys(margin, tile * BLOCK_T, t, e, chosen, stride_t, stride_e)
            if PASS > 0:
                chosen = chosen & ((key >> (32 - 8 * PASS)) == prefix)
                digit = (key >> (24 - 8 * PASS)) & (BINS - 1)
            else:
                digit = (key >> 24) + BINS // 2
            flat = tl.reshape(digit, (BLOCK_T * BLOCK_E,))
            count += tl.histogram(flat, BINS, mask=tl.reshape(chosen, (BLOCK_T * BLOCK_E,)))
        tl.store(own + p * BINS + tl.arange(0, BINS), count)
        if PASS == 0:
            tl.store(totals + p, tl.sum(count, axis=0))


@kernel(do_not_specialize=["capacity"])
def drop_kernel(
    bits, margin, totals, histograms, states, kept, dropped, T, E, WORDS, stride_t, stride_e, capacity, PROGRAMS, TILES,
    PASSES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Clear the bits of assignments below the limit, and of the last ones that equal it.

    In: as `select_kernel`. Out: kept [T, WORDS] int32, dropped [] int64. Grid: PROGRAMS. Bytes: bits twice, margins.
    """
    p = tl.program_id(0)
    e, t, w = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_E // 32)
    excess = _excess(totals, PROGRAMS, capacity, BLOCK_P)
    if p == 0:
        tl.store(dropped, tl.maximum(excess, 0))
    if excess > 0:
        last = histograms + (PASSES - 1) * PROGRAMS * BINS
        limit, rank, digit, size = _narrow(last, states, excess, PROGRAMS, PASSES)
        q = tl.arange(0, BLOCK_P)
        equal_before = tl.sum(tl.load(last + q * BINS + digit, mask=(q < PROGRAMS) & (q < p), other=0), axis=0)
        for tile in range(p * TILES, (p + 1) * TILES):
            t0 = tile * BLOCK_T
            assigned = _assigned(bits, t0, t, e, T, E, WORDS)
            key = _keys(margin, t0, t, e, assigned != 0, stride_t, stride_e)
            equal = tl.where(key == limit, assigned, 0)
            equal_T = tl.sum(equal, axis=1)
            order = (equal_before + tl.cumsum(equal_T, axis=0) - equal_T)[:, None] + tl.cumsum(equal, axis=1)
            stays = (key > limit) | ((key == limit) & (order <= size - rank))
            word = tl.where(stays, assigned, 0) << (e % 32)[None, :]
            packed = tl.xor_sum(tl.reshape(word, (BLOCK_T, BLOCK_E // 32, 32)), axis=2)
            at = (t0 + t).to(tl.int64)[:, None] * WORDS + w[None, :]
            tl.store(kept + at, packed, mask=(t < T - t0)[:, None] & (w < WORDS)[None, :])
            equal_before += tl.sum(equal_T, axis=0)
    else:
        for tile in range(p * TILES, (p + 1) * TILES):
            t0 = tile * BLOCK_T
            at = (t0 + t).to(tl.int64)[:, None] * WORDS + w[None, :]
            mask = (t < T - t0)[:, None] & (w < WORDS)[None, :]
            tl.store(kept + at, tl.load(bits + at, mask=mask, other=0), mask=mask)


def _words(bits_TW: Tensor) -> Tensor:
    """[T, 2 W] int32."""
    return bits_TW.contiguous().view(torch.int32)


def _warps(elements: int) -> int:
    return 8 if elements > 4096 else 4


def _total(counts: Tensor, most: int) -> int:
    """The sum of counts, for which the host waits; `most` for a tensor without values."""
    if counts.is_meta:
        return most
    if counts.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("capacity='exact' waits for the device; give a factor or 'full' to capture a CUDA graph")
    return int(counts.cpu().sum())  # a copy is all that the device does


def ragged_index(
    bits_TW: Tensor, num_experts: int, capacity: int = -1, block_counts: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Without a capacity, the host waits for the number of assignments.

    A capacity is not checked against that number, because the host would have to wait: assignments beyond it are cut
    off, and the offsets end at it.
    """
    if num_experts > MOST_EXPERTS:
        return OPERATIONS["ragged_index"].run(bits_TW, num_experts, capacity, block_counts)
    T, E = bits_TW.shape[0], num_experts
    i32: dict[str, Any] = {"dtype": torch.int32, "device": bits_TW.device}
    if T == 0:
        rows = max(capacity, 0)
        offsets = torch.zeros(E + 1, **i32), torch.zeros(1, **i32)
        return *offsets, torch.full((rows,), -1, **i32), torch.full((rows,), -1, **i32)
    bits, words = _words(bits_TW), 2 * bits_TW.shape[1]
    block_t, block_e = block_tokens(E), power_of_two(E)
    blocks = cdiv(T, block_t)
    tile: dict[str, Any] = {"BLOCK_T": block_t, "BLOCK_E": block_e, "num_warps": _warps(block_t * block_e)}
    if block_counts is None:
        block_counts = torch.empty(blocks * E, **i32)
        count_kernel[(blocks,)](bits, block_counts, T, E, words, **tile)
    assert block_counts.shape == (blocks * E,)
    before, totals, chunk = _scanned(block_counts.contiguous(), blocks, E)
    rows = capacity if capacity >= 0 else _total(totals, T * E)
    expert_offsets, token_offsets, *row_arrays = (torch.empty(size, **i32) for size in (E + 1, T + 1, rows, rows))
    fill_kernel[(blocks,)](
        bits,
        before,
        totals,
        expert_offsets,
        token_offsets,
        *row_arrays,
        T,
        E,
        words,
        chunk,
        cdiv(blocks, chunk),
        rows,
        PAD=capacity >= 0,
        BLOCK_C=MOST_CHUNKS if chunk > 1 else max(MOST_CHUNKS, FILL_COUNTS // block_e),
        TAIL=TAIL,
        **tile,
    )
    return expert_offsets, token_offsets, row_arrays[0], row_arrays[1]


def _scanned(block_counts: Tensor, blocks: int, E: int) -> tuple[Tensor | None, Tensor, int]:
    """`before` and `totals` of `fill_kernel`, and the blocks of a chunk: one, if it can do without a scan."""
    if blocks * E <= FEW_COUNTS:
        return None, block_counts, 1
    chunk = SCAN_BLOCKS * cdiv(blocks, SCAN_BLOCKS * MOST_CHUNKS)
    chunks = cdiv(blocks, chunk)
    before, totals = torch.empty_like(block_counts), block_counts.new_empty((chunks * E,))
    scan_e = power_of_two(E, 1, SCAN_EXPERTS)
    scan_kernel[(chunks, cdiv(E, scan_e))](
        block_counts, before, totals, blocks, E, chunk, STEP=SCAN_BLOCKS, BLOCK_E=scan_e, num_warps=4
    )
    return before, totals, chunk


def bound_assignments(bits_TW: Tensor, margin_TE: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Does not make the host wait."""
    T, E = margin_TE.shape
    device = bits_TW.device
    if E > MOST_EXPERTS:
        return OPERATIONS["bound_assignments"].run(bits_TW, margin_TE, capacity)
    if T == 0:
        return bits_TW.clone(), torch.zeros((), dtype=torch.int64, device=device)
    block_e = power_of_two(E, 64)
    block_t = SELECT_ELEMENTS // block_e
    tiles = cdiv(cdiv(T, block_t), SELECT_PROGRAMS)  # per program
    programs = cdiv(T, block_t * tiles)
    bits, words = _words(bits_TW), 2 * bits_TW.shape[1]
    totals = torch.empty(programs, dtype=torch.int32, device=device)
    histograms = torch.empty((PASSES, programs, BINS.value), dtype=torch.int32, device=device)
    states = torch.empty((PASSES, 2), dtype=torch.int32, device=device)
    kept, dropped = torch.empty_like(bits), torch.empty((), dtype=torch.int64, device=device)
    tile: dict[str, Any] = {
        "BLOCK_T": block_t,
        "BLOCK_E": block_e,
        "BLOCK_P": SELECT_PROGRAMS,
        "num_warps": 8,
    }
    sizes = (T, E, words, *margin_TE.stride(), capacity, programs, tiles)
    for step in range(PASSES):
        select_kernel[(programs,)](bits, margin_TE, totals, histograms, states, *sizes, PASS=step, **tile)
    drop_kernel[(programs,)](bits, margin_TE, totals, histograms, states, kept, dropped, *sizes, PASSES=PASSES, **tile)
    return kept.view(torch.int64), dropped
