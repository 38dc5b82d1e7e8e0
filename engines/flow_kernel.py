"""The flow head and its solver as one Triton kernel of three fused stages.

Every evaluation is three stages for each block of the flow head, each stage spread over many
programs (thread blocks):

1. inner product: a = SiLU(u W1 + b1)
2. outer product: h = h + gate * (a W2 + b2)
3. rows: u = (1 + scale) * norm(h) + shift of the next block; after the last block the output
   layer, the guided velocity, the solver's update, and h and u of the next evaluation.

A program of stages 1 and 2 owns a tile of rows and columns and loops over the width; one of
stage 3 owns a row, or, after the last block, a token with all its guidance branches. Any width
up to WIDEST works; tiles are masked.

Why the columns are shared out, instead of a program keeping its tokens for all evaluations: it
would have to read all weights in each of them. At width 1280 the blocks hold 20 MB in half
precision, and a Hopper multiprocessor takes at most 64 bytes a clock from L2: 300,000 clocks for an
evaluation, however few the tokens. A tile of 64 rows and 64 columns reads 0.3 MB for a product.

What is where:
- h (R, W) in float32, u and a (R, W) in the weights' dtype, x and the last velocity (T, C) in
  float32: scratch, 3 MB for 100 tokens of `bair` in three branches, small enough for L2.
- Weights: copied into one tensor, read at the same addresses in every evaluation, with a hint to
  keep them in L2.
- Modulation: streamed once. Additive heads have a time part (E, M) and a condition part (R, M),
  summed where they are used. A joint head's does not depend on x either, so PyTorch computes a
  table (E, R, M) of it ahead of the loop, in one large matrix product for as many evaluations as
  fit into TABLE_BYTES.
- Products accumulate in float32 (for float32 weights without TF32); modulating, norms, guidance and
  solver compute in float32.

Stages follow each other as launches ("staged", hundreds for a set: meant for a CUDA graph), or
inside one cooperative launch that meets at a barrier between stages ("persistent"). Both run the
same code.

Without a GPU, results are checked in Triton's interpreter, which runs one program at a time and so
never waits at the barrier, and the kernel is compiled for compute capability 9.0.

Letters as in `canvasmar_rt.config`; W width of the flow head, M = (3 blocks + 2) W modulations,
T = B S tokens of a set, R = G T rows, row g T + token.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from canvasmar_rt.config import ModelConfig
from canvasmar_rt.errors import EngineError
from canvasmar_rt.models.canvasmar import FlowHead, gather_tokens, put_tokens

Mode = Literal["staged", "persistent"]

TABLE_BYTES = 1 << 28
"""Largest modulation table of a joint head; more evaluations take turns."""

WIDEST = 4096
"""Widest flow head: stage 3 keeps a row in registers."""

CHANNEL_TILE = 1 << 14
"""Values of the output layer, channels times width, that stage 3 holds at once."""


def supported(config: ModelConfig, device: torch.device) -> str | None:
    """Why the kernel cannot run this model on this device, or None if it can."""
    if config.flow.width > WIDEST:
        return f"flow.width is {config.flow.width}, the flow kernel takes up to {WIDEST}"
    if interpreted():
        return None
    if device.type != "cuda":
        return f"the flow kernel runs on CUDA; the device is {device}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"the flow kernel needs compute capability 8.0; {device} has less"
    return None


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernel (TRITON_INTERPRET=1 at import), on the CPU."""
    return not isinstance(_stages, triton.JITFunction)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Rows, columns and depth of a tile of the products (powers of two from 16 on), warps of a
    program, and how many tiles of the depth loop are under way at once."""

    rows: int
    columns: int
    depth: int
    warps: int = 4
    stages: int = 4


ROWS_ALONE = Tiles(rows=16, columns=16, depth=16)
"""Of a launch without products: only its warps matter."""


def tiles(rows: int, width: int, dtype: torch.dtype) -> Tiles:
    """Tiles for R rows. In half precision up to 64 rows, the height of Hopper's tensor core
    instructions, and narrower columns where there would be few programs."""
    tall = max(16, triton.next_power_of_2(rows))
    deep = max(16, triton.next_power_of_2(width))
    if dtype == torch.float32:
        return Tiles(rows=min(tall, 32), columns=32, depth=min(deep, 32), stages=3)
    tall = min(tall, 64)
    many = math.ceil(rows / tall) * math.ceil(width / 64) >= 64
    return Tiles(rows=tall, columns=64 if many else 32, depth=min(deep, 64))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowWeights:
    """A flow head's weights as the kernel reads them: matrices in the head's dtype, small vectors
    in float32."""

    embed: Tensor
    """(C, W), transposed."""
    embed_bias: Tensor
    """(W,)"""
    norms: Tensor
    """(2 blocks, W): weight and bias of each norm in turn."""
    mlps: Tensor
    """(2 blocks, W, W), out by in."""
    mlp_biases: Tensor
    """(2 blocks, W)"""
    out: Tensor
    """(C, W)"""
    out_bias: Tensor
    """(C,)"""


def pack(head: FlowHead) -> FlowWeights:
    """Copies of a flow head's weights, laid out for the kernel."""
    linears = [
        layer for mlp in head.mlps for layer in mlp.children() if isinstance(layer, nn.Linear)
    ]
    with torch.no_grad():
        return FlowWeights(
            embed=head.embed.weight.T.contiguous(),
            embed_bias=head.embed.bias.float(),
            norms=torch.stack([p for n in head.norms for p in n.parameters()]).float(),
            mlps=torch.stack([x.weight for x in linears]),
            mlp_biases=torch.stack([x.bias for x in linears]).float(),
            out=head.out.weight.contiguous(),
            out_bias=head.out.bias.float(),
        )


