"""The frame loop over separate component graphs, on any engine that can bind them.

The host only decides the token order: a frame is one stretch of work up to the staticness, and one
from the order to the pixels. Everything else stays in the engine's memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from canvasmar_rt.components import components
from canvasmar_rt.config import SamplingConfig
from canvasmar_rt.engines.base import Engine
from canvasmar_rt.engines.memory import Array, Buffer, Group, Memory, Run
from canvasmar_rt.engines.program import (
    Clock,
    Drawn,
    Float32,
    Int64,
    Level,
    Noise,
    Shapes,
    UInt8,
    noise_shapes,
    require_finite,
    row_index,
    state_shapes,
    tell,
    told_shapes,
)
from canvasmar_rt.schedule import (
    ArStep,
    ar_steps,
    branch_inputs,
    first_step_branches,
    generation_order,
    order_noise,
    solver_inputs,
)


class _Stage:
    """Runs in a row: timed one by one on the CPU, one sequence on a GPU."""

    def __init__(self, memory: Memory, parts: list[tuple[str, Run]]) -> None:
        if memory.device == "cpu":
            self._parts = [part for part in parts if part[0] != "transfer"]
        else:
            self._parts = [("enqueue", memory.sequence([run for _, run in parts]))]

    def __call__(self, clock: Clock) -> None:
        for label, run in self._parts:
            run()
            clock.lap(label)


@dataclasses.dataclass(frozen=True)
class _Branches:
    """The guided AR steps with or without a canvas, and every buffer they have to themselves."""

    buffers: Mapping[str, Buffer]
    condition: Run | None
    steps: list[tuple[str, Run]]


@dataclasses.dataclass(frozen=True)
class _Level:
    """One way to draw a frame: its sets, its flow plan, the indices that choose its tokens and, as
    they are needed, its AR steps with and without a canvas."""

    sampling: SamplingConfig
    steps: tuple[ArStep, ...]
    fixed: Mapping[str, Buffer]
    indices: Group
    branches: dict[bool, _Branches] = dataclasses.field(default_factory=dict)


class ComponentProgram:
    """See `canvasmar_rt.engines.program.Program`."""

    def __init__(self, engine: Engine, *, batch: int, sampling: SamplingConfig) -> None:
        self._engine, self._batch = engine, batch
        self._config = engine.bundle.manifest.model
        self._dtype = engine.bundle.manifest.dtype
        self._table = components(self._config)
        self._memory = engine.memory()
        self.since = np.zeros(batch, np.int64)
        self._allocate(sampling)
        self._bind()

    # -- buffers and bindings

    def _group(self, layout: Shapes, *, mirrored: bool = True) -> Group:
        named = {n: (s, self._dtype if d == "hidden" else d) for n, (s, d) in layout.items()}
        return self._memory.group(named, mirrored=mirrored)

    def _allocate(self, sampling: SamplingConfig) -> None:
        c, ae, b = self._config, self._config.autoencoder, self._batch
        n, t, each = c.tokens, ae.temporal_compression, (b, *c.group_shape)
        latent, pixels = (b, n, ae.latent_channels), (b, t, ae.height, ae.width, 3)
        drawn = (*each, *latent[1:])
        self._levels = [self._level(sampling)]
        # of a group, all frames but the last are fed to the Temporal ViT in the same step
        told = told_shapes(c, b)
        self._told = self._group({f"{n}/{j}": s for j in range(c.group) for n, s in told.items()})
        self._told_by_frame = [
            {n: self._told.buffers[f"{n}/{j}"] for n in told} for j in range(c.group)
        ]
        self._told_hosts = [
            {n: _host(self._told, f"{n}/{j}") for n in told} for j in range(c.group)
        ]
        self._noise = self._group(noise_shapes(c, b))
        self.noise = Noise(
            **{k: _host(self._noise, f"{k}_noise") for k in ("flow", "frame", "canvas")},
            order=np.zeros((*each, sampling.ar_steps, n), np.float32),
        )
        self._given = self._group({"frames": (pixels, "uint8")})
        self._guess = self._group(
            {"staticness": ((*each, n), "float32"), "canvas": (drawn, "float32")}
        )
        frames: Shapes = {f"frames/{j}": (pixels, "uint8") for j in range(c.group)}
        self._out = self._group({"drawn": (drawn, "float32"), **frames})
        self._canvas_out = self._group(frames)
        self._whole: UInt8 = np.zeros((b, c.group * t, *pixels[2:]), np.uint8)
        self._order = np.zeros((*each, n), np.int64)
        states = state_shapes(c, b)
        del states["latent"]
        self._lasting = self._group(states, mirrored=False).buffers
        histories = {k: s for k, s in states.items() if k.startswith("decoder_before")}
        self._spare = [
            list(self._group(histories, mirrored=False).buffers.values())
            for _ in range(min(c.group, 2))
        ]
        work: Shapes = {
            "z_temporal": ((b, c.temporal_tokens, c.dim), "hidden"),
            "z_canvas": ((*each, n, c.dim), "hidden"),
        }
        # the first stays empty, or is the latest latent frame that a residual model adds to; the
        # last step writes the latent frame itself
        work |= {f"partial_{i}": (drawn, "float32") for i in range(min(sampling.ar_steps, 3))}
        if c.group > 1:
            work |= {
                f"{of}_{j}": (latent, "float32")
                for of in ("latent", "canvas")
                for j in range(c.group)
            }
        self._work = self._group(work, mirrored=False).buffers
        # what has been drawn, frame by frame: the last is the latest latent
        self._latents = [self._out.buffers["drawn"]]
        if c.group > 1:
            self._latents = [self._work[f"latent_{j}"] for j in range(c.group)]
        self._buffers: dict[str, Buffer] = {
            **self._levels[0].fixed,
            **self._told_by_frame[0],
            **self._noise.buffers,
            **self._guess.buffers,
            **{n: x for n, x in self._lasting.items() if n.startswith("cache_")},
            "latent": self._latents[-1],
            "z_temporal": self._work["z_temporal"],
            "z_canvas": self._work["z_canvas"],
        }

    def _level(self, sampling: SamplingConfig) -> _Level:
        steps = ar_steps(self._config.tokens, sampling.ar_steps)
        each = (self._batch, *self._config.group_shape)
        layout: Shapes = {
            f"{kind}_{k}": ((*each, part.stop - part.start), "int64")
            for k, step in enumerate(steps)
            for kind, part in step.parts.items()
        }
        fixed = self._constants(solver_inputs(sampling))
        return _Level(sampling, steps, fixed, self._group(layout))

    @property
    def levels(self) -> int:
        return len(self._levels)

    def add_level(self, sampling: SamplingConfig) -> None:
        level = self._level(sampling)
        self._branches_of(level, self._config.canvas)  # which an engine may refuse
        self._levels.append(level)

    def _constants(self, values: Mapping[str, Array]) -> Mapping[str, Buffer]:
        group = self._group({k: (v.shape, "float32") for k, v in values.items()})
        for name, value in values.items():
            _host(group, name)[...] = value
        group.upload()
        return group.buffers

    def _bound(self, component: str, buffers: Mapping[str, Buffer]) -> Run:
        """Bind a component to the program's buffers, `buffers` taking precedence by name."""
        table, have = self._table[component], {**self._buffers, **buffers}
        return self._engine.bind(
            component,
            {s.name: have[s.name] for s in table.inputs},
            {s.name: have[s.name] for s in table.outputs},
            self._memory,
        )

    def _bind(self) -> None:
        # one binding per ring slot: the new keys and values are written in place. The slot being
        # written is masked in that run, so reading it there has no effect.
        slots = range(self._config.context_frames)
        self._temporal = [self._bound_temporal(slot, {}) for slot in slots]
        self._inner = [
            [
                self._bound_temporal(slot, {**told, "latent": latent})
                for latent, told in zip(self._latents, self._told_by_frame[1:], strict=False)
            ]
            for slot in slots
        ]
        self._split: Run | None = None
        if self._config.group > 1:
            self._split = self._bound_split(self._out.buffers["drawn"], self._latents)
        self._sides = {"encoder": 0, "decoder": 0}  # which set of histories is read next
        self._encode = [
            self._autoencoder("encoder", side, self._given.buffers["frames"]) for side in (0, 1)
        ]
        self._decode = [
            [
                self._autoencoder("decoder", side, self._out.buffers[f"frames/{j}"], latent=latent)
                for side in (0, 1)
            ]
            for j, latent in enumerate(self._latents)
        ]
        self._decode_canvas: list[Run] | None = None
        self._canvas = self._bound("canvas", {}) if self._config.canvas else None
        self._fronts: dict[tuple[int, bool], _Stage] = {}
        self._backs: dict[tuple[Level, int, bool], _Stage] = {}
        self._feeds: dict[int, _Stage] = {}
        self._branches_of(self._levels[0], self._config.canvas)

    def _bound_temporal(self, slot: int, buffers: Mapping[str, Buffer]) -> Run:
        new = {
            n.replace("cache_", "new_"): ring.row(slot)
            for n, ring in self._lasting.items()
            if n.startswith("cache_")
        }
        return self._bound("temporal", {**new, **buffers})

    def _bound_split(self, group: Buffer, frames: Sequence[Buffer]) -> Run:
        parts = {f"latent_{j}": frame for j, frame in enumerate(frames)}
        return self._bound("split", {"drawn": group, **parts})

    def _histories(self, part: str, side: int) -> list[Buffer]:
        """Two sets of causal-convolution histories: one is read while the other is written."""
        prefix = f"{part}_" if side == 0 else f"{part}_before_"
        count = sum(n.startswith(f"{part}_before_") for n in self._lasting)
        return [self._lasting[f"{prefix}{i}"] for i in range(count)]

    def _autoencoder(
        self,
        part: str,
        side: int,
        frames: Buffer,
        target: list[Buffer] | None = None,
        source: list[Buffer] | None = None,
        **more: Buffer,
    ) -> Run:
        before = self._histories(part, side) if source is None else source
        after = self._histories(part, 1 - side) if target is None else target
        states = {f"state_{i}": x for i, x in enumerate(before)}
        states |= {f"next_state_{i}": x for i, x in enumerate(after)}
        return self._bound(part, {**states, "frames": frames, **more})

    def _branches_of(self, level: _Level, has_canvas: bool) -> _Branches:
        if has_canvas not in level.branches:
            level.branches[has_canvas] = self._bind_branches(level, has_canvas)
        return level.branches[has_canvas]

    def _bind_branches(self, level: _Level, has_canvas: bool) -> _Branches:
        c, b = self._config, self._batch
        inputs = branch_inputs(level.sampling, has_canvas=has_canvas)
        first = first_step_branches(inputs, self._table)
        fixed = self._constants(inputs)
        g = fixed["branch_weight"].shape[0]
        layout: Shapes = {
            f"z_tokens_{k}": ((g, b, *c.group_shape, step.drawn, c.dim), "hidden")
            for k, step in enumerate(level.steps)
        }
        isolated = c.condition_attention == "isolated"
        if isolated:
            shape = (g, b, c.temporal_tokens, c.dim)
            layout |= {s.name: (shape, "hidden") for s in self._table["condition"].outputs}
        own = {**level.fixed, **fixed, **self._group(layout, mirrored=False).buffers}
        condition = self._bound("condition", own) if isolated else None
        steps: list[tuple[str, Run]] = []
        for k, step in enumerate(level.steps):
            last = k + 1 == len(level.steps)
            have = {
                **own,
                **{f"{kind}_index": level.indices.buffers[f"{kind}_{k}"] for kind in step.parts},
                "z_tokens": own[f"z_tokens_{k}"],
                "partial": self._work["partial_0" if k == 0 else f"partial_{1 + (k - 1) % 2}"],
                "next_partial": self._out.buffers["drawn"]
                if last
                else self._work[f"partial_{1 + k % 2}"],
                "flow_noise": self._noise.buffers["flow_noise"],
            }
            steps += [("spatial", run) for run in self._bound_spatial(step, have, first)]
            if c.group > 1:  # to the flow head the frames of a group are rows
                for name in ("select_index", "partial", "next_partial", "flow_noise"):
                    have[name] = have[name].view(b * c.group, *have[name].shape[2:])
                z = have["z_tokens"]
                have["z_tokens"] = z.view(g, b * c.group, *z.shape[3:])
            steps.append(("flow", self._bound("flow", have)))
        return _Branches(own, condition, steps)

    def _bound_spatial(self, step: ArStep, have: Mapping[str, Buffer], first: int) -> list[Run]:
        """The embeddings of a set; in the first step of the `first` branches, with those of the one
        after them, if any, looked up."""
        if step.known:
            return [self._bound("spatial", have)]
        z, runs = have["z_tokens"], []
        if first < z.shape[0]:
            found = self._group({"z_tokens": ((1, *z.shape[1:]), "hidden")}, mirrored=False).buffers
            runs.append(self._bound("unconditional", {**have, **found}))
            runs.append(self._memory.spread(found["z_tokens"].row(0), z.row(first)))
        if first:
            graph = self._table["spatial_first"]
            per_branch = [s.name for s in (*graph.inputs, *graph.outputs) if "G" in s.dims]
            seen = {name: have[name].head(first) for name in per_branch}
            runs.append(self._bound("spatial_first", {**have, **seen}))
        return runs

    # -- stages of a frame

    def _front(self, slot: int, has_canvas: bool) -> _Stage:
        """From the noise to the staticness."""
        key = slot, has_canvas
        if key not in self._fronts:
            parts = [
                ("transfer", self._told.upload),
                ("transfer", self._noise.upload),
                ("temporal", self._temporal[slot]),
            ]
            if has_canvas:
                assert self._canvas is not None
                parts += [("canvas", self._canvas), ("transfer", self._guess.download)]
            self._fronts[key] = _Stage(self._memory, parts)
        return self._fronts[key]

    def _back(self, which: Level, side: int, has_canvas: bool) -> _Stage:
        """From the order, or from the latent frame where the canvas stands alone, to the pixels."""
        key = which, side, has_canvas
        if key not in self._backs:
            parts: list[tuple[str, Run]] = []
            if which is not None:
                level = self._levels[which]
                branches = self._branches_of(level, has_canvas)
                parts.append(("transfer", level.indices.upload))
                if branches.condition is not None:
                    parts.append(("condition", branches.condition))
                if self._config.residual:
                    partial, latent = self._work["partial_0"], self._buffers["latent"]
                    parts.append(("spatial", self._memory.spread(latent, partial)))
                parts += branches.steps
            if self._split is not None:
                parts.append(("split", self._split))
            parts += [("decoder", run[side ^ j % 2]) for j, run in enumerate(self._decode)]
            parts.append(("transfer", self._out.download))
            self._backs[key] = _Stage(self._memory, parts)
        return self._backs[key]

    def _feed(self, slot: int) -> _Stage:
        """All frames of a group but the last, to the Temporal ViT, the first of them at `slot`."""
        if slot not in self._feeds:
            frames = self._config.context_frames
            inner = [
                ("temporal", self._inner[(slot + j) % frames][j])
                for j in range(self._config.group - 1)
            ]
            self._feeds[slot] = _Stage(self._memory, inner)
        return self._feeds[slot]

    def _fill_indices(self, level: _Level, order: Int64) -> None:
        for k, step in enumerate(level.steps):
            for kind, part in step.parts.items():
                _host(level.indices, f"{kind}_{k}")[:] = order[..., part]

    def _choose_tokens(
        self, level: _Level, order: Int64 | None, staticness: Float32 | None
    ) -> Int64:
        """The order in which this frame's tokens are drawn."""
        if order is None:
            gumbel = order_noise(self.noise.order, len(level.steps))
            generation_order(staticness, gumbel, level.sampling, self._order)
        else:
            self._order[:] = order
        self._fill_indices(level, self._order)
        return self._order

    # -- the program

    def _tell(self, time: int, action: Float32 | None) -> int:
        """Tell every frame of the step its time; the ring slot of the first."""
        first, *others = self._told_hosts
        for j, host in enumerate(others, 1):
            tell(host, self._config, time + j, self.since, None)
        return tell(first, self._config, time, self.since, action)

    def advance(self, time: int, action: Float32 | None) -> None:
        slot = self._tell(time, action)
        self._told.upload()
        self._temporal[slot]()
        self._memory.synchronize()

    def encode(self, frames: UInt8) -> None:
        _host(self._given, "frames")[:] = frames
        self._given.upload()
        self._encode[self._sides["encoder"]]()
        self._sides["encoder"] ^= 1
        self._memory.synchronize()

    def decode(self, *, again: bool = False) -> None:
        if again:
            self._sides["decoder"] ^= 1
        self._decode[-1][self._sides["decoder"]]()
        self._sides["decoder"] ^= 1
        self._memory.synchronize()

    def predict(
        self,
        time: int,
        action: Float32 | None,
        *,
        order: Int64 | None,
        level: Callable[[], Level],
        on_canvas: Callable[[UInt8], None] | None,
        meanwhile: Callable[[], None],
        clock: Clock,
    ) -> Drawn:
        has_canvas = self._config.canvas and bool(time > self.since.max())
        slot = self._tell(time, action)
        self._front(slot, has_canvas)(clock)
        staticness = canvas = None
        if has_canvas:
            self._wait(clock)
            staticness, canvas = _host(self._guess, "staticness"), _host(self._guess, "canvas")
            require_finite(self._engine.name, "canvas", staticness)
        side = self._sides["decoder"]
        if has_canvas and on_canvas is not None:
            self._canvas_decoders()[side]()
            self._canvas_out.download()
            self._memory.synchronize()
            clock.lap("canvas_decoder")
            on_canvas(self._pixels(self._canvas_out))
            clock.lap("on_canvas")
        which = level()
        if which is None:
            assert canvas is not None
            self._memory.write(self._out.buffers["drawn"], canvas)
            drawn_order = self._order[..., :0]
        else:
            drawn_order = self._choose_tokens(self._levels[which], order, staticness)
        clock.lap("order")
        self._back(which, side, has_canvas)(clock)
        self._sides["decoder"] ^= self._config.group % 2
        if self._config.group > 1:
            self._feed((slot + 1) % self._config.context_frames)(clock)
        if self._memory.device != "cpu":
            meanwhile()
            clock.lap("meanwhile")
        self._wait(clock)
        require_finite(self._engine.name, "flow", _host(self._out, "drawn"))
        return Drawn(
            frames=self._pixels(self._out),
            latent=_host(self._out, "drawn"),
            canvas=canvas,
            staticness=staticness,
            order=drawn_order,
        )

    def _pixels(self, group: Group) -> UInt8:
        """(B, J*t, H, W, 3) of all frames of a step."""
        frames = [_host(group, f"frames/{j}") for j in range(self._config.group)]
        return frames[0] if len(frames) == 1 else np.concatenate(frames, axis=1, out=self._whole)

    def _wait(self, clock: Clock) -> None:
        self._memory.synchronize()
        if self._memory.device != "cpu":
            clock.lap("device")

    def _canvas_decoders(self) -> list[Run]:
        """By the side of the histories: the canvas to pixels, the histories left as they are."""
        if self._decode_canvas is None:
            parts = [self._buffers["canvas"]]
            before: list[Run] = []
            if self._config.group > 1:
                parts = [self._work[f"canvas_{j}"] for j in range(self._config.group)]
                before = [self._bound_split(self._buffers["canvas"], parts)]
            self._decode_canvas = [
                self._memory.sequence(
                    before
                    + [
                        self._autoencoder(
                            "decoder",
                            side,
                            self._canvas_out.buffers[f"frames/{j}"],
                            self._spare[j % 2],
                            self._spare[(j - 1) % 2] if j else None,
                            latent=part,
                        )
                        for j, part in enumerate(parts)
                    ]
                )
                for side in (0, 1)
            ]
        return self._decode_canvas

    def latent(self) -> Float32:
        return self._memory.read(self._buffers["latent"])

    def set_latent(self, values: Float32) -> None:
        self._memory.write(self._buffers["latent"], values)

    def _state(self) -> dict[str, Buffer]:
        """Buffers under the names a snapshot has: the histories read next are `encoder_0` ..."""
        out = {"latent": self._buffers["latent"]}
        out |= {n: x for n, x in self._lasting.items() if n.startswith("cache_")}
        for part, side in self._sides.items():
            for name, which in ((part, side), (f"{part}_before", 1 - side)):
                out |= {f"{name}_{i}": x for i, x in enumerate(self._histories(part, which))}
        return out

    def snapshot(self) -> dict[str, Array]:
        return {name: self._memory.read(buffer) for name, buffer in self._state().items()}

    def load(self, arrays: Mapping[str, Array], row: int | None = None) -> None:
        for name, buffer in self._state().items():
            if row is None:
                self._memory.write(buffer, arrays[name])
                continue
            new = arrays[name][row_index(name, 0)]
            self._memory.write(buffer, new, row_index(name, row))

    def warmup(self) -> None:
        kept = self.snapshot()
        clock = Clock()
        for slot in range(self._config.context_frames):
            self._front(slot, self._config.canvas)(clock)
            if self._config.group > 1:
                self._feed(slot)(clock)
        for has_canvas in {self._config.canvas, False}:
            self._front(0, has_canvas)(clock)
            self._order[:] = np.arange(self._config.tokens)
            for which, level in enumerate(self._levels):
                self._fill_indices(level, self._order)
                for side in (0, 1):
                    self._back(which, side, has_canvas)(clock)
        if self._config.canvas:
            for side in (0, 1):
                self._back(None, side, True)(clock)
                self._canvas_decoders()[side]()
        self._memory.synchronize()
        self.load(kept)


def _host(group: Group, name: str) -> Array:
    array = group.buffers[name].host
    assert array is not None
    return array
