"""The peers compute our video, from the same context, by other means."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

import canvasmar_rt
from canvasmar_rt.benchmarks import baselines, peers, random_models
from canvasmar_rt.benchmarks.peers import EagerContestant, NaiveOnnxContestant, without_canvas
from canvasmar_rt.bundle import Bundle
from canvasmar_rt.config import (
    AutoencoderConfig,
    FlowConfig,
    ModelConfig,
    SamplingConfig,
    unified,
)
from canvasmar_rt.engines import torch_engine
from canvasmar_rt.engines.program import Clock
from canvasmar_rt.errors import ConfigError, EngineError
from canvasmar_rt.export.exporter import ExportOptions
from canvasmar_rt.models import sampler
from canvasmar_rt.models.canvasmar import CanvasMAR
from canvasmar_rt.models.families import build, count_parameters
from canvasmar_rt.rollout import Predictor
from tests.conftest import SAMPLING, VARIANTS
from tests.test_imports import run

SEED = 11
BATCH = 2
TINY = dataclasses.replace(
    VARIANTS["mmdit"],
    autoencoder=AutoencoderConfig(
        height=16, width=16, temporal_compression=2, latent_channels=4,
        patch=4, widths=(8,), blocks=1,
    ),
    flow=FlowConfig(width=16, blocks=1, modulation="additive"),
    temporal_layers=1,
    spatial_layers=2,
    action_dim=2,
)  # fmt: skip


@pytest.fixture
def predictor_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Predictor]:
    """What a peer reads of a predictor, for a model that is in no bundle."""

    def make(config: ModelConfig, sampling: SamplingConfig = SAMPLING) -> Predictor:
        model = build(config, seed=3)
        monkeypatch.setattr(torch_engine, "load_model", lambda bundle: model)
        engine = types.SimpleNamespace(name="onnxruntime", device="cpu")
        made = types.SimpleNamespace(config=config, sampling=sampling, engine=engine, bundle=model)
        return cast(Predictor, made)

    return make


@pytest.fixture(scope="module")
def packaged() -> Predictor:
    return canvasmar_rt.load("toytable", threads=1)


def model_of(predictor: Predictor) -> CanvasMAR:
    return torch_engine.load_model(predictor.bundle)


def context(predictor: Predictor, frames: int = 5) -> np.ndarray:
    ae = predictor.config.autoencoder
    shape = (frames, ae.height, ae.width, 3)
    return np.random.default_rng(2).integers(0, 256, shape, dtype=np.uint8)


def reference(predictor: Predictor, clip: np.ndarray, frames: int) -> list[sampler.Sample]:
    model = model_of(predictor)
    state = sampler.start(model, sampler.encode(model, torch.from_numpy(np.stack([clip] * BATCH))))
    drawn = []
    for _ in range(frames):
        noise = sampler.draw_noise(
            model.config, predictor.sampling, seed=SEED, streams=range(BATCH), frame=state.time
        )
        state, sample = sampler.step(model, predictor.sampling, state, noise)
        drawn.append(sample)
    return drawn


def require_same_video(naive: NaiveOnnxContestant, want: list[sampler.Sample]) -> None:
    state = naive._start
    for sample in want:
        state, pixels = naive._frame(state, Clock())
        error = np.linalg.norm(state.latent - sample.latent.numpy())
        assert error < 1e-4 * np.linalg.norm(sample.latent.numpy())
        assert np.abs(pixels.astype(int) - sample.frames.numpy().astype(int)).max() <= 1


class TorchSession:
    """A network that is not exported: what a session does, by PyTorch."""

    def __init__(self, model: CanvasMAR, function: Callable[..., Any]) -> None:
        self.model, self.function = model, function

    def run(self, _: None, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        with torch.inference_mode():
            made = self.function(self.model, *(torch.tensor(x) for x in inputs.values()))
        return [x.numpy() for x in (made if isinstance(made, tuple) else (made,))]


# -- a plain ONNX export


@pytest.mark.parametrize("first", [1, 7])
@pytest.mark.parametrize("variant", ["expert", "no-canvas"])
def test_the_plain_loop_draws_the_reference_video(
    predictor_of: Callable[..., Predictor],
    monkeypatch: pytest.MonkeyPatch,
    variant: str,
    first: int,
) -> None:
    """With fewer frames than the window holds, and past the point where it is full."""
    monkeypatch.setattr(peers, "_export", lambda model, function, *_: TorchSession(model, function))
    monkeypatch.setattr(peers, "_session", lambda made, *_: made)
    predictor = predictor_of(VARIANTS[variant], dataclasses.replace(SAMPLING, solver="ab2"))
    clip = context(predictor, first)
    naive = NaiveOnnxContestant(predictor, clip, batch=BATCH, seed=SEED)
    require_same_video(naive, reference(predictor, clip, 4))


def test_the_plain_export_draws_the_reference_video(
    predictor_of: Callable[..., Predictor], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Networks whose export has axes of its own are exported, the others are slow to."""
    export, session = peers._export, peers._session
    exported = ("temporal", "condition", "spatial", "velocity")

    def some(model: CanvasMAR, function: Callable[..., Any], inputs: Any, path: Path) -> Any:
        if path.stem in exported:
            return export(model, function, inputs, path)
        return TorchSession(model, function)

    def either(made: Any, device: str, threads: int | None) -> Any:
        return session(made, device, threads) if isinstance(made, Path) else made

    monkeypatch.setattr(peers, "_export", some)
    monkeypatch.setattr(peers, "_session", either)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    predictor = predictor_of(TINY)
    clip = context(predictor)
    naive = NaiveOnnxContestant(predictor, clip, batch=BATCH, seed=SEED, threads=1)
    assert not list(tmp_path.rglob("*.onnx*"))
    require_same_video(naive, reference(predictor, clip, 4))
    played = naive.play(3)
    assert len(played.ready) == len(played.decoding or ()) == 3
    assert set(played.parts) == {
        "noise", "temporal", "canvas", "order", "condition", "spatial", "flow", "decoder",
    }  # fmt: skip
    assert 0.8 * played.ready[-1] < sum(played.parts.values()) < 1.2 * played.ready[-1]


