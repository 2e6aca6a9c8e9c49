"""Matrix products of the experts on ragged rows: the Triton kernels of `grouped_ffn` and its backward.

    up                 pre-activation and activation of gathered tokens        rows [R, H]
    linear             each expert's linear map of contiguous rows             rows [R, N]
    activation_gradient   gradient through the second matrix and the activation, with the gate's gradient   rows [R, H]

Rows of expert e are offsets[e]:offsets[e+1]. The kernels are persistent: as many programs as fit on the device walk
the tiles of all experts, which they compute from the offsets on the device. An expert without rows has no tile, and
unused rows cost nothing. Sums are fp32 and in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .activations import activate, derivative
from .launch import kernel
from .proxy_fence import proxy_fence, safe_stages


def pointer(tensor: Tensor | None, instead: Tensor) -> Tensor:
    """`tensor`, or `instead` as a placeholder that the kernel does not read."""
    return instead if tensor is None else tensor


def launch_options(config: tiles.GemmConfig, chip: str, gathers: bool = False) -> dict[str, int]:
    """Compiler options besides the tile.

    A product that `gathers` needs one more stage: it loads token indices one step ahead of their rows.
    """
    options = {"num_warps": config.num_warps, "num_stages": safe_stages(config.num_stages + gathers, chip)}
    if config.max_registers is not None:
        options["maxnreg"] = config.max_registers
    return options


def precision(dtype: torch.dtype, chip: str) -> str:
    """How to multiply fp32 operands: follow torch's flag, whether it was set by its old or new name."""
    if dtype != torch.float32 or (chip.startswith("gfx") and chip != "gfx942"):  # the only AMD chip with tf32
        return "ieee"
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # the old getter raises once the new flags are set
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@triton.jit
def row_tiles(offsets, E, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """Row tiles of each expert, [BLOCK_E], 0 past the last."""
    e = tl.arange(0, BLOCK_E)
    start = tl.load(offsets + e, mask=e < E, other=0)
    stop = tl.load(offsets + 1 + e, mask=e < E, other=0)
    return (stop - start + BLOCK_M - 1) // BLOCK_M


@triton.jit
def _place(tile, tiles_n, tiles_m, GROUP_M: tl.constexpr):
    """Row tile and column tile. GROUP_M row tiles share a run of columns, so that both operands stay in L2."""
    group = tile // (GROUP_M * tiles_n)
    first = group * GROUP_M
    size = tl.minimum(tiles_m - first, GROUP_M)
    inside = tile - group * GROUP_M * tiles_n
    return first + inside % size, inside // size


@triton.jit
def expert_rows(m, tiles_E, ends_E, offsets, BLOCK_M: tl.constexpr):
    """The expert of row tile m, the tile's first row and the end of the expert's rows."""
    before = ends_E <= m
    e = tl.sum(before.to(tl.int32), axis=0)
    first = tl.sum(tl.where(before, tiles_E, 0), axis=0)
    start = tl.load(offsets + e) + (m - first) * BLOCK_M
    return e, start, tl.load(offsets + e + 1)


@triton.jit
def _tile_at(start, n, N, BLOCK_M: tl.constexpr):
    """Address of a tile of rows [., N] that begins at row `start`: one 64-bit base and 32-bit offsets."""
    return start.to(tl.int64) * N, tl.arange(0, BLOCK_M)[:, None] * N + n[None, :]


@triton.jit
def _product(
    acc, acc2, a_rows, b_columns, b2_columns, m_mask, n_mask, K, stride_ak, stride_bk, stride_b2k,
    SECOND: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + A B, and acc2 + A B2 (SECOND), for pointers to the rows of A [BLOCK_M] and the columns of B [BLOCK_N].

    One loop for both loads A once, which saves a third of the reads from L2.
    """
    k = tl.arange(0, BLOCK_K)
    a_at = a_rows[:, None] + k[None, :] * stride_ak
    b_at = b_columns[None, :] + (k * stride_bk)[:, None]
    b2_at = b2_columns[None, :] + (k * stride_b2k)[:, None]
    for k0 in range(0, K, BLOCK_K):
        inside = k < K - k0
        a_mask, b_mask = m_mask[:, None], n_mask[None, :]
        if not EVEN_K:
            a_mask, b_mask = a_mask & inside[None, :], b_mask & inside[:, None]
        a = tl.load(a_at, mask=a_mask, other=0.0)
        proxy_fence(a, PRECISION)
        acc = tl.dot(a, _operand(b_at, b_mask, EVEN_K and EVEN_N), acc, input_precision=PRECISION)
        if SECOND:
            acc2 = tl.dot(a, _operand(b2_at, b_mask, EVEN_K and EVEN_N), acc2, input_precision=PRECISION)
            b2_at += BLOCK_K * stride_b2k
        a_at += BLOCK_K * stride_ak
        b_at += BLOCK_K * stride_bk
    return acc, acc2


@triton.jit
def _operand(at, mask, WHOLE: tl.constexpr):
    """Load from the pointers, 0 outside the mask."""
    if WHOLE:
        return tl.load(at)
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def _halves(tile_MN):
    """Left and right half of a tile's columns, without moving registers."""
    M: tl.constexpr = tile_MN.shape[0]
    N: tl.constexpr = tile_MN.shape[1]
    return tl.split(tl.permute(tl.reshape(tile_MN, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def _up_columns(
    h, u, n0, start, m_mask, e64, b1, b3, h_out, u_out, a_out, N,
    GATED: tl.constexpr, BIAS: tl.constexpr, BIAS3: tl.constexpr, SAVE: tl.constexpr, ACTIVATE: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Bias, activation and stores of `up_kernel` for a tile's columns from n0 on, in PIECES to save registers."""
    width: tl.constexpr = h.shape[1]
    if PIECES > 1:
        left_h, right_h = _halves(h)
        left_u, right_u = left_h, right_h
        if GATED:
            left_u, right_u = _halves(u)
        _up_columns(
            left_h, left_u, n0, start, m_mask, e64, b1, b3, h_out, u_out, a_out, N,
            GATED, BIAS, BIAS3, SAVE, ACTIVATE, ACTIVATION, BLOCK_M, PIECES // 2,
        )  # fmt: skip
        _up_columns(
            right_h, right_u, n0 + width // 2, start, m_mask, e64, b1, b3, h_out, u_out, a_out, N,
            GATED, BIAS, BIAS3, SAVE, ACTIVATE, ACTIVATION, BLOCK_M, PIECES // 2,
        )  # fmt: skip
    else:
        n = n0 + tl.arange(0, width)
        n_mask = n < N
        base, at = _tile_at(start, n, N, BLOCK_M)
        mask = m_mask[:, None] & n_mask[None, :]
        if BIAS:
            h += tl.load(b1 + e64 * N + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
        rounded = h.to(a_out.dtype.element_ty)
        if SAVE:
            tl.store(h_out + base + at, rounded, mask=mask)
        a = activate(rounded.to(tl.float32), ACTIVATION)
        if GATED:
            if BIAS3:
                u += tl.load(b3 + e64 * N + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
            rounded_u = u.to(a_out.dtype.element_ty)
            if SAVE:
                tl.store(u_out + base + at, rounded_u, mask=mask)
            a *= rounded_u.to(tl.float32)
        if ACTIVATE:
            tl.store(a_out + base + at, a.to(a_out.dtype.element_ty), mask=mask)


@kernel
def up_kernel(
    x, token_of_row, offsets, w1, b1, w3, b3, h_out, u_out, a_out,
    E, K, N, stride_xt, stride_we, stride_wk, stride_wn, stride_ve, stride_vk, stride_vn,
    GATED: tl.constexpr, BIAS: tl.constexpr, BIAS3: tl.constexpr, SAVE: tl.constexpr, ACTIVATE: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr, GROUP_M: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """h = x[token] w1[e] + b1[e], u = x[token] w3[e] + b3[e] (GATED), a = act(h) or act(h) * u.

    In: x [T, K], token_of_row [R], offsets [E+1], w1 and w3 [E, K, N], b1 and b3 [E, N]
    Out, rows [R, N]: h and u (SAVE), a (ACTIVATE)
    Grid: persistent. Bytes: x once from memory and N / BLOCK_N times from L2, weights once, each output once.
    """
    tiles_E = row_tiles(offsets, E, BLOCK_M, BLOCK_E)
    ends_E = tl.cumsum(tiles_E, axis=0)
    tiles_m = tl.sum(tiles_E, axis=0)
    tiles_n = tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = _place(tile, tiles_n, tiles_m, GROUP_M)
        e, start, stop = expert_rows(tile_m, tiles_E, ends_E, offsets, BLOCK_M)
        row = start + tl.arange(0, BLOCK_M)
        m_mask = row < stop
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        n_mask = n < N
        token = tl.load(token_of_row + row, mask=m_mask, other=0).to(tl.int64)
        x_rows = x + token * stride_xt
        e64 = e.to(tl.int64)
        w_columns = w1 + e64 * stride_we + n.to(tl.int64) * stride_wn
        v_columns = w3 + e64 * stride_ve + n.to(tl.int64) * stride_vn
        h, u = _product(
            tl.zeros((BLOCK_M, BLOCK_N), tl.float32), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), x_rows, w_columns,
            v_columns, m_mask, n_mask, K, 1, stride_wk, stride_vk, GATED, BLOCK_K, EVEN_K, EVEN_N, PRECISION,
        )  # fmt: skip
        _up_columns(
            h, u, tile_n * BLOCK_N, start, m_mask, e64, b1, b3, h_out, u_out, a_out, N,
            GATED, BIAS, BIAS3, SAVE, ACTIVATE, ACTIVATION, BLOCK_M, PIECES,
        )  # fmt: skip


@kernel(do_not_specialize=["R"])
def linear_kernel(
    a_in, a2_in, offsets, w, w2, bias, gate, out,
    E, R, K, N, stride_we, stride_wk, stride_wn, stride_ve, stride_vk, stride_vn,
    PAIR: tl.constexpr, BIAS: tl.constexpr, GATE: tl.constexpr, ZERO_TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    GROUP_M: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = (a w[e] (+ a2 w2[e] if PAIR) + bias[e]) * gate[row]; ZERO_TAIL zeroes unused rows.

    In: a and a2 [R, K], offsets [E+1], w and w2 [E, K, N], bias [E, N], gate [R]. Out: [R, N]
    Grid: persistent. Bytes: each operand once from memory, the output once.
    """
    tiles_E = row_tiles(offsets, E, BLOCK_M, BLOCK_E)
    ends_E = tl.cumsum(tiles_E, axis=0)
    tiles_m = tl.sum(tiles_E, axis=0)
    tiles_n = tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = _place(tile, tiles_n, tiles_m, GROUP_M)
        e, start, stop = expert_rows(tile_m, tiles_E, ends_E, offsets, BLOCK_M)
        row = start + tl.arange(0, BLOCK_M)
        m_mask = row < stop
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        n_mask = n < N
        row64, e64 = row.to(tl.int64), e.to(tl.int64)
        columns = w + e64 * stride_we + n.to(tl.int64) * stride_wn
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc, _ = _product(
            acc, acc, a_in + row64 * K, columns, columns, m_mask, n_mask, K, 1, stride_wk, stride_wk,
            False, BLOCK_K, EVEN_K, EVEN_N, PRECISION,
        )  # fmt: skip
        if PAIR:
            columns = w2 + e64 * stride_ve + n.to(tl.int64) * stride_vn
            acc, _ = _product(
                acc, acc, a2_in + row64 * K, columns, columns, m_mask, n_mask, K, 1, stride_vk, stride_vk,
                False, BLOCK_K, EVEN_K, EVEN_N, PRECISION,
            )  # fmt: skip
        if BIAS:
            acc += tl.load(bias + e64 * N + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
        if GATE:
            acc *= tl.load(gate + row, mask=m_mask, other=0.0).to(tl.float32)[:, None]
        base, at = _tile_at(start, n, N, BLOCK_M)
        tl.store(out + base + at, acc.to(out.dtype.element_ty), mask=m_mask[:, None] & n_mask[None, :])
    if ZERO_TAIL:
        last = tl.load(offsets + E)
        zero = tl.zeros((BLOCK_M, BLOCK_N), tl.float32).to(out.dtype.element_ty)
        for tile in range(tl.program_id(0), tl.cdiv(R - last, BLOCK_M) * tiles_n, tl.num_programs(0)):
            row = last + (tile // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
            n = (tile % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
            at = row.to(tl.int64)[:, None] * N + n[None, :]
            tl.store(out + at, zero, mask=(row < R)[:, None] & (n < N)[None, :])


@triton.jit
def _activation_gradient_columns(
    d_a, n0, start, m_mask, scale, h_in, u_in, d_h_out, d_u_out, a_out, N,
    GATED: tl.constexpr, ACTIVATED: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Epilogue of `activation_gradient_kernel` for columns from n0 on; returns the rows' sums for the gate."""
    width: tl.constexpr = d_a.shape[1]
    if PIECES > 1:
        left, right = _halves(d_a)
        d_gate = _activation_gradient_columns(
            left, n0, start, m_mask, scale, h_in, u_in, d_h_out, d_u_out, a_out, N,
            GATED, ACTIVATED, ACTIVATION, BLOCK_M, PIECES // 2,
        )  # fmt: skip
        return d_gate + _activation_gradient_columns(
            right, n0 + width // 2, start, m_mask, scale, h_in, u_in, d_h_out, d_u_out, a_out, N,
            GATED, ACTIVATED, ACTIVATION, BLOCK_M, PIECES // 2,
        )  # fmt: skip
    else:
        n = n0 + tl.arange(0, width)
        n_mask = n < N
        base, at = _tile_at(start, n, N, BLOCK_M)
        mask = m_mask[:, None] & n_mask[None, :]
        h = tl.load(h_in + base + at, mask=mask, other=0.0).to(tl.float32)
        act_h = activate(h, ACTIVATION)
        a = act_h
        if GATED:
            u = tl.load(u_in + base + at, mask=mask, other=0.0).to(tl.float32)
            a = act_h * u
        d_gate = tl.sum(d_a * a, axis=1)
        d_a *= scale[:, None]
        if ACTIVATED:
            tl.store(a_out + base + at, (a * scale[:, None]).to(a_out.dtype.element_ty), mask=mask)
        if GATED:
            d_u = d_a * act_h
            tl.store(d_u_out + base + at, d_u.to(d_u_out.dtype.element_ty), mask=mask)
            d_a *= u
        d_h = d_a * derivative(h, ACTIVATION)
        tl.store(d_h_out + base + at, d_h.to(d_h_out.dtype.element_ty), mask=mask)
        return d_gate


@kernel
def activation_gradient_kernel(
    d_rows, token_of_row, token_offsets, gate, offsets, w2, h_in, u_in,
    d_h_out, d_u_out, a_out, d_gate_out,
    E, K, N, stride_dr, stride_we, stride_wk, stride_wn,
    FROM_TOKENS: tl.constexpr, GATE: tl.constexpr, GATED: tl.constexpr, ACTIVATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    GROUP_M: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Gradients of h and u from d_row, with partial sums for the gate from the same tile.

    With dA = d_row w2[e]^T and scale = gate (if GATE), over k_t if d_row is gathered from tokens (FROM_TOKENS):
        d_gate[row, tile_n] = rowsum(dA * a), unscaled: a partial sum for each column tile
        d_h = scale dA act'(h) (times u),  d_u = scale dA act(h),  a = scale a (ACTIVATED, for the gradient of w2)
    In: d_rows [R, K] or the tokens' [T, K], h and u [R, N], w2 as [E, K, N] (transposed by its strides)
    Out: d_h, d_u, a [R, N]; d_gate [R, tiles_n] fp32
    Grid: persistent. Bytes: d_rows, h and u once, the outputs once.
    """
    tiles_E = row_tiles(offsets, E, BLOCK_M, BLOCK_E)
    ends_E = tl.cumsum(tiles_E, axis=0)
    tiles_m = tl.sum(tiles_E, axis=0)
    tiles_n = tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = _place(tile, tiles_n, tiles_m, GROUP_M)
        e, start, stop = expert_rows(tile_m, tiles_E, ends_E, offsets, BLOCK_M)
        row = start + tl.arange(0, BLOCK_M)
        m_mask = row < stop
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        n_mask = n < N
        row64, e64 = row.to(tl.int64), e.to(tl.int64)
        source = row64
        if FROM_TOKENS:
            source = tl.load(token_of_row + row, mask=m_mask, other=0).to(tl.int64)
        columns = w2 + e64 * stride_we + n.to(tl.int64) * stride_wn
        d_a = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        d_a, _ = _product(
            d_a, d_a, d_rows + source * stride_dr, columns, columns, m_mask, n_mask, K, 1, stride_wk, stride_wk,
            False, BLOCK_K, EVEN_K, EVEN_N, PRECISION,
        )  # fmt: skip
        scale = tl.full((BLOCK_M,), 1.0, tl.float32)
        if GATE:
            scale = tl.load(gate + row, mask=m_mask, other=0.0).to(tl.float32)
        if FROM_TOKENS:
            k = tl.load(token_offsets + source + 1) - tl.load(token_offsets + source)
            scale /= tl.maximum(k, 1).to(tl.float32)
        d_gate = _activation_gradient_columns(
            d_a, tile_n * BLOCK_N, start, m_mask, scale, h_in, u_in, d_h_out, d_u_out, a_out, N,
            GATED, ACTIVATED, ACTIVATION, BLOCK_M, PIECES,
        )  # fmt: skip
        tl.store(d_gate_out + row64 * tiles_n + tile_n, d_gate, mask=m_mask)
