"""`sum_tile` and `weigh_tile` of vlcl/losses/pairwise.py as Triton kernels for float32 on CUDA: what torch does in some
twenty passes over a tile of similarities is one pass here. The matrix products before and after stay torch's.

A program takes a block of R rows past a share of the tile's columns, C at a time. Sums along rows are complete for that
share, sums along columns for that block; the parts are added up afterwards. No atomics: the same card gives the same
bits.

Kernels that multiplied as well, with no tile in memory, were tried first: on an H100, B = 16,384, D = 512, they took
4.9 times as long as torch's own operations in float32, and as long in tf32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlcl.losses.pairwise import MASKED

FILL = tl.constexpr(MASKED)
BLOCK: dict[str, Any] = {"BLOCK_R": 32, "BLOCK_C": 128, "num_warps": 4}
SHARE = 1024  # columns of a program
ADDING: dict[str, Any] = {"BLOCK": 256}


@triton.jit
def _negatives(row_x_ptr, row_y_ptr, r_R, c_C, in_r_R, in_c_C):
    row_x_R = tl.load(row_x_ptr + r_R, mask=in_r_R, other=-1)
    row_y_C = tl.load(row_y_ptr + c_C, mask=in_c_C, other=-1)
    return (row_x_R[:, None] != row_y_C[None, :]) & (row_y_C >= 0)[None, :] & in_r_R[:, None]


@triton.jit
def _sum_kernel(
    cos_ptr, row_x_ptr, row_y_ptr, scale_x_ptr, scale_y_ptr, rows_ptr, columns_ptr,
    scale_x_step, scale_y_step, height, width, share, OWN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The largest s, and the sums of e^{s - largest} and of its square: rows_ptr [3, shares, height], columns_ptr
    [3, blocks, width]."""
    r_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_r_R = r_R < height
    scale_R = tl.load(scale_x_ptr + r_R * scale_x_step, mask=in_r_R, other=0.0)
    largest_R = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    sum_R, square_R = tl.zeros((BLOCK_R,), tl.float32), tl.zeros((BLOCK_R,), tl.float32)
    first = tl.program_id(1) * share
    for left in range(first, min(first + share, width), BLOCK_C):
        c_C = left + tl.arange(0, BLOCK_C)
        in_c_C = c_C < width
        place_RC, in_RC = cos_ptr + r_R[:, None] * width + c_C[None, :], in_r_R[:, None] & in_c_C[None, :]
        cos_RC = tl.load(place_RC, mask=in_RC, other=0.0)
        negative_RC = _negatives(row_x_ptr, row_y_ptr, r_R, c_C, in_r_R, in_c_C)
        s_RC = tl.where(negative_RC, cos_RC * scale_R[:, None], float("-inf"))
        new_R = tl.maximum(largest_R, tl.max(s_RC, 1))
        shift_R = tl.where(new_R == float("-inf"), 0.0, new_R)  # no negative so far
        e_RC, shrink_R = tl.exp(s_RC - shift_R[:, None]), tl.exp(largest_R - shift_R)
        sum_R = sum_R * shrink_R + tl.sum(e_RC, 1)
        square_R = square_R * shrink_R * shrink_R + tl.sum(e_RC * e_RC, 1)
        largest_R = new_R
        if OWN:
            scale_C = tl.load(scale_y_ptr + c_C * scale_y_step, mask=in_c_C, other=0.0)
            s_RC = tl.where(negative_RC, cos_RC * scale_C[None, :], float("-inf"))
            largest_C = tl.max(s_RC, 0)
            e_RC = tl.exp(s_RC - tl.where(largest_C == float("-inf"), 0.0, largest_C)[None, :])
            place_C, step = columns_ptr + tl.program_id(0) * width + c_C, tl.num_programs(0) * width
            tl.store(place_C, largest_C, mask=in_c_C)
            tl.store(place_C + step, tl.sum(e_RC, 0), mask=in_c_C)
            tl.store(place_C + 2 * step, tl.sum(e_RC * e_RC, 0), mask=in_c_C)
    place_R, step = rows_ptr + tl.program_id(1) * height + r_R, tl.num_programs(1) * height
    tl.store(place_R, largest_R, mask=in_r_R)
    tl.store(place_R + step, sum_R, mask=in_r_R)
    tl.store(place_R + 2 * step, square_R, mask=in_r_R)


@triton.jit
def _log1p(e):
    """For e from 0 to 1, to the last bits even where e is tiny (a GPU's log near 1 is not): 2 artanh(e / (2 + e))."""
    z = e / (2.0 + e)
    q = z * z
    series = 1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15))))))
    return 2.0 * z * (1.0 + q * series)


