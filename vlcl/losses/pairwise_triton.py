"""`pair_statistics` and `_walk` of vlcl/losses/pairwise.py as Triton kernels: no similarity leaves the chip.

A program walks a block of R of our anchors of one direction past the candidates, a block of C at a time: similarities
of the block from D in pieces, then the online log-sum-exp, or the weights and their product with the candidates. A
gradient wider than WIDEST is the work of several programs, each of which computes the similarities for itself. Where
that gives fewer programs than the card takes, the candidates are split, too, and their parts added up afterwards:
no atomics, the same card gives the same bits.

Each direction is a launch of its own over all candidates, so the products of our own pairs, which the torch path reads
along rows and down columns, are formed twice. Once would need sums across programs: atomics, or a B x C matrix.

Misuse: this never ran on a GPU, let alone against a clock. It was compared with the torch path in Triton's interpreter
(on a CPU, all products in full; not with bfloat16, which the interpreter cannot multiply) and compiled for sm_80 to
sm_90. Until it is measured it is for those who ask for it: VLCL_KERNELS=triton (vlcl/from_config.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlcl.losses.pairs import Candidates, Statistics, Sums, Weighing
from vlcl.losses.pairwise import MASKED

FILL = tl.constexpr(MASKED)
WIDEST = 256  # columns of a gradient that a program holds, in registers
WAVES = 4  # programs a multiprocessor, where splitting the candidates gives as many


@dataclass(frozen=True)
class Blocks:
    """What a program works on at a time. Within the 99 KiB of shared memory that a small card has, and but for a few
    bytes without spilled registers (ptxas for sm_80, sm_86, sm_89 and sm_90)."""

    r: int
    c: int
    d: int
    num_warps: int
    num_stages: int

    def constants(self, **more: int | str) -> dict[str, Any]:  # Any: triton calls the type of each constexpr
        """What a kernel is compiled for."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return {"BLOCK_R": self.r, "BLOCK_C": self.c, "BLOCK_D": self.d, **more, **options}


STATISTICS = {"half": Blocks(128, 64, 64, 8, 3), "tf32": Blocks(128, 64, 32, 8, 3), "ieee": Blocks(128, 64, 16, 8, 2)}
WALK = {"half": Blocks(64, 64, 64, 8, 3), "tf32": Blocks(64, 32, 32, 8, 3), "ieee": Blocks(64, 32, 16, 8, 2)}


