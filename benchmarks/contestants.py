"""What a benchmark times: systems that continue the same clip, each in its own way.

A contestant plays a clip of latent frames from the same context again and again. A system that
predicts frame by frame has its first pixels after one frame, one that denoises a chunk after the
whole chunk: `Played` holds when the pixels of every latent frame were on the host.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Protocol

from canvasmar_rt.config import to_dict
from canvasmar_rt.engines.program import UInt8
from canvasmar_rt.errors import ConfigError
from canvasmar_rt.rollout import Predictor


@dataclasses.dataclass(frozen=True)
class Played:
    """One clip. `ready[i]`: seconds from the start until the pixels of latent frame i were on the
    host; `decoding[i]`: how much of it, in all so far, went into the autoencoder, None where the
    system cannot tell; `parts`: seconds by component over the whole clip, as far as it tells."""

    ready: tuple[float, ...]
    decoding: tuple[float, ...] | None
    parts: Mapping[str, float]


class Contestant(Protocol):
    """A system at one batch size, warmed up and ready to play. `described` is JSON-ready: dtypes it
    computes in, engine, device, steps. A `chunked` system has no frame before it has all."""

    name: str
    chunked: bool

    @property
    def described(self) -> Mapping[str, object]: ...

    def play(self, frames: int) -> Played:
        """Continue the context by that many latent frames. Going back to the context is not
        timed.

        Raises:
            ConfigError: if that is no whole number of groups.
        """


def check_groups(frames: int, group: int) -> None:
    """
    Raises:
        ConfigError: if a clip of so many latent frames is no whole number of groups.
    """
    if frames % group:
        raise ConfigError(
            f"bench: clips of {frames} latent frames are no whole groups of {group}; give --frames "
            f"{max(frames // group, 1) * group}"
        )


def number(name: str, *bases: str) -> int:
    """K of a name such as "no-canvas:K" of one of `bases`, or 0."""
    base, _, text = name.partition(":")
    return int(text) if base in bases and text.isdecimal() else 0


def group_of(name: str) -> int:
    """Latent frames that the contestant of this name draws at once, if the name says so, or 1."""
    return number(name, "next-group") or (2 if name.startswith("next-group") else 1)


class RolloutContestant:
    """A bundle on one of our engines."""

    chunked = False

    def __init__(
        self, name: str, predictor: Predictor, context: UInt8, *, batch: int, seed: int
    ) -> None:
        self.name = name
        manifest, engine = predictor.bundle.manifest, predictor.engine
        self.described: dict[str, object] = {
            "engine": engine.name,
            "device": engine.device,
            "arithmetic": manifest.dtype,
            "weights": manifest.weights_dtype,
            "quantization": manifest.quantization,
            "graph_off": dict(engine.graph_off),
            "sampling": to_dict(predictor.sampling),
        }
        self._rollout = predictor.start(context, seed=seed, batch=batch)
        self._rollout.warmup()
        self._start = self._rollout.state()

    def play(self, frames: int) -> Played:
        group = self._rollout.config.group  # the pixels of a group are there at once
        check_groups(frames, group)
        self._rollout.restore(self._start)
        ready, decoding, parts = list[float](), list[float | None](), dict[str, float]()
        begun = time.perf_counter()
        while len(ready) < frames:
            timings = self._rollout.step().timings
            ready += [time.perf_counter() - begun] * group
            for name, value in timings.items():
                parts[name] = parts.get(name, 0.0) + value
            decoding += [parts.get("decoder")] * group
        known = None if None in decoding else tuple(float(d or 0.0) for d in decoding)
        return Played(tuple(ready), known, parts)
