"""Models that a benchmark makes for itself: random weights change what is predicted, not how long
it takes."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from canvasmar_rt.bundle import Bundle
from canvasmar_rt.config import ModelConfig, SamplingConfig
from canvasmar_rt.errors import ConfigError, EngineError, need_torch
from canvasmar_rt.rollout import Predictor


def scaled(config: ModelConfig, factor: int) -> ModelConfig:
    """The model with every width divided by `factor`; depths, tokens and channels stay.

    Raises:
        ConfigError: if a width is not a multiple.
    """
    ae, widths = config.autoencoder, [config.dim, config.heads, config.flow.width]
    if factor < 1 or any(w % factor for w in (*widths, *ae.widths)):
        raise ConfigError(
            f"scale: {config.name} has widths {widths} and {list(ae.widths)}, which {factor} does "
            "not divide"
        )
    return dataclasses.replace(
        config,
        name=config.name if factor == 1 else f"{config.name}/{factor}",
        dim=config.dim // factor,
        heads=config.heads // factor,
        flow=dataclasses.replace(config.flow, width=config.flow.width // factor),
        autoencoder=dataclasses.replace(ae, widths=tuple(w // factor for w in ae.widths)),
    )


@contextmanager
def random_bundle(
    config: ModelConfig,
    sampling: SamplingConfig,
    progress: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> Iterator[Path]:
    """A bundle of the model with random weights, while the context lasts. `options` are those of
    `ExportOptions`.

    Raises:
        EngineError: without PyTorch.
    """
    need_torch("a model with random weights")
    from canvasmar_rt.export.exporter import ExportOptions, export_bundle
    from canvasmar_rt.models.families import build

    with tempfile.TemporaryDirectory() as work:
        made = export_bundle(
            build(config), sampling, Path(work) / "bundle",
            ExportOptions(drift_frames=1, **options), source="random weights", progress=progress,
        )  # fmt: skip
        yield made.path


def random_like(
    predictor: Predictor, config: ModelConfig, sampling: SamplingConfig | None = None
) -> Predictor:
    """Another model exported as the predictor's was (dtypes, quantisation, opset, batch and
    unrolling), on an engine with its device and options, with its sampling by default.

    Raises:
        EngineError: without PyTorch, or on an engine that needs more than a bundle.
    """
    need_torch(f"the model {config.name}")
    from canvasmar_rt.export.exporter import DTYPES

    engine, manifest = predictor.engine, predictor.bundle.manifest
    like = getattr(engine, "like", None)
    if like is None:
        raise EngineError(
            f"{config.name} is exported on the spot and has no engines of {engine.name}; measure "
            "it on onnxruntime or torch"
        )
    short = {long: name for name, (long, _) in DTYPES.items()}
    with random_bundle(
        config,
        sampling or predictor.sampling,
        dtype=short[manifest.dtype],
        weights=short[manifest.weights_dtype],
        quantize=manifest.quantization,
        opset=manifest.opset,
        batch=manifest.batch,
        unroll=manifest.unrolled,
    ) as bundle:
        return Predictor(like(Bundle.open(bundle)), sampling or predictor.sampling)