_packed: weakref.WeakKeyDictionary[FlowHead, FlowWeights] = weakref.WeakKeyDictionary()
_packing = threading.Lock()


def packed(head: FlowHead) -> FlowWeights:
    """`pack` of a head whose weights stay as they are, one for all rollouts."""
    with _packing:
        if head not in _packed:
            _packed[head] = pack(head)
            if head.out.weight.is_cuda:  # they are read on other streams, too
                torch.cuda.current_stream(head.out.weight.device).synchronize()
        return _packed[head]


class FlowKernel:
    """A flow head over fixed scratch, for sets of up to `tokens` tokens (B S) in up to `branches`
    guidance branches. What it launches can be captured in a CUDA graph. Not for two threads."""

    def __init__(
        self,
        head: FlowHead,
        *,
        tokens: int,
        branches: int,
        evaluations: int,
        mode: Mode = "staged",
        residual: bool = False,
        programs: int | None = None,
    ) -> None:
        """`evaluations` is E of a set. Tokens of a `residual` model are added to the partial frame.
        `programs` bounds the programs of a launch: None is as many as there are tiles, or, for a
        persistent launch, as many as multiprocessors.

        Raises:
            EngineError: more persistent programs than the device can run at once.
        """
        self._head, self.weights, self.mode, self._residual = head, packed(head), mode, residual
        device, dtype = head.out.weight.device, head.out.weight.dtype
        if mode == "persistent":
            # the interpreter runs programs one after the other: more would wait for ever
            together = 1
            if device.type == "cuda":
                together = torch.cuda.get_device_properties(device).multi_processor_count
            programs = programs or together
            if programs > together:
                raise EngineError(
                    f"{programs} persistent programs on {device}, which has {together}"
                )
        self._programs = programs
        rows, width, channels = tokens * branches, head.config.width, head.out.out_features
        self._modulations = head.config.modulations * width

        def scratch(size: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self._x = scratch(tokens * channels, torch.float32)
        self._velocity = scratch(tokens * channels, torch.float32)
        self._h = scratch(rows * width, torch.float32)
        self._ua = scratch(2 * rows * width)
        self._barrier = scratch(1, torch.int32)
        self._joint = head.config.modulation == "joint"
        if self._joint:
            fit = TABLE_BYTES // (rows * self._modulations * dtype.itemsize)
            self._table_rows = rows * max(1, min(evaluations, fit))
            self._silu = scratch(self._table_rows * width)
            self._table = scratch(self._table_rows * self._modulations)

    def component(self, t: Mapping[str, Tensor], *, using: Tiles | None = None) -> Tensor:
        """The `flow` component from its inputs by name (`canvasmar_rt.components`): the next
        partial frame (B, N, C); `using` as `flow_tokens` takes it."""
        x = gather_tokens(t["flow_noise"], t["select_index"])
        self.flow_tokens(
            x,
            self._head.embed_condition(t["z_tokens"]),
            self._head.embed_time(t["flow_time"]),
            t["step_new"],
            t["step_old"],
            t["branch_weight"],
            out=x,
            using=using,
        )
        return put_tokens(t["partial"], t["select_index"], x, add=self._residual)

    def flow_tokens(
        self,
        x: Tensor,
        condition: Tensor,
        time: Tensor,
        step_new: Tensor,
        step_old: Tensor,
        branch_weight: Tensor,
        *,
        out: Tensor,
        using: Tiles | None = None,
    ) -> None:
        """Draw the tokens of a set: x <- x + step_new v + step_old v_last, E times, v being the
        guided velocity (eq. 9, `canvasmar_rt.schedule.FlowPlan`).

        Args:
            x: noise, (B, S, C) float32.
            condition: `FlowHead.embed_condition` of every branch, (G, B, S, W), or
                (G, B, S, M) for additive modulation, in the head's dtype.
            time: `FlowHead.embed_time`, (E, W) or (E, M), in the head's dtype.
            step_new, step_old: (E,) float32.
            branch_weight: (G,) float32.
            out: receives the tokens, (B, S, C) float32; may be `x`.
            using: tiles of the products; None chooses.
        """
        tokens, rows = x[..., 0].numel(), condition[..., 0].numel()
        self._x[: x.numel()].view(x.shape).copy_(x)
        self._velocity.zero_()
        condition, time = condition.reshape(rows, -1).contiguous(), time.contiguous()
        using = using or tiles(rows, self._head.config.width, time.dtype)
        evaluations = time.shape[0]
        at_once = max(1, self._table_rows // rows) if self._joint else evaluations
        for start in range(0, evaluations, at_once):
            part = slice(start, start + at_once)
            table = self._joint_modulation(time[part], condition) if self._joint else condition
            steps = (step_new[part], step_old[part])
            self._evaluate(table, time[part], steps, branch_weight, tokens, rows, using)
        out.copy_(self._x[: x.numel()].view(x.shape))

    def _joint_modulation(self, time: Tensor, condition: Tensor) -> Tensor:
        """The modulation of every evaluation and row, (E R, M)."""
        count, modulation = time.shape[0] * condition.shape[0], self._head.modulation
        silu = self._silu[: count * condition.shape[1]].view(time.shape[0], *condition.shape)
        torch.add(time[:, None], condition, out=silu)
        F.silu(silu, inplace=True)
        table = self._table[: count * self._modulations].view(count, -1)
        return torch.addmm(modulation.bias, silu.flatten(0, 1), modulation.weight.T, out=table)

    def _evaluate(
        self,
        table: Tensor,
        time: Tensor,
        steps: tuple[Tensor, Tensor],
        branch_weight: Tensor,
        tokens: int,
        rows: int,
        using: Tiles,
    ) -> None:
        config, w, evaluations = self._head.config, self.weights, time.shape[0]
        products = math.ceil(rows / using.rows) * math.ceil(config.width / using.columns)

        whole_row = triton.next_power_of_2(config.width)
        channels = w.out.shape[0]
        group = min(triton.next_power_of_2(channels), CHANNEL_TILE // whole_row)

        def launch(first: int, last: int, programs: int, held: Sequence[str], **how: Any) -> None:
            # rows have no tiles, and are compiled once for all of them
            tile = using if "products" in held else ROWS_ALONE
            _stages[(min(programs, self._programs or programs),)](
                self._x, self._velocity, self._h, self._ua, self._barrier,
                table, time, *steps, branch_weight,
                w.embed, w.embed_bias, w.norms, w.mlps, w.mlp_biases, w.out, w.out_bias,
                first, last, evaluations, tokens,
                WIDTH=config.width,
                CHANNELS=channels,
                BRANCHES=rows // tokens,
                BLOCKS=config.blocks,
                ADDITIVE=not self._joint,
                PRODUCTS="products" in held,
                ROWS="rows" in held,
                ROW=whole_row,
                BM=tile.rows,
                BN=tile.columns,
                BK=tile.depth,
                LOADS=tile.stages,
                GROUP=group,
                num_warps=tile.warps,
                enable_fp_fusion=True,
                **how,
            )  # fmt: skip

        total = 1 + 3 * config.blocks * evaluations
        if self.mode == "persistent":
            self._barrier.zero_()
            most = max(products, rows)
            launch(0, total, most, ("products", "rows"), launch_cooperative_grid=True)
            return
        for stage in range(total):
            place = (stage - 1) % (3 * config.blocks)
            if place % 3 < 2:
                launch(stage, stage + 1, products, ("products",))
            else:
                solving = place == 3 * config.blocks - 1
                launch(stage, stage + 1, tokens if solving else rows, ("rows",))


# -- the kernel: pointers are called what they point to, `e` is the evaluation


@triton.jit
def _modulation(
    table, time, e, row, rows, part, col, inside,
    ADDITIVE: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Part `part` of the modulation in float32, in the shape `row` and `col` broadcast to."""
    size: tl.constexpr = (3 * BLOCKS + 2) * WIDTH
    at = part * WIDTH + col
    if ADDITIVE:
        own = tl.load(table + tl.cast(row, tl.int64) * size + at, mask=inside, other=0.0)
        shared = tl.load(time + e * size + at, mask=col < WIDTH, other=0.0)
        value = own.to(tl.float32) + shared.to(tl.float32)
    else:
        place = tl.cast(e * rows + row, tl.int64) * size
        own = tl.load(table + place + at, mask=inside, other=0.0, eviction_policy="evict_first")
        value = own.to(tl.float32)
    return value


@triton.jit
def _normalised(h, inside, WIDTH: tl.constexpr):
    """Layer norm, without weights, of a row that is 0 where it is not `inside`."""
    centred = tl.where(inside, h - tl.sum(h, axis=0) / WIDTH, 0.0)
    variance = tl.sum(centred * centred, axis=0) / WIDTH
    return centred / tl.sqrt(variance + 1e-6)


@triton.jit
def _block_input(
    normalised, norms, ua, table, time, e, row, rows, block, col, inside,
    ADDITIVE: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Store u of one row."""
    weight = tl.load(norms + 2 * block * WIDTH + col, mask=inside, other=0.0)
    bias = tl.load(norms + (2 * block + 1) * WIDTH + col, mask=inside, other=0.0)
    shift = _modulation(
        table, time, e, row, rows, 3 * block, col, inside, ADDITIVE, WIDTH, BLOCKS
    )  # fmt: skip
    scale = _modulation(
        table, time, e, row, rows, 3 * block + 1, col, inside, ADDITIVE, WIDTH, BLOCKS
    )  # fmt: skip
    u = (normalised * weight + bias) * (1.0 + scale) + shift
    tl.store(ua + row * WIDTH + col, u.to(ua.dtype.element_ty), mask=inside)


@triton.jit
def _product(
    tile, layer, h, ua, mlps, mlp_biases, table, time, e, rows,
    ADDITIVE: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, LOADS: tl.constexpr,
):  # fmt: skip
    """One tile of a block's inner (even `layer`: u -> a) or outer (odd: a -> h) product."""
    across: tl.constexpr = (WIDTH + BN - 1) // BN
    row = (tile // across * BM + tl.arange(0, BM))[:, None]
    col = (tile % across * BN + tl.arange(0, BN))[None, :]
    depth = tl.arange(0, BK)
    left = ua + layer % 2 * rows * WIDTH + row * WIDTH + depth[None, :]
    right = mlps + layer * WIDTH * WIDTH + col * WIDTH + depth[:, None]
    total = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, WIDTH, BK, num_stages=LOADS):
        more = k + depth < WIDTH
        x = tl.load(left + k, mask=(row < rows) & more[None, :], other=0.0)
        weight = tl.load(
            right + k,
            mask=(col < WIDTH) & more[:, None],
            other=0.0,
            eviction_policy="evict_last",
        )
        total = tl.dot(x, weight, total, input_precision="ieee")
    total += tl.load(mlp_biases + layer * WIDTH + col, mask=col < WIDTH, other=0.0)
    inside = (row < rows) & (col < WIDTH)
    at = row * WIDTH + col
    if layer % 2 == 0:
        a = total * tl.sigmoid(total)
        tl.store(ua + rows * WIDTH + at, a.to(ua.dtype.element_ty), mask=inside)
    else:
        part = layer // 2 * 3 + 2
        gate = _modulation(table, time, e, row, rows, part, col, inside, ADDITIVE, WIDTH, BLOCKS)
        before = tl.load(h + at, mask=inside, other=0.0)
        tl.store(h + at, before + gate * total, mask=inside)


@triton.jit
def _solve(
    token, tokens, x, velocity, h, ua, table, time, step_new, step_old, branch_weight,
    embed, embed_bias, norms, out, out_bias, e, evaluations,
    ADDITIVE: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr,
    CHANNELS: tl.constexpr, BRANCHES: tl.constexpr, ROW: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """End evaluation `e` of a token unless it is -1, and begin the next one if there is one."""
    rows = BRANCHES * tokens
    col = tl.arange(0, ROW)
    inside = col < WIDTH
    # the output layer is linear: its input is guided instead of its G outputs
    guided = tl.zeros((ROW,), tl.float32)
    weights = 0.0
    new = 0.0
    old = 0.0
    if e >= 0:
        new = tl.load(step_new + e)
        old = tl.load(step_old + e)
        for g in tl.static_range(BRANCHES):
            row = g * tokens + token
            normalised = _normalised(
                tl.load(h + row * WIDTH + col, mask=inside, other=0.0), inside, WIDTH
            )
            shift = _modulation(
                table, time, e, row, rows, 3 * BLOCKS, col, inside, ADDITIVE, WIDTH, BLOCKS
            )
            scale = _modulation(
                table, time, e, row, rows, 3 * BLOCKS + 1, col, inside, ADDITIVE, WIDTH, BLOCKS
            )
            weight = tl.load(branch_weight + g)
            guided += weight * (normalised * (1.0 + scale) + shift)
            weights += weight
    embedded = tl.load(embed_bias + col, mask=inside, other=0.0)
    for start in tl.static_range(0, CHANNELS, GROUP):
        channel = start + tl.arange(0, GROUP)
        real = channel < CHANNELS
        both = real[:, None] & inside[None, :]
        at = channel[:, None] * WIDTH + col[None, :]
        place = token * CHANNELS + channel
        value = tl.load(x + place, mask=real, other=0.0)
        if e >= 0:
            matrix = tl.load(out + at, mask=both, other=0.0).to(tl.float32)
            v = tl.sum(matrix * guided[None, :], axis=1)
            v += weights * tl.load(out_bias + channel, mask=real, other=0.0)
            value += new * v + old * tl.load(velocity + place, mask=real, other=0.0)
            tl.store(velocity + place, v, mask=real)
            tl.store(x + place, value, mask=real)
        matrix = tl.load(embed + at, mask=both, other=0.0).to(tl.float32)
        embedded += tl.sum(matrix * value[:, None], axis=0)
    if e + 1 < evaluations:
        normalised = _normalised(embedded, inside, WIDTH)
        for g in tl.static_range(BRANCHES):
            row = g * tokens + token
            tl.store(h + row * WIDTH + col, embedded, mask=inside)
            _block_input(
                normalised, norms, ua, table, time, e + 1, row, rows, 0, col, inside,
                ADDITIVE, WIDTH, BLOCKS,
            )  # fmt: skip


@triton.jit
def _meet(barrier, arrivals):
    """Wait until every program has arrived; `arrivals` counts those of all meetings so far."""
    tl.debug_barrier()  # every thread's stores come before its program's arrival
    tl.atomic_add(barrier, 1, sem="release", scope="gpu")
    while tl.atomic_add(barrier, 0, sem="acquire", scope="gpu") < arrivals:
        pass
    tl.debug_barrier()


@triton.jit(do_not_specialize=["first", "last", "evaluations", "tokens"])
def _stages(
    x, velocity, h, ua, barrier, table, time, step_new, step_old, branch_weight,
    embed, embed_bias, norms, mlps, mlp_biases, out, out_bias,
    first, last, evaluations, tokens,
    ADDITIVE: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr,
    CHANNELS: tl.constexpr, BRANCHES: tl.constexpr, ROW: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, LOADS: tl.constexpr,
    PRODUCTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Stages `first` to `last` - 1: stage 0 begins evaluation 0, then every evaluation has inner
    product, outer product and rows of each block. Stages a launch cannot hold are left out."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    rows = BRANCHES * tokens
    for stage in range(first, last):
        place = stage + 3 * BLOCKS - 1  # as if stage 0 ended evaluation -1
        e = place // (3 * BLOCKS) - 1
        block = place % (3 * BLOCKS) // 3
        part = place % 3
        if PRODUCTS:  # noqa: SIM102 - decided when compiling, the next one when running
            if part < 2:
                count = (rows + BM - 1) // BM * ((WIDTH + BN - 1) // BN)
                for tile in range(program, count, programs):
                    _product(
                        tile, 2 * block + part, h, ua, mlps, mlp_biases, table, time, e, rows,
                        ADDITIVE, WIDTH, BLOCKS, BM, BN, BK, LOADS,
                    )  # fmt: skip
        if ROWS:  # noqa: SIM102
            if part == 2:
                if block < BLOCKS - 1:
                    col = tl.arange(0, ROW)
                    inside = col < WIDTH
                    for row in range(program, rows, programs):
                        held = tl.load(h + row * WIDTH + col, mask=inside, other=0.0)
                        _block_input(
                            _normalised(held, inside, WIDTH), norms, ua, table, time, e, row, rows,
                            block + 1, col, inside, ADDITIVE, WIDTH, BLOCKS,
                        )  # fmt: skip
                else:
                    for token in range(program, tokens, programs):
                        _solve(
                            token, tokens, x, velocity, h, ua, table, time, step_new, step_old,
                            branch_weight, embed, embed_bias, norms, out, out_bias, e, evaluations,
                            ADDITIVE, WIDTH, BLOCKS, CHANNELS, BRANCHES, ROW, GROUP,
                        )  # fmt: skip
        if stage + 1 < last:
            _meet(barrier, (stage - first + 1) * programs)