@triton.jit
def _add_logs_kernel(parts_ptr, logs_ptr, step_k, step_n, num_parts, length, BLOCK: tl.constexpr):
    """logs_ptr [2, length]: log of the sums of e^s and of e^2s so far, to which those of parts_ptr [3, num_parts,
    length] come."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < length
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total, square = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for part in range(num_parts):
        place, step = parts_ptr + part * length + n, num_parts * length
        part_largest = tl.load(place, mask=inside, other=float("-inf"))
        new = tl.maximum(largest, part_largest)
        shift = tl.where(new == float("-inf"), 0.0, new)
        shrink, part_shrink = tl.exp(largest - shift), tl.exp(part_largest - shift)
        total = total * shrink + tl.load(place + step, mask=inside, other=0.0) * part_shrink
        square = (
            square * shrink * shrink + tl.load(place + 2 * step, mask=inside, other=0.0) * part_shrink * part_shrink
        )
        largest = new
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    _add_log(logs_ptr + n * step_n, tl.log(total) + shift, inside)
    _add_log(logs_ptr + step_k + n * step_n, tl.log(square) + 2 * shift, inside)


@triton.jit
def _add_log(place, new, inside):
    """logaddexp in place. `tl.maximum` may drop what is no number."""
    old = tl.load(place, mask=inside, other=float("-inf"))
    high, low = tl.maximum(old, new), tl.minimum(old, new)
    both = tl.where(low == float("-inf"), high, high + _log1p(tl.exp(low - high)))
    tl.store(place, tl.where((old == old) & (new == new), both, old + new), mask=inside)


@triton.jit
def _add_sums_kernel(parts_ptr, sums_ptr, step_k, step_n, num_parts, length, BLOCK: tl.constexpr):
    """sums_ptr [4, length] += the sum of parts_ptr [4, num_parts, length] over the parts."""
    n, k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    inside = n < length
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(num_parts):
        total += tl.load(parts_ptr + (k * num_parts + part) * length + n, mask=inside, other=0.0)
    place = sums_ptr + k * step_k + n * step_n
    tl.store(place, tl.load(place, mask=inside, other=0.0) + total, mask=inside)


@triton.jit
def _weights(cos, scale, offset, cap, SOFTPLUS: tl.constexpr):
    """w, and what the total sums. A cosine that is no number gives a weight that is none."""
    x = cos * scale - offset
    if SOFTPLUS:
        e = tl.exp(-tl.abs(x))
        w = tl.where(x < 0, e, 1.0) / (1.0 + e)
        value = tl.maximum(x, 0.0) + _log1p(e)
    else:
        w = tl.exp(tl.where(x > cap, cap, x))
        value = w
    return w, value


@triton.jit
def _weigh_kernel(
    cos_ptr, row_x_ptr, row_y_ptr, scale_x_ptr, offset_x_ptr, scale_y_ptr, offset_y_ptr, rows_ptr, columns_ptr,
    scale_x_step, offset_x_step, scale_y_step, offset_y_step, height, width, share, cap,
    SOFTPLUS: tl.constexpr, ANCHORS: tl.constexpr, OWN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The slope in place of the cosine, and the sums of w, w cos, w^2 and the value: rows_ptr [4, shares, height],
    columns_ptr [4, blocks, width]. ANCHORS: the columns are anchors, too."""
    r_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_r_R = r_R < height
    scale_R = tl.load(scale_x_ptr + r_R * scale_x_step, mask=in_r_R, other=0.0)
    offset_R = tl.load(offset_x_ptr + r_R * offset_x_step, mask=in_r_R, other=0.0)
    weight_R, cosine_R = tl.zeros((BLOCK_R,), tl.float32), tl.zeros((BLOCK_R,), tl.float32)
    square_R, value_R = tl.zeros((BLOCK_R,), tl.float32), tl.zeros((BLOCK_R,), tl.float32)
    first = tl.program_id(1) * share
    for left in range(first, min(first + share, width), BLOCK_C):
        c_C = left + tl.arange(0, BLOCK_C)
        in_c_C = c_C < width
        place_RC, in_RC = cos_ptr + r_R[:, None] * width + c_C[None, :], in_r_R[:, None] & in_c_C[None, :]
        negative_RC = _negatives(row_x_ptr, row_y_ptr, r_R, c_C, in_r_R, in_c_C)
        cos_RC = tl.where(negative_RC, tl.load(place_RC, mask=in_RC, other=0.0), FILL)
        w_RC, value_RC = _weights(cos_RC, scale_R[:, None], offset_R[:, None], cap, SOFTPLUS)
        w_RC, value_RC = tl.where(negative_RC, w_RC, 0.0), tl.where(negative_RC, value_RC, 0.0)
        weight_R += tl.sum(w_RC, 1)
        cosine_R += tl.sum(w_RC * cos_RC, 1)
        square_R += tl.sum(w_RC * w_RC, 1)
        value_R += tl.sum(value_RC, 1)
        slope_RC = w_RC * scale_R[:, None]
        if ANCHORS:
            scale_C = tl.load(scale_y_ptr + c_C * scale_y_step, mask=in_c_C, other=0.0)
            if not SOFTPLUS:  # else one scale and offset: the other direction's weight of a pair is this one
                offset_C = tl.load(offset_y_ptr + c_C * offset_y_step, mask=in_c_C, other=0.0)
                w_RC, value_RC = _weights(cos_RC, scale_C[None, :], offset_C[None, :], cap, SOFTPLUS)
                w_RC, value_RC = tl.where(negative_RC, w_RC, 0.0), tl.where(negative_RC, value_RC, 0.0)
            slope_RC += w_RC * scale_C[None, :]
            if OWN:
                place_C, step = columns_ptr + tl.program_id(0) * width + c_C, tl.num_programs(0) * width
                tl.store(place_C, tl.sum(w_RC, 0), mask=in_c_C)
                tl.store(place_C + step, tl.sum(w_RC * cos_RC, 0), mask=in_c_C)
                tl.store(place_C + 2 * step, tl.sum(w_RC * w_RC, 0), mask=in_c_C)
                tl.store(place_C + 3 * step, tl.sum(value_RC, 0), mask=in_c_C)
        tl.store(place_RC, slope_RC, mask=in_RC)
    place_R, step = rows_ptr + tl.program_id(1) * height + r_R, tl.num_programs(1) * height
    tl.store(place_R, weight_R, mask=in_r_R)
    tl.store(place_R + step, cosine_R, mask=in_r_R)
    tl.store(place_R + 2 * step, square_R, mask=in_r_R)
    tl.store(place_R + 3 * step, value_R, mask=in_r_R)