# -- the PyTorch samplers


def test_the_eager_sampler_draws_our_video(packaged: Predictor) -> None:
    clip = context(packaged)
    eager = EagerContestant(packaged, clip, batch=BATCH, seed=SEED, threads=1)
    rollout = packaged.start(clip, seed=SEED, batch=BATCH)
    state = eager._start
    for _ in range(3):
        state, pixels = eager._frame(state)
        assert np.abs(pixels.astype(int) - rollout.step().frames.astype(int)).max() <= 1
    for _ in range(2):  # from the context each time
        played = eager.play(3)
        assert eager._start.time == 3
        assert played.decoding is not None
        assert len(played.ready) == len(played.decoding) == 3
        assert all(0 < d < r for d, r in zip(played.decoding, played.ready, strict=True))
        assert list(played.ready) == sorted(played.ready)


def test_the_eager_sampler_takes_other_sampling(packaged: Predictor) -> None:
    paper = dataclasses.replace(packaged.sampling, solver="euler", flow_steps=30, ar_steps=2)
    eager = EagerContestant(packaged, context(packaged), batch=1, seed=0, sampling=paper)
    calls: list[int] = []
    flow = eager._model.flow
    flow.embed.register_forward_hook(lambda *_: calls.append(1))  # one in every evaluation
    eager.play(1)
    assert len(calls) == 2 * 30
    sampling = eager.described["sampling"]
    assert isinstance(sampling, dict)
    assert (sampling["solver"], sampling["flow_steps"]) == ("euler", 30)


