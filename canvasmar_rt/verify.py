"""Parity on the user's machine: golden tensors of a bundle against an engine, without torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from canvasmar_rt.bundle import Bundle, Difference, Parity
from canvasmar_rt.config import ModelConfig, SamplingConfig
from canvasmar_rt.engines import Engine, create
from canvasmar_rt.engines.memory import from_storage, to_storage
from canvasmar_rt.errors import BundleError, CanvasMarError, ParityError
from canvasmar_rt.rollout import Predictor
from canvasmar_rt.schedule import ar_steps, order_temperatures

Array = npt.NDArray[Any]

ROLLOUT = "golden/rollout.safetensors"

ROUNDED = 0.01
"""Share of pixels that may be a level off at no cost: what is between two levels is rounded either
way."""


def golden_file(component: str) -> str:
    return f"golden/{component}.safetensors"


def difference(outputs: Mapping[str, Array], reference: Mapping[str, Array]) -> Difference:
    """The worst difference over all outputs; NaN anywhere gives NaN, which no tolerance passes."""
    worst = Difference(max_abs=0.0, relative=0.0, cosine=1.0)
    for name, want in reference.items():
        a, b = outputs[name].astype(np.float64).ravel(), want.astype(np.float64).ravel()
        norm_a, norm_b = float(np.linalg.norm(a)), float(np.linalg.norm(b))
        gap = a - b
        level = np.abs(gap) == 1 if want.dtype == np.uint8 else np.zeros_like(gap, bool)
        counted = np.where(level, 0, gap) if level.mean() <= ROUNDED else gap
        relative = float(np.linalg.norm(counted)) / max(norm_b, 1e-12)
        cosine = float(a @ b) / (norm_a * norm_b) if norm_a and norm_b else float(norm_a == norm_b)
        largest = float(np.abs(gap).max())
        worst = worst.worse(Difference(max_abs=largest, relative=relative, cosine=cosine))
    return worst


def compare_component(
    engine: Engine, name: str, inputs: Mapping[str, Array], reference: Mapping[str, Array]
) -> Difference:
    """Run one component on golden inputs and compare with the reference outputs."""
    shapes = {n: x.shape for n, x in reference.items()}
    made = run_component(engine, name, inputs, shapes)
    if "order" in reference:
        manifest = engine.bundle.manifest
        made, reference = (
            {**x, "order": _ranked(x["order"], manifest.model, manifest.sampling)}
            for x in (made, reference)
        )
    return difference(made, reference)


def _ranked(order: Array, model: ModelConfig, sampling: SamplingConfig) -> Array:
    """An order (..., N) with the tokens sorted of every set that no noise ranks, MaskGiT's last one
    or all at temperature 0: near ties within a set make no difference to the frame."""
    out = order.copy()
    steps = ar_steps(model.tokens, sampling.ar_steps)
    temperatures = order_temperatures(sampling, has_staticness=model.canvas)
    for step, tau in zip(steps, temperatures, strict=True):
        if tau == 0:
            out[..., step.parts["select"]].sort(axis=-1)
    return out


def run_component(
    engine: Engine, name: str, inputs: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Array]:
    """The outputs of one component, of these shapes, for arrays of the host."""
    entry, memory = engine.bundle.manifest.components[name], engine.memory()
    given = memory.group({t.name: (inputs[t.name].shape, t.dtype) for t in entry.inputs})
    made = memory.group({t.name: (shapes[t.name], t.dtype) for t in entry.outputs})
    for tensor, buffer in given.buffers.items():
        assert buffer.host is not None
        buffer.host[...] = to_storage(inputs[tensor], buffer.dtype)
    for buffer in made.buffers.values():  # what an engine does not write must not look right
        assert buffer.host is not None
        buffer.host[...] = to_storage(np.array(7), buffer.dtype)
    given.upload()
    made.upload()
    engine.bind(name, given.buffers, made.buffers, memory)()
    made.download()
    memory.synchronize()
    outputs = {n: x.host for n, x in made.buffers.items() if x.host is not None}
    return {n: from_storage(x, made.buffers[n].dtype) for n, x in outputs.items()}


def compare_rollout(
    engine: Engine, golden: Mapping[str, Array], progress: Callable[[str], None] = lambda _: None
) -> tuple[tuple[float, ...], int]:
    """Replay the golden rollout, forcing its token order.

    Returns:
        Relative difference of the latents of every frame, and the number of frames whose own order
        would have differed: near ties of the staticness, or a mistake.

    Raises:
        ValueError: if a golden frame has another shape, or its order is none.
    """
    predictor = Predictor(engine)
    low = predictor.bundle.manifest.batch.minimum
    rollout = predictor.start(seed=int(golden["seed"].item()), batch=low)
    drift: list[float] = []
    flipped = 0
    for latent, order in zip(golden["latents"], golden["orders"], strict=True):
        progress(f"golden rollout on {engine.name}: frame {len(drift) + 1}")
        before = rollout.state()
        own = rollout.step()
        places = np.sort(own.order[0])
        if latent.shape != own.latent[0].shape or not np.array_equal(np.sort(order), places):
            raise ValueError(f"latents or order of frame {len(drift) + 1} of the rollout")
        if (own.order[0] != order).any():
            flipped += 1
            rollout.restore(before)
            own = rollout._step(None, order=np.broadcast_to(order, own.order.shape))
        norm = max(float(np.linalg.norm(latent)), 1e-12)
        drift.append(float(np.linalg.norm(own.latent[0] - latent)) / norm)
    return tuple(drift), flipped


def failures(parity: Parity) -> list[str]:
    """What of a certificate is past its tolerance."""
    found = [
        f"{name} differs by {d.relative:.2e} (tolerance {parity.limit(name):.0e})"
        for name, d in parity.components.items()
        if not d.relative <= parity.limit(name)
    ]
    worst, limit = float(np.max(parity.drift)), parity.drift_tolerance  # NaN, if any frame is
    if not worst <= limit:
        found.append(f"the rollout drifts by {worst:.2e} (tolerance {limit:.0e})")
    frames, flipped = len(parity.drift), parity.flipped_orders
    if flipped > parity.most_flipped:
        found.append(f"{flipped} of {frames} frames put their tokens in another order")
    return found


def verify(
    path: str | Path,
    *,
    engine: str = "onnxruntime",
    device: str = "cpu",
    progress: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> dict[str, Any]:
    """Check a bundle's files, then every component and the golden rollout on this machine.
    `options` are the engine's own.

    Returns:
        A JSON-ready report: engine, device, tolerances, and the differences found.

    Raises:
        BundleError: a file is missing or changed, or the bundle carries no golden tensors.
        ParityError: a difference is past the tolerance stored in the bundle.
    """
    bundle = Bundle.open(path, progress=lambda name: progress(f"checking {name}"))
    parity = bundle.manifest.parity
    if parity is None:
        raise BundleError(f"{bundle.path}: no parity certificate; export the bundle again")
    made = create(engine, bundle, device=device, **options)
    try:
        return _verified(bundle, parity, made, progress)
    except (KeyError, ValueError, IndexError, OverflowError) as error:
        if isinstance(error, CanvasMarError):
            raise
        raise BundleError(
            f"{bundle.path}: the golden tensors do not fit the model ({error}); export it again"
        ) from None


def _verified(
    bundle: Bundle, parity: Parity, made: Engine, progress: Callable[[str], None]
) -> dict[str, Any]:
    report: dict[str, Any] = {
        "bundle": str(bundle.path),
        "engine": made.name,
        "device": made.device,
        "tolerance": parity.tolerance,
        "frame_tolerance": parity.limit("frame"),
        "drift_tolerance": parity.drift_tolerance,
        "omitted": dict(made.omitted),
    }
    components = {}
    for name in bundle.manifest.components:
        if name in report["omitted"]:
            continue
        progress(f"running {name}")
        tensors = bundle.tensors(golden_file(name))
        split: dict[str, dict[str, Array]] = {"in": {}, "out": {}}
        for key, value in tensors.items():
            kind, _, tensor = key.partition(".")
            split[kind][tensor] = value
        components[name] = compare_component(made, name, split["in"], split["out"])
    drift, flipped = compare_rollout(made, bundle.tensors(ROLLOUT), progress)
    here = dataclasses.replace(parity, components=components, drift=drift, flipped_orders=flipped)
    if failed := failures(here):
        raise ParityError(f"{bundle.path} on {made.name}/{made.device}: {'; '.join(failed)}")
    differences = {name: vars(difference) for name, difference in components.items()}
    return report | {"components": differences, "drift": list(drift), "flipped_orders": flipped}