def sum_tile(
    cos_RC: Tensor, row_R: Tensor, row_C: Tensor, scale_R: Tensor, scale_C: Tensor | None, logs_2R: Tensor,
    logs_2C: Tensor | None,
) -> None:  # fmt: skip
    """As in vlcl/losses/pairwise.py; leaves cos_RC as it is."""
    own = scale_C is not None
    scale_C = scale_R if scale_C is None else scale_C
    grid, (rows, columns) = _grid(cos_RC), _parts(cos_RC, 3, own)
    with torch.cuda.device_of(cos_RC):
        _sum_kernel[grid](
            cos_RC, row_R, row_C, scale_R, scale_C, rows, columns, scale_R.stride(0), scale_C.stride(0),
            cos_RC.shape[0], cos_RC.shape[1], SHARE, **_constants(OWN=own),
        )  # fmt: skip
        for parts, logs in ((rows, logs_2R), (columns, logs_2C)):
            if logs is not None:
                _, num_parts, length = parts.shape
                step_k, step_n = logs.stride()
                _add_logs_kernel[triton.cdiv(length, ADDING["BLOCK"]),](
                    parts, logs, step_k, step_n, num_parts, length, **ADDING
                )


def weigh_tile(
    cos_RC: Tensor, row_R: Tensor, row_C: Tensor, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor] | None,
    cap: float, kind: str, sums_4R: Tensor, sums_4C: Tensor | None,
) -> Tensor:  # fmt: skip
    """As in vlcl/losses/pairwise.py."""
    own = sums_4C is not None
    grid, (row_parts, column_parts) = _grid(cos_RC), _parts(cos_RC, 4, own)
    (scale_R, offset_R), (scale_C, offset_C) = rows, rows if columns is None else columns
    with torch.cuda.device_of(cos_RC):
        _weigh_kernel[grid](
            cos_RC, row_R, row_C, scale_R, offset_R, scale_C, offset_C, row_parts, column_parts, scale_R.stride(0),
            offset_R.stride(0), scale_C.stride(0), offset_C.stride(0), cos_RC.shape[0], cos_RC.shape[1], SHARE, cap,
            **_constants(SOFTPLUS=kind == "softplus", ANCHORS=columns is not None, OWN=own),
        )  # fmt: skip
        for parts, sums in ((row_parts, sums_4R), (column_parts, sums_4C)):
            if sums is not None:
                _, num_parts, length = parts.shape
                step_k, step_n = sums.stride()
                _add_sums_kernel[triton.cdiv(length, ADDING["BLOCK"]), 4](
                    parts, sums, step_k, step_n, num_parts, length, **ADDING
                )
    return cos_RC


def _constants(**more: bool) -> dict[str, Any]:  # Any: triton calls the type of each constexpr
    """What a kernel is compiled for."""
    return {**BLOCK, **more}


def _grid(cos_RC: Tensor) -> tuple[int, int]:
    """Blocks of rows, and shares of columns."""
    height, width = cos_RC.shape
    return triton.cdiv(height, BLOCK["BLOCK_R"]), triton.cdiv(width, SHARE)


def _parts(cos_RC: Tensor, number: int, own: bool) -> tuple[Tensor, Tensor]:
    """Where the programs leave their sums along rows and along columns."""
    (height, width), (blocks, shares) = cos_RC.shape, _grid(cos_RC)
    return cos_RC.new_empty(number, shares, height), cos_RC.new_empty((number, blocks, width) if own else 0)
