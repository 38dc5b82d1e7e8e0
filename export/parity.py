"""Parity, measured and never assumed: every component and a 32-frame rollout against PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from safetensors.numpy import save_file

from canvasmar_rt.bundle import Bundle, Difference, DTypeName, Parity
from canvasmar_rt.components import MASKED, TensorSpec, components
from canvasmar_rt.config import ModelConfig
from canvasmar_rt.engines import create
from canvasmar_rt.errors import NotFiniteError, ParityError
from canvasmar_rt.files import replacing
from canvasmar_rt.models import sampler
from canvasmar_rt.models.canvasmar import FrameModel
from canvasmar_rt.models.graphs import graph
from canvasmar_rt.schedule import (
    branch_inputs,
    generation_order,
    order_temperatures,
    set_sizes,
    solver_inputs,
    time_rotation,
)
from canvasmar_rt.verify import (
    ROLLOUT,
    Array,
    compare_component,
    compare_rollout,
    golden_file,
)

ORDER_GAP = {"float32": 0.02, "float16": 0.2, "bfloat16": 0.5, "int8": 0.5}
"""Between the scores of neighbours in the golden order of a whole frame, by dtype or quantisation:
several times what engines differ by in the logarithm of the staticness."""

TOLERANCE: dict[str, tuple[float, float | None, float]] = {
    "float32": (1e-4, None, 1e-3),
    "float16": (2e-2, None, 2e-1),
    "bfloat16": (1e-1, None, 1.0),
    "int8": (2e-1, 5e-1, 1.0),
}
"""Per dtype, or quantisation: tolerance on a component's relative difference, on the whole-frame
graph's where it is another one, and on each frame of the rollout. A frame is a hundred evaluations
one after another, in whose token order 8 bits swap near ties; other noise makes frames, and
rollouts, differ by about 1.5."""


def measure(
    bundle: Bundle,
    reference: FrameModel,
    *,
    seed: int,
    frames: int,
    progress: Callable[[str], None],
) -> tuple[Parity, list[str]]:
    """Write golden inputs and outputs into the bundle and compare the exported graphs with them.

    ONNX Runtime has no bfloat16 kernels on the CPU: the certificate of such a bundle compares the
    torch engine and says so; `canvasmar-rt verify` on the GPU is the check of its graphs.

    Returns:
        The certificate, and the names of the golden files written.
    """
    manifest, config = bundle.manifest, bundle.manifest.model
    kind = manifest.dtype if manifest.quantization == "none" else manifest.quantization
    tolerance, frame_tolerance, drift_tolerance = TOLERANCE[kind]
    engine = create(
        "torch" if manifest.dtype == "bfloat16" else "onnxruntime", bundle, device="cpu"
    )
    (bundle.path / "golden").mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    written: list[str] = []
    results: dict[str, Difference] = {}
    for name, component in components(config).items():
        progress(f"measuring {name}")
        low = manifest.batch.minimum
        batches = sorted({low, min(low + 1, manifest.batch.maximum)}, reverse=True)
        for batch in batches:  # the last, the smaller, is what the bundle keeps
            inputs = {s.name: _random(s, config, bundle, batch, rng) for s in component.inputs}
            _consistent(inputs, config, rng)
            if name == "frame" and config.canvas:
                _decide_order(reference, inputs, bundle, rng, ORDER_GAP[kind])
            outputs = (
                _frame(reference, inputs, bundle)
                if name == "frame"
                else _run(reference, name, inputs)
            )
            if name == "frame" and engine.name == "torch":
                continue  # it runs frames from the components
            found = compare_component(engine, name, inputs, outputs)
            results[name] = found.worse(results.get(name, found))
        path = golden_file(name)
        tensors = {f"in.{k}": v for k, v in inputs.items()}
        tensors |= {f"out.{k}": v for k, v in outputs.items()}
        _save(tensors, bundle, path)
        written.append(path)
    golden = rollout_golden(reference, bundle, seed=seed, frames=frames, progress=progress)
    _save(golden, bundle, ROLLOUT)
    written.append(ROLLOUT)
    try:
        drift, flipped = compare_rollout(engine, golden, progress)
    except NotFiniteError:  # whose advice is for those who have a bundle
        what = "a rollout from nothing gives values that are not finite"
        raise not_finite(what, manifest.weights_dtype) from None
    return Parity(
        engine=engine.name,
        tolerance=tolerance,
        frame_tolerance=frame_tolerance,
        drift_tolerance=drift_tolerance,
        components=results,
        drift=drift,
        flipped_orders=flipped,
    ), written


def not_finite(what: str, weights_dtype: DTypeName) -> ParityError:
    """What refuses an export for infinities and NaN."""
    advice = "look at the weights and at the guidance"
    if weights_dtype == "float16":
        advice = "float16 ends at 65504; export in fp32, or with --dtype bf16 for a GPU"
    return ParityError(f"export refused: {what}: {advice}")


def _save(tensors: Mapping[str, Array], bundle: Bundle, name: str) -> None:
    with replacing(bundle.path / name) as temporary:
        save_file({k: np.require(v, requirements="C") for k, v in tensors.items()}, temporary)


def rollout_golden(
    model: FrameModel,
    bundle: Bundle,
    *,
    seed: int,
    frames: int,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Array]:
    """A reference rollout of `frames` latent frames from nothing: latents (frames, N, C) and orders
    (frames, N), of a model that draws groups (steps, J, N, C) and (steps, J, N)."""
    config, sampling = model.config, bundle.manifest.sampling
    state = sampler.empty_state(model, 1)
    latents, orders = [], []
    steps = math.ceil(frames / config.group)
    for i in range(steps):
        progress(f"golden rollout in PyTorch: frame {i * config.group + 1} of {frames}")
        noise = sampler.draw_noise(config, sampling, seed=seed, streams=[0], frame=state.time)
        state, sample = sampler.step(model, sampling, state, noise)
        latents.append(sample.latent[0].numpy())
        orders.append(sample.order[0].numpy())
    return {
        "seed": np.array([seed], np.int64),
        "latents": np.stack(latents),
        "orders": np.stack(orders),
    }


def _random(
    spec: TensorSpec, config: ModelConfig, bundle: Bundle, batch: int, rng: np.random.Generator
) -> Array:
    sampling = bundle.manifest.sampling
    sizes = set_sizes(config.tokens, sampling.ar_steps)
    branches = branch_inputs(sampling, has_canvas=config.canvas)
    fixed = {
        **branches,
        **solver_inputs(sampling),
        "time": time_rotation(time := int(rng.integers(0, 1000)), config.time_rotary_pairs),
        "draw_time": time_rotation(time + 1, config.time_rotary_pairs),
    }
    if spec.name in fixed:
        return np.array(fixed[spec.name], np.float32)
    k = len(sizes) // 2  # an AR step in the middle
    symbols = {
        "B": batch,
        "R": batch * config.group,
        "G": len(branches["branch_weight"]),
        "S": sizes[k],
        "K": max(1, sum(sizes[:k])),
        "M": max(sizes[k], config.tokens - sum(sizes[:k])),
        "AR": sampling.ar_steps,
    }
    shape = tuple(symbols[d] if isinstance(d, str) else d for d in spec.dims)
    if spec.dtype == "uint8":
        return rng.integers(0, 256, shape, dtype=np.uint8)
    if spec.dtype == "int64":
        return np.zeros(shape, np.int64)
    if spec.name == "order_noise":
        # wide gaps: a near tie could flip between engines and would measure nothing
        ranks = rng.permuted(np.broadcast_to(np.arange(config.tokens), shape), axis=-1)
        return (4.0 * ranks).astype(np.float32)
    if spec.name in ("is_first", "action_given"):  # every second video begins, under no action
        begins = np.broadcast_to(np.arange(batch) % 2, shape).astype(np.float32)
        return begins if spec.name == "is_first" else 1 - begins
    if spec.name in ("cache_bias", "history_bias"):
        bias = np.zeros(shape, np.float32)
        bias[:, : -(-shape[1] // 2)] = MASKED
        if spec.name == "history_bias":
            bias[:, 0] = 0.0  # the slot that has just been written
        return bias
    # sixteenths are the same number in every dtype, and files of them compress well
    return np.round(16.0 * rng.standard_normal(shape, dtype=np.float32)) / np.float32(16.0)


def _decide_order(
    model: FrameModel,
    inputs: dict[str, Array],
    bundle: Bundle,
    rng: np.random.Generator,
    gap: float,
) -> None:
    """Choose the order's noise so that, with this staticness, neighbours in every step's order are
    `gap` apart: far enough for no engine to swap them, and too near for an order that took the
    staticness for something else, or not at all, to come out the same."""
    sampling, have = bundle.manifest.sampling, dict(inputs)
    for name in ("temporal", "canvas"):
        component = components(model.config)[name]
        have.update(_run(model, name, {s.name: have[s.name] for s in component.inputs}))
    noise = inputs["order_noise"]
    still = np.log(np.maximum(have["staticness"], np.float32(1e-6)))
    for step, tau in enumerate(order_temperatures(sampling)):
        if tau > 0 and sampling.order != "random":
            rank = rng.permuted(np.broadcast_to(np.arange(still.shape[-1]), still.shape), axis=-1)
            noise[..., step, :] = (gap * rank - still) / tau


def _consistent(inputs: dict[str, Array], config: ModelConfig, rng: np.random.Generator) -> None:
    """Make the index inputs slices of one permutation a row, as they are in a rollout."""
    if "select_index" not in inputs:
        return
    *batch, select = inputs["select_index"].shape
    order = np.stack([rng.permutation(config.tokens) for _ in range(math.prod(batch))])
    order = order.reshape(*batch, -1)
    known = inputs["known_index"].shape[-1] if "known_index" in inputs else 0
    inputs["select_index"] = order[..., known : known + select].copy()
    if "mask_index" in inputs:
        mask = inputs["mask_index"].shape[-1]
        inputs["mask_index"] = order[..., known : known + mask].copy()
    if known:
        inputs["known_index"] = order[..., :known].copy()


@torch.inference_mode()
def _run(model: FrameModel, name: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
    module = graph(model, name)
    hidden = model.dtype
    args = [
        torch.from_numpy(np.ascontiguousarray(inputs[s.name])).to(hidden)
        if s.dtype == "hidden"
        else torch.from_numpy(np.ascontiguousarray(inputs[s.name]))
        for s in module.component.inputs
    ]
    values = [v.float() if v.is_floating_point() else v for v in module(*args)]
    return {s.name: v.numpy() for s, v in zip(module.component.outputs, values, strict=True)}


def _frame(model: FrameModel, inputs: Mapping[str, Array], bundle: Bundle) -> dict[str, Array]:
    """The whole-frame graph's outputs, from the component modules and the host's order."""
    config, sampling = model.config, bundle.manifest.sampling
    have = dict(inputs)

    def run(name: str) -> None:
        component = components(config)[name]
        have.update(_run(model, name, {s.name: have[s.name] for s in component.inputs}))

    run("temporal")
    if "history_bias" in have:
        for new in [n for n in have if n.startswith("new_")]:
            ring = new.replace("new_", "cache_")
            have[ring] = have[ring].copy()
            have[ring][0] = have[new]
    if config.canvas:
        run("canvas")
    if config.condition_attention == "isolated":
        run("condition")
    have["order"] = np.empty((len(have["latent"]), config.tokens), np.int64)
    generation_order(have.get("staticness"), have["order_noise"], sampling, have["order"])
    have["partial"] = have["latent"] if config.residual else np.zeros_like(have["flow_noise"])
    known = 0
    for size in set_sizes(config.tokens, sampling.ar_steps):
        have["known_index"] = have["order"][:, :known]
        have["mask_index"] = have["order"][:, known:]
        have["select_index"] = have["order"][:, known : known + size]
        run("spatial" if known else "spatial_first")
        run("flow")
        have["partial"] = have["next_partial"]
        known += size
    have["next_latent"] = have["partial"]
    return {s.name: have[s.name] for s in components(config)["frame"].outputs}