@triton.jit
def _cosines(
    x_ptr, y_ptr, row_x_ptr, row_y_ptr, r_R, c_C, num_own, end, width, fill,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """cos_RC, `fill` where the candidate is no negative (past `end`: none), and where it is one."""
    in_r_R, in_c_C = r_R < num_own, c_C < end
    x_R, y_C = x_ptr + r_R.to(tl.int64) * width, y_ptr + c_C.to(tl.int64) * width
    cos_RC = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for left in range(0, width, BLOCK_D):
        d_D = left + tl.arange(0, BLOCK_D)
        in_d_D = d_D < width
        x_RD = tl.load(x_R[:, None] + d_D[None, :], mask=in_r_R[:, None] & in_d_D[None, :], other=0.0)
        y_CD = tl.load(y_C[:, None] + d_D[None, :], mask=in_c_C[:, None] & in_d_D[None, :], other=0.0)
        cos_RC = tl.dot(x_RD, tl.trans(y_CD), cos_RC, input_precision=PRECISION)
    row_x_R = tl.load(row_x_ptr + r_R, mask=in_r_R, other=-1)
    row_y_C = tl.load(row_y_ptr + c_C, mask=in_c_C, other=-1)
    negative_RC = (row_x_R[:, None] != row_y_C[None, :]) & (row_y_C >= 0)[None, :]
    return tl.where(negative_RC, cos_RC, fill), negative_RC


@triton.jit
def _statistics_kernel(
    x_ptr, y_ptr, row_x_ptr, row_y_ptr, scale_ptr, sums_ptr, count_ptr, num_own, end, width, share,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For an anchor and a share of the candidates: the largest s, the sums of e^{s - largest} and of its square, and
    the number of negatives."""
    r_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    part, num_parts = tl.program_id(1), tl.num_programs(1)
    in_r_R = r_R < num_own
    scale_R = tl.load(scale_ptr + r_R, mask=in_r_R, other=1.0)
    largest_R = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    sum_R, square_R = tl.zeros((BLOCK_R,), tl.float32), tl.zeros((BLOCK_R,), tl.float32)
    count_R = tl.zeros((BLOCK_R,), tl.int32)
    for left in range(part * share, min((part + 1) * share, end), BLOCK_C):
        c_C = left + tl.arange(0, BLOCK_C)
        cos_RC, negative_RC = _cosines(
            x_ptr, y_ptr, row_x_ptr, row_y_ptr, r_R, c_C, num_own, end, width, float("-inf"),
            BLOCK_R, BLOCK_C, BLOCK_D, PRECISION,
        )  # fmt: skip
        s_RC = cos_RC * scale_R[:, None]
        new_R = tl.maximum(largest_R, tl.max(s_RC, 1))
        shift_R = tl.where(new_R == float("-inf"), 0.0, new_R)  # no negative so far
        e_RC, shrink_R = tl.exp(s_RC - shift_R[:, None]), tl.exp(largest_R - shift_R)
        sum_R = sum_R * shrink_R + tl.sum(e_RC, 1)
        square_R = square_R * shrink_R * shrink_R + tl.sum(e_RC * e_RC, 1)
        count_R += tl.sum(negative_RC.to(tl.int32), 1)
        largest_R = new_R
    tl.store(sums_ptr + (0 * num_parts + part) * num_own + r_R, largest_R, mask=in_r_R)
    tl.store(sums_ptr + (1 * num_parts + part) * num_own + r_R, sum_R, mask=in_r_R)
    tl.store(sums_ptr + (2 * num_parts + part) * num_own + r_R, square_R, mask=in_r_R)
    tl.store(count_ptr + part * num_own + r_R, count_R, mask=in_r_R)


@triton.jit
def _log1p(e):
    """For e from 0 to 1, to the last bits even where e is tiny (a GPU's log near 1 is not): 2 artanh(e / (2 + e))."""
    z = e / (2.0 + e)
    q = z * z
    series = 1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15))))))
    return 2.0 * z * (1.0 + q * series)


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
def _walk_kernel(
    x_ptr, y_ptr, row_x_ptr, row_y_ptr, scale_ptr, offset_ptr, scale_y_ptr, offset_y_ptr, sums_ptr, gradient_ptr,
    num_own, num_pairs, end, width, share, cap, SOFTPLUS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """For an anchor and a share of the candidates: sums of w, w cos, w^2 and the value, and BLOCK_E (E) columns of the
    gradient, to which the candidates that are anchors, too, add their weights of the other direction."""
    r_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    e_E = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    part, num_parts = tl.program_id(2), tl.num_programs(2)
    in_r_R, in_e_E = r_R < num_own, e_E < width
    scale_R = tl.load(scale_ptr + r_R, mask=in_r_R, other=0.0)
    offset_R = tl.load(offset_ptr + r_R, mask=in_r_R, other=0.0)
    weight_R, cosine_R = tl.zeros((BLOCK_R,), tl.float32), tl.zeros((BLOCK_R,), tl.float32)
    square_R, value_R = tl.zeros((BLOCK_R,), tl.float32), tl.zeros((BLOCK_R,), tl.float32)
    gradient_RE = tl.zeros((BLOCK_R, BLOCK_E), tl.float32)
    for left in range(part * share, min((part + 1) * share, end), BLOCK_C):
        c_C = left + tl.arange(0, BLOCK_C)
        cos_RC, _ = _cosines(
            x_ptr, y_ptr, row_x_ptr, row_y_ptr, r_R, c_C, num_own, end, width, FILL,
            BLOCK_R, BLOCK_C, BLOCK_D, PRECISION,
        )  # fmt: skip
        w_RC, value_RC = _weights(cos_RC, scale_R[:, None], offset_R[:, None], cap, SOFTPLUS)
        weight_R += tl.sum(w_RC, 1)
        cosine_R += tl.sum(w_RC * cos_RC, 1)
        square_R += tl.sum(w_RC * w_RC, 1)
        value_R += tl.sum(value_RC, 1)
        # A candidate that is no anchor of this step has scale 0 here, and with it no part in the slope.
        scale_C = tl.load(scale_y_ptr + c_C, mask=c_C < num_pairs, other=0.0)
        if SOFTPLUS:  # one scale and offset: the other direction's weight of a pair is this one
            slope_RC = w_RC * (scale_R[:, None] + scale_C[None, :])
        else:
            offset_C = tl.load(offset_y_ptr + c_C, mask=c_C < num_pairs, other=0.0)
            w_y_RC, _ = _weights(cos_RC, scale_C[None, :], offset_C[None, :], cap, SOFTPLUS)
            slope_RC = w_RC * scale_R[:, None] + w_y_RC * scale_C[None, :]
        y_CE = tl.load(
            y_ptr + c_C.to(tl.int64)[:, None] * width + e_E[None, :],
            mask=(c_C < end)[:, None] & in_e_E[None, :],
            other=0.0,
        )
        # Weights span more than float16 holds: in float32, where half-precision features are exact in tf32, too.
        gradient_RE = tl.dot(slope_RC, y_CE.to(tl.float32), gradient_RE, input_precision=PRECISION)
    tl.store(
        gradient_ptr + (part.to(tl.int64) * num_own + r_R)[:, None] * width + e_E[None, :],
        gradient_RE,
        mask=in_r_R[:, None] & in_e_E[None, :],
    )
    first = in_r_R & (tl.program_id(1) == 0)
    tl.store(sums_ptr + (0 * num_parts + part) * num_own + r_R, weight_R, mask=first)
    tl.store(sums_ptr + (1 * num_parts + part) * num_own + r_R, cosine_R, mask=first)
    tl.store(sums_ptr + (2 * num_parts + part) * num_own + r_R, square_R, mask=first)
    tl.store(sums_ptr + (3 * num_parts + part) * num_own + r_R, value_R, mask=first)


@torch.no_grad()
def pair_statistics(
    image_BD: Tensor, text_BD: Tensor, row_B: Tensor, candidates: Candidates, scale_BK: Tensor
) -> Statistics:
    kind, precision = _arithmetic(image_BD)
    blocks, (num_own, width), end = STATISTICS[kind], image_BD.shape, len(candidates.row_C)
    num_blocks = triton.cdiv(num_own, blocks.r)
    parts, share = _parts(num_blocks, end, blocks.c, image_BD)
    count_QB = torch.empty((parts, num_own), dtype=torch.int32, device=image_BD.device)
    log_sum_BK, log_square_BK = torch.empty_like(scale_BK), torch.empty_like(scale_BK)
    for k, anchor_BD in enumerate((image_BD, text_BD)):
        sums = torch.empty((3, parts, num_own), dtype=torch.float32, device=image_BD.device)
        with torch.cuda.device_of(image_BD):
            _statistics_kernel[(num_blocks, parts)](
                anchor_BD.contiguous(), candidates.other(k).contiguous(), row_B.contiguous(),
                candidates.row_C.contiguous(), _column(scale_BK, k), sums, count_QB, num_own, end, width, share,
                **blocks.constants(PRECISION=precision),
            )  # fmt: skip
        largest_QB, sum_QB, square_QB = sums
        largest_B = largest_QB.amax(0)
        largest_B.masked_fill_(largest_B == -torch.inf, 0.0)
        shrink_QB = torch.exp(largest_QB - largest_B)
        log_sum_BK[:, k] = (sum_QB * shrink_QB).sum(0).log() + largest_B
        log_square_BK[:, k] = (square_QB * shrink_QB.square()).sum(0).log() + 2 * largest_B
    return Statistics(log_sum_BK, log_square_BK, count_QB.sum(0).to(row_B.dtype))  # the same in both directions


@torch.no_grad()
def walk(
    image_BD: Tensor, text_BD: Tensor, scale_BK: Tensor, offset_BK: Tensor, weighing: Weighing
) -> tuple[Tensor, Sums, list[Tensor]]:
    """As `_walk` there. Features may be of half precision, too; scales and offsets in float32 then."""
    arithmetic, precision = _arithmetic(image_BD)
    blocks, (num_own, width), candidates = WALK[arithmetic], image_BD.shape, weighing.candidates
    end = len(candidates.row_C) if weighing.with_bank else candidates.num_pairs
    block_e = min(WIDEST, max(16, triton.next_power_of_2(width)))
    grid = triton.cdiv(num_own, blocks.r), triton.cdiv(width, block_e)
    parts, share = _parts(grid[0] * grid[1], end, blocks.c, image_BD)
    sums_BK, grads = [torch.empty_like(scale_BK) for _ in range(4)], []
    for k, anchor_BD in enumerate((image_BD, text_BD)):
        sums = torch.empty((4, parts, num_own), dtype=torch.float32, device=image_BD.device)
        gradient_QBD = torch.empty((parts, num_own, width), dtype=torch.float32, device=image_BD.device)
        with torch.cuda.device_of(image_BD):
            _walk_kernel[(*grid, parts)](
                anchor_BD.contiguous(), candidates.other(k).contiguous(), weighing.row_B.contiguous(),
                candidates.row_C.contiguous(), _column(scale_BK, k), _column(offset_BK, k),
                _column(weighing.scale_GK, 1 - k), _column(weighing.offset_GK, 1 - k), sums, gradient_QBD,
                num_own, candidates.num_pairs, end, width, share, weighing.cap,
                **blocks.constants(BLOCK_E=block_e, PRECISION=precision, SOFTPLUS=weighing.kind == "softplus"),
            )  # fmt: skip
        for sum_BK, sum_B in zip(sums_BK, sums.sum(1)):
            sum_BK[:, k] = sum_B
        grads.append((gradient_QBD[0] if parts == 1 else gradient_QBD.sum(0)).to(anchor_BD.dtype))
    weight_BK, cosine_BK, square_BK, value_BK = sums_BK
    return value_BK.sum(), Sums(weight_BK, cosine_BK, square_BK), grads


def _arithmetic(feature_BD: Tensor) -> tuple[str, str]:
    """The key of the blocks to take, and how float32 is multiplied, as torch's products are."""
    if feature_BD.dtype != torch.float32:
        return "half", "tf32"
    matmul = torch.backends.cuda.matmul
    # Where torch has the newer of the two names, reading the older one may raise.
    is_tf32 = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    precision = "tf32" if is_tf32 else "ieee"
    return precision, precision


def _parts(num_programs: int, end: int, block: int, feature_BD: Tensor) -> tuple[int, int]:
    """Into how many parts to split the candidates for the card to be busy, and how many candidates a part has. The
    gradients of the parts take no more memory than WAVES programs a multiprocessor fill."""
    device = feature_BD.device
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    parts = max(1, min(WAVES * processors // max(1, num_programs), triton.cdiv(end, block)))
    share = max(block, triton.cdiv(triton.cdiv(end, parts), block) * block)
    return max(1, triton.cdiv(end, share)), share


def _column(x_BK: Tensor, k: int) -> Tensor:
    return x_BK[:, k].float().contiguous()
