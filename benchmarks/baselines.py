"""The systems `bench` sets beside ours, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from canvasmar_rt.benchmarks.contestants import (
    Contestant,
    RolloutContestant,
    group_of,
    number,
)
from canvasmar_rt.benchmarks.dfot import DfotContestant, Guidance
from canvasmar_rt.benchmarks.latency import Make
from canvasmar_rt.benchmarks.peers import (
    EagerContestant,
    NaiveOnnxContestant,
    without_canvas,
)
from canvasmar_rt.benchmarks.random_models import random_like
from canvasmar_rt.config import next_group, unified
from canvasmar_rt.engines.program import UInt8
from canvasmar_rt.errors import ConfigError, need_torch
from canvasmar_rt.rollout import Predictor

BASELINES = {
    "eager": "the PyTorch sampler on the same weights",
    "eager-paper": "the same with the bundle's default sampling (K, guidance, noise, order), "
    "whatever options are given, and the paper's solver, 30 steps of Euler",
    "compile": "the PyTorch sampler through torch.compile",
    "naive-onnx": "a plain ONNX export run from a Python loop",
    "no-canvas": "the MAR without a canvas, of the same size, random weights; no-canvas:K does K "
    "AR steps",
    "next-group": "a model that draws two latent frames at once, random weights; next-group:J J",
    "unified": "a unified masked autoregressive model (MAGI, VideoMAR) of the same size, random "
    "weights",
    "dfot": "DFoT, scaled as the model is to kinetics600, 50 DDIM steps, conditional guidance",
    "dfot-vanilla": "the same with vanilla history guidance",
}
SWEEPS = ("ar_steps", "flow_steps", "history")
"""Options whose cost `bench` can draw; `history` is the window in latent frames."""


def baselines(
    predictor: Predictor, names: Sequence[str], *, seed: int, threads: int | None = None
) -> dict[str, Make]:
    """Makers of the contestants called `names`; `threads` are CPU threads, as `canvasmar_rt.load`
    takes them.

    Raises:
        ConfigError: if there is no such baseline.
        EngineError: if it needs packages that are not installed.
    """
    for name in names:
        if name not in BASELINES and not number(name, "no-canvas", "next-group"):
            raise ConfigError(f"no baseline {name!r}; baselines are {', '.join(BASELINES)}")
    if not names:
        return {}
    need_torch("a baseline")
    paper = dataclasses.replace(predictor.bundle.manifest.sampling, solver="euler", flow_steps=30)

    def maker(name: str) -> Make:
        def make(context: UInt8, batch: int) -> Contestant:
            try:
                return contestant(context, batch)
            except ConfigError as error:
                raise ConfigError(f"baseline {name}: {error}") from None

        def contestant(context: UInt8, batch: int) -> Contestant:
            at: dict[str, Any] = {"batch": batch, "seed": seed}
            if name.startswith("dfot"):
                guidance: Guidance = "vanilla" if name == "dfot-vanilla" else "conditional"
                made: Contestant = DfotContestant(predictor, context, guidance=guidance, **at)
            elif name.startswith("no-canvas"):
                steps = number(name, "no-canvas") or predictor.sampling.ar_steps
                plain = without_canvas(predictor, ar_steps=steps)
                made = RolloutContestant(name, plain, context, **at)
            elif name.startswith("next-group"):
                config = next_group(predictor.config, group_of(name))
                groups = random_like(predictor, config)
                made = RolloutContestant(name, groups, context, **at)
            elif name == "unified":
                one = random_like(predictor, unified(predictor.config))
                made = RolloutContestant(name, one, context, **at)
            elif name == "naive-onnx":
                made = NaiveOnnxContestant(predictor, context, threads=threads, **at)
            else:
                made = EagerContestant(
                    predictor, context, sampling=paper if name == "eager-paper" else None,
                    threads=threads, compile=name == "compile", **at,
                )  # fmt: skip
            made.name = name
            return made

        return make

    return {name: maker(name) for name in names}


def sweep(
    predictor: Predictor,
    text: str,
    *,
    seed: int,
    beside: bool = False,
) -> dict[str, Make]:
    """Our engine at several values of one option, given as "ar_steps=1,2,4,8"; `beside`: also a
    unified model of the same size with every window of "history=1,2,4,8".

    Raises:
        ConfigError: for another option, or values it cannot have.
    """
    option, _, listed = text.partition("=")
    try:
        values = [int(v) for v in listed.split(",")]
    except ValueError:
        values = []
    if option not in SWEEPS or not values:
        raise ConfigError(
            f"--sweep takes {', '.join(SWEEPS)} and values, such as ar_steps=1,2,4,8; got {text!r}"
        )

    def maker(name: str, value: int) -> Make:
        def make(context: UInt8, batch: int) -> Contestant:
            if name.startswith("unified"):
                config = dataclasses.replace(unified(predictor.config), context_frames=value)
                there = random_like(predictor, config)
            else:
                there = _variant(predictor, option, value)
            return RolloutContestant(name, there, context, batch=batch, seed=seed)

        return make

    names = {f"{option}={v}": v for v in values}
    if beside and option == "history":
        names |= {f"unified history={v}": v for v in values}
    return {name: maker(name, value) for name, value in names.items()}


def _variant(predictor: Predictor, option: str, value: int) -> Predictor:
    if option == "history":  # the ring's size is in the graphs
        config = dataclasses.replace(predictor.config, context_frames=value)
        return random_like(predictor, config)
    changed: dict[str, Any] = {option: value}
    return Predictor(predictor.engine, dataclasses.replace(predictor.sampling, **changed))