def test_the_compiled_sampler_compiles_once(
    predictor_of: Callable[..., Predictor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More set sizes than torch.compile takes of one function by default; the backend is one that
    needs no compiler."""
    programs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        programs.append(graph)
        return graph

    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, *, dynamic, mode: compile_(f, dynamic=dynamic, backend=backend)
    )
    sampling = dataclasses.replace(SAMPLING, ar_steps=10, flow_steps=1)
    predictor = predictor_of(TINY, sampling)
    clip = context(predictor)
    compiled = EagerContestant(predictor, clip, batch=BATCH, seed=SEED, compile=True)
    count = len(programs)
    assert count > 10
    state = compiled._start
    with torch._dynamo.config.patch(error_on_recompile=True):
        for sample in reference(predictor_of(TINY, sampling), clip, 4):
            state, pixels = compiled._frame(state)
            torch.testing.assert_close(state.latent, sample.latent, rtol=1e-4, atol=1e-4)
            assert np.abs(pixels.astype(int) - sample.frames.numpy().astype(int)).max() <= 1
    assert len(programs) == count


def test_a_missing_compiler_is_named(
    predictor_of: Callable[..., Predictor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> None:
        raise FileNotFoundError("g++\nand more lines")

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **_: compile_(f, backend=backend))
    predictor = predictor_of(TINY)
    with pytest.raises(EngineError, match=r"FileNotFoundError: g\+\+\); on the CPU it needs a C"):
        EagerContestant(predictor, context(predictor), batch=1, seed=0, compile=True)


@pytest.mark.parametrize(
    ("engine", "device", "peer", "dtype"),
    [
        ("onnxruntime", "cpu", "onnxruntime", "float32"),
        ("torch", "cpu", "torch", "bfloat16"),
        ("torch", "cpu", "onnxruntime", "float32"),  # which has no other kernels there
        ("onnxruntime", "cuda:0", "onnxruntime", "bfloat16"),
    ],
)
def test_peers_compute_in_our_dtype(engine: str, device: str, peer: str, dtype: str) -> None:
    manifest = types.SimpleNamespace(dtype="bfloat16")
    predictor: Any = types.SimpleNamespace(
        engine=types.SimpleNamespace(name=engine, device=device),
        bundle=types.SimpleNamespace(manifest=manifest),
    )
    assert peers._dtype(predictor, peer) == dtype


# -- no canvas


def test_the_model_without_a_canvas_is_as_large(
    packaged: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported: dict[str, Any] = {}

    @contextlib.contextmanager
    def random_bundle(
        config: ModelConfig, sampling: SamplingConfig, **options: Any
    ) -> Iterator[Path]:
        exported.update(config=config, sampling=sampling, options=options)
        yield packaged.bundle.path

    monkeypatch.setattr(random_models, "random_bundle", random_bundle)
    plain = without_canvas(packaged, ar_steps=6)
    assert plain.engine.name == packaged.engine.name
    assert plain.engine._threads == packaged.engine._threads == 1  # type: ignore[attr-defined]
    config, options = exported["config"], ExportOptions(**exported["options"])
    assert not config.canvas
    sizes = [sum(count_parameters(c).values()) for c in (config, packaged.config)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)
    assert exported["sampling"] == dataclasses.replace(packaged.sampling, ar_steps=6)
    manifest = packaged.bundle.manifest
    assert (options.dtype, options.weights) == ("fp32", "fp16")
    assert (options.opset, options.batch, options.unroll, options.quantize) == (
        manifest.opset, manifest.batch, manifest.unrolled, manifest.quantization,
    )  # fmt: skip
    baselines.sweep(packaged, "history=3", seed=0)["history=3"](context(packaged), 1)
    assert exported["config"] == dataclasses.replace(packaged.config, context_frames=3)
    assert exported["sampling"] == packaged.sampling
    assert ExportOptions(**exported["options"]) == options
    one = sum(count_parameters(unified(packaged.config)).values())
    assert one == pytest.approx(sizes[1], rel=0.02)
    with pytest.raises(ConfigError, match="ar_steps"):
        without_canvas(packaged, ar_steps=packaged.config.tokens + 1)


def test_others_have_the_engines_options(
    bundles: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def random_bundle(*_: Any, **__: Any) -> Iterator[Path]:
        yield bundles("expert").path

    monkeypatch.setattr(random_models, "random_bundle", random_bundle)
    ours = canvasmar_rt.load(bundles("expert").path, engine="torch", compile=True, cuda_graph=False)
    theirs = random_models.random_like(ours, ours.config).engine
    assert isinstance(theirs, torch_engine.TorchEngine)
    assert (theirs._compile, theirs._cuda_graph) == (True, False)


def test_groups_are_drawn_as_groups(bundles: Callable[[str], Bundle]) -> None:
    """Six latent frames of a model that draws three at once are two steps, as they are of ours."""
    groups = canvasmar_rt.load(bundles("next-group").path, threads=1)
    eager = EagerContestant(groups, context(groups), batch=1, seed=0, threads=1)
    played = eager.play(6)
    assert played.ready[0] == played.ready[2] < played.ready[3]
    assert played.decoding is not None
    assert played.decoding[0] == played.decoding[2] < played.decoding[3]
    with pytest.raises(EngineError, match="frame by frame"):
        NaiveOnnxContestant(groups, context(groups), batch=1, seed=0)


# -- what is missing


def test_what_needs_torch_says_so(packaged: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = context(packaged)
    for missing in ("torch", "onnx", "onnxscript"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, missing, None)
            makers: list[Callable[[], object]] = [
                lambda: EagerContestant(packaged, clip, batch=1, seed=0),
                lambda: NaiveOnnxContestant(packaged, clip, batch=1, seed=0),
                lambda: without_canvas(packaged, ar_steps=2),
            ]
            for make in makers:
                with pytest.raises(EngineError, match=rf"needs {missing}: .*\[export\]"):
                    make()


def test_the_module_imports_without_torch(tmp_path: Path) -> None:
    done = run("import canvasmar_rt.benchmarks.peers", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
