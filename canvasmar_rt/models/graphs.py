"""The components as modules with flat inputs and outputs in the order of `components`.

Export traces these, and the torch engine runs them: one definition of what a component computes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from canvasmar_rt.components import Component, components
from canvasmar_rt.errors import ConfigError
from canvasmar_rt.models.canvasmar import (
    CanvasMAR,
    FlowHead,
    FrameModel,
    gather_tokens,
    in_branches,
    put_tokens,
)
from canvasmar_rt.models.unified import UnifiedMAR


class Graph(nn.Module):
    """One component: `forward` takes its inputs positionally and returns a tuple of outputs."""

    def __init__(self, model: FrameModel, name: str) -> None:
        super().__init__()
        self.config = model.config
        self.component: Component = components(model.config)[name]

    def named(self, args: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return dict(zip((s.name for s in self.component.inputs), args, strict=True))


class EncoderGraph(Graph):
    def __init__(self, model: FrameModel) -> None:
        super().__init__(model, "encoder")
        self.autoencoder = model.autoencoder

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        frames, *states = args
        latent, new = self.autoencoder.encode(frames, states)
        return latent[:, 0], *new


class DecoderGraph(Graph):
    def __init__(self, model: FrameModel) -> None:
        super().__init__(model, "decoder")
        self.autoencoder = model.autoencoder

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        latent, *states = args
        frames, new = self.autoencoder.decode(latent[:, None], states)
        return frames, *new


class TemporalGraph(Graph):
    def __init__(self, model: FrameModel) -> None:
        super().__init__(model, "temporal")
        self.temporal = model.temporal

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        t = self.named(args)
        caches = [t[s.name] for s in self.component.inputs if s.name.startswith("cache_")][1:]
        z_temporal, new = self.temporal.step(
            t["latent"],
            t["is_first"],
            t.get("action"),
            t.get("action_given"),
            t["time"],
            t["cache_bias"],
            caches,
        )
        return (z_temporal, *new) if self.temporal.reads_out else (*new,)


class CanvasGraph(Graph):
    def __init__(self, model: CanvasMAR) -> None:
        super().__init__(model, "canvas")
        self.canvas = model.canvas

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        t = self.named(args)
        r, r2 = t["frame_noise_level"], t["canvas_noise_level"]
        noised = t["latent"] * (1 - r) + t["frame_noise"] * r  # eq. 11
        assert self.canvas is not None
        z_canvas, canvas, staticness = self.canvas(t["z_temporal"], noised, t["latent"])
        z_canvas = (z_canvas * (1 - r2) + t["canvas_noise"] * r2).to(z_canvas.dtype)  # eq. 12
        return z_canvas, canvas, staticness


class Constants(nn.Module):
    """Tensors that weights alone decide, made once with their graph."""

    def __init__(self, make: Callable[[], Iterable[Tensor]]) -> None:
        super().__init__()
        with torch.inference_mode(False), torch.no_grad():
            for i, value in enumerate(make()):
                self.register_buffer(f"constant_{i}", value, persistent=False)

    def __iter__(self) -> Iterator[Tensor]:
        return self.buffers()


class ConditionGraph(Graph):
    """Keys and values of z_t, once for all guidance branches; what those that do not see it read
    instead are constants."""

    def __init__(self, model: CanvasMAR) -> None:
        super().__init__(model, "condition")
        self.spatial, tokens = model.spatial, model.config.temporal_tokens

        def unseen() -> Iterable[Tensor]:
            condition = self.spatial.no_temporal.expand(1, tokens, -1)
            return itertools.chain(*self.spatial.condition_keys_values(condition))

        self.unseen = Constants(unseen)

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        t = self.named(args)
        cached = itertools.chain(*self.spatial.condition_keys_values(t["z_temporal"]))
        pairs = zip(cached, self.unseen, strict=True)
        return tuple(in_branches(t["temporal_on"], seen, unseen) for seen, unseen in pairs)


class UnconditionalGraph(Graph):
    """Token embeddings of the first set in the guidance branch that sees neither z_t nor the
    canvas. There nothing depends on the frame but which tokens are picked: a table of all."""

    def __init__(self, model: CanvasMAR) -> None:
        super().__init__(model, "unconditional")
        config, spatial = model.config, model.spatial
        frames, tokens = config.group, config.tokens

        def table() -> Iterable[Tensor]:
            condition = spatial.no_temporal.expand(1, config.temporal_tokens, -1)
            mask = spatial.mask.expand(frames, tokens, -1)
            index = torch.arange(tokens, device=model.device).expand(frames, -1)
            z = spatial(spatial.read_condition(condition), mask, index, tokens)
            first = tokens * torch.arange(frames, device=model.device)
            return z.flatten(0, 1), first[:, None]

        self.table = Constants(table)

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        (index,), (table, first) = args, self.table
        if self.config.group > 1:
            index = index + first
        return (F.embedding(index, table)[None],)


class SpatialGraph(Graph):
    """Token embeddings of the next set for every guidance branch; the first AR step, which knows
    no token yet, is a graph of its own (TensorRT takes no empty tensors)."""

    def __init__(self, model: CanvasMAR, name: str) -> None:
        super().__init__(model, name)
        self.spatial = model.spatial
        self._condition, self._mask = model.condition_tokens, model.mask_tokens

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        per_frame = ("z_canvas", "mask_index", "partial", "known_index")
        t = self.named(args)
        if self.config.group > 1:  # frames become rows of the batch
            t |= {name: t[name].flatten(0, 1) for name in per_frame if name in t}
        condition: Tensor | list[tuple[Tensor, Tensor]]
        if self.spatial.isolated:
            flat = [x.flatten(0, 1) for name, x in t.items() if name.startswith("condition_")]
            condition = list(zip(flat[::2], flat[1::2], strict=True))
            branches = t["condition_key_0"].shape[0]
        else:
            tokens = self._condition(t["z_temporal"], t["temporal_on"])
            branches = tokens.shape[0]
            condition = tokens.flatten(0, 1)

        def rows(x: Tensor) -> Tensor:
            return x[None].expand(branches, *x.shape).flatten(0, 1)

        if self.config.canvas:
            canvas = self._mask(t["z_canvas"], t["canvas_on"]).flatten(0, 1)
        else:
            mask = self.spatial.mask
            batch = t["mask_index"].shape[0]
            canvas = mask.expand(branches * batch, self.config.tokens, mask.shape[0])
        known = {}
        if "known_index" in t:
            known = {
                "known_tokens": rows(gather_tokens(t["partial"], t["known_index"])),
                "known_index": rows(t["known_index"]),
            }
        select = t["select_index"].shape[-1]
        z = self.spatial(condition, canvas, rows(t["mask_index"]), select, **known)
        return (z.unflatten(0, (branches, *t["select_index"].shape[:-1])),)


class DrawGraph(Graph):
    """`SpatialGraph` of a unified model."""

    def __init__(self, model: UnifiedMAR, name: str) -> None:
        super().__init__(model, name)
        self.temporal = model.temporal

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        t = self.named(args)
        tokens, index = None, t.get("known_index")
        if index is not None:
            tokens = gather_tokens(t["partial"], index)
        x = self.temporal.draw_tokens(t["select_index"].shape[0], tokens, index)
        caches = [x for name, x in t.items() if name.startswith("cache_")]
        z = self.temporal.draw(
            x, t["select_index"], t["temporal_on"], t["draw_time"], t["history_bias"], caches
        )
        return (z,)


class FlowPrepare(nn.Module):
    """Everything of the flow component that does not change from evaluation to evaluation; with
    `cut`, for an exported graph, the condition in its parts."""

    def __init__(self, model: FrameModel, *, cut: bool = False) -> None:
        super().__init__()
        self.flow, self.cut = model.flow, cut

    def forward(
        self, z_tokens: Tensor, select_index: Tensor, flow_noise: Tensor, flow_time: Tensor
    ) -> tuple[Tensor, ...]:
        """-> x_0 (B, S, C), time (E, .), and what is `given` of the condition, (G, B, S, .)"""
        condition = self.flow.embed_condition(z_tokens)
        return (
            gather_tokens(flow_noise, select_index),
            self.flow.embed_time(flow_time),
            *(self.flow.given(condition) if self.cut else (condition,)),
        )


class CutModulation(nn.Module):
    """A flow head's modulations as one product each, for an exported graph on the CPU, which copies
    what it cuts. What is to be 1 + scale is that here. The last shift has gone through the
    output layer, which leaves C of its channels."""

    def __init__(self, head: FlowHead) -> None:
        super().__init__()
        out = head.out.weight
        weights = list(head.modulation.weight.chunk(head.config.modulations))
        biases = list(head.parts(head.modulation.bias))
        weights[-2], biases[-2] = (
            (out.double() @ x[-2].double()).to(out.dtype) for x in (weights, biases)
        )
        self.weights, self.biases = Constants(lambda: weights), Constants(lambda: biases)

    def forward(self, m: Tensor) -> tuple[Tensor, ...]:
        """SiLU of time and condition (..., W) -> its parts (..., W), the last but one (..., C)."""
        return tuple(map(F.linear, itertools.repeat(m), self.weights, self.biases))


class FlowEvaluation(nn.Module):
    """One evaluation of the guided velocity and the solver's update (eq. 9, `FlowPlan`); with `cut`
    and a joint modulation, that in parts."""

    def __init__(self, model: FrameModel, *, cut: bool = False) -> None:
        super().__init__()
        self.flow = model.flow
        self.cut = CutModulation(model.flow) if cut and not model.flow.additive else None

    def forward(
        self,
        x: Tensor,
        velocity: Tensor,
        time: Tensor,
        step_new: Tensor,
        step_old: Tensor,
        branch_weight: Tensor,
        *given: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """x and the last velocity (B, S, C) -> the next ones."""
        if self.cut is None:
            branches = self.flow.evaluate(x, time, given)
        else:
            (condition,) = given
            branches = self.flow.modulated(x, self.cut(F.silu(time + condition)), shifted=True)
        guided = (branches * branch_weight[:, None, None, None]).sum(0)
        return x + step_new * guided + step_old * velocity, guided


class FlowGraph(Graph):
    """Draws the tokens of one set and puts them into the partial frame."""

    def __init__(self, model: FrameModel) -> None:
        super().__init__(model, "flow")
        self.prepare, self.evaluate = FlowPrepare(model), FlowEvaluation(model)

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        t = self.named(args)
        x, times, *given = self.prepare(
            t["z_tokens"], t["select_index"], t["flow_noise"], t["flow_time"]
        )
        velocity = torch.zeros_like(x)
        # compiled programs copy what does not begin at a multiple of 16 bytes
        new_old = (F.pad(t[name][:, None], (0, 3))[:, 0] for name in ("step_new", "step_old"))
        for time, new, old in zip(times, *new_old, strict=True):
            x, velocity = self.evaluate(x, velocity, time, new, old, t["branch_weight"], *given)
        return (put_tokens(t["partial"], t["select_index"], x, add=self.config.residual),)


class SplitGraph(Graph):
    """The latent frames of a group, one by one."""

    def __init__(self, model: FrameModel) -> None:
        super().__init__(model, "split")

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.clone() for x in args[0].unbind(1))


def graph(model: FrameModel, name: str) -> Graph:
    """The module of one component.

    Raises:
        ConfigError: if the model has no such component, or it is composed from others (`frame`).
    """
    if name not in components(model.config) or name == "frame":
        raise ConfigError(f"{model.config.name}: no component module {name!r}")
    if name in ("spatial", "spatial_first"):
        if isinstance(model, UnifiedMAR):
            return DrawGraph(model, name).eval()
        assert isinstance(model, CanvasMAR)
        return SpatialGraph(model, name).eval()
    kinds: dict[str, Callable[[Any], Graph]] = {
        "encoder": EncoderGraph,
        "decoder": DecoderGraph,
        "temporal": TemporalGraph,
        "canvas": CanvasGraph,
        "condition": ConditionGraph,
        "unconditional": UnconditionalGraph,
        "flow": FlowGraph,
        "split": SplitGraph,
    }
    made: Graph = kinds[name](model).eval()
    return made
