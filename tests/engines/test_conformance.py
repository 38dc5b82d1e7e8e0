"""What every engine must do, run on every engine and every kind of model."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

import canvasmar_rt
from canvasmar_rt.bundle import DEMO_CLIP, Bundle, TensorEntry
from canvasmar_rt.components import components
from canvasmar_rt.engines import ENGINES
from canvasmar_rt.engines.cuda_memory import gpu
from canvasmar_rt.engines.memory import Buffer
from canvasmar_rt.engines.onnxruntime_engine import missing_libraries
from canvasmar_rt.engines.tensorrt_build import BuildOptions, build_engines
from canvasmar_rt.engines.tensorrt_engine import TensorRTEngine
from canvasmar_rt.engines.torch_engine import load_model
from canvasmar_rt.errors import EngineError, InputError
from canvasmar_rt.models import sampler
from canvasmar_rt.noise import Purpose, fill_normal
from canvasmar_rt.rollout import Predictor
from canvasmar_rt.schedule import flow_temperature
from canvasmar_rt.verify import compare_component, difference, verify

TOLERANCE = 1e-4


def lacking(engine: str) -> str | None:
    """Why an engine cannot run on a GPU here."""
    if engine == "torch":
        return None if torch.cuda.is_available() else f"PyTorch {torch.__version__} has no GPU"
    try:
        gpu()
        if engine == "tensorrt":
            import canvasmar_rt.engines.tensorrt_library  # noqa: F401
    except EngineError as error:
        return str(error)
    if engine == "onnxruntime" and "CUDAExecutionProvider" not in ort.get_available_providers():
        return f"onnxruntime {ort.__version__} has no CUDA provider"
    if engine == "onnxruntime" and (missing := missing_libraries()):
        return f"onnxruntime finds no {', '.join(missing)}"
    return None


CPU_ENGINES = ("onnxruntime", "torch")
VARIANTS = ("expert", "mmdit", "no-canvas", "unified", "next-group", "next-group-isolated")
CASES = [
    *((engine, "cpu", variant) for engine in CPU_ENGINES for variant in VARIANTS),
    *(
        pytest.param(
            (engine, "cuda", variant),
            marks=[
                pytest.mark.tensorrt if engine == "tensorrt" else pytest.mark.gpu,
                pytest.mark.skipif(why is not None, reason=str(why)),
            ],
        )
        for engine in ENGINES
        for why in [lacking(engine)]
        for variant in VARIANTS
    ),
]


@pytest.fixture(params=CASES, ids=lambda c: "-".join(c))
def predictor(
    request: pytest.FixtureRequest,
    bundles: Callable[[str], Bundle],
    tmp_path_factory: pytest.TempPathFactory,
) -> Predictor:
    engine, device, variant = request.param
    bundle = bundles(variant)
    options = {}
    if engine == "tensorrt":
        options["engine_dir"] = tmp_path_factory.getbasetemp() / f"engines-{variant}"
        build_engines(bundle, options["engine_dir"], BuildOptions(optimization_level=0))
    return canvasmar_rt.load(bundle.path, engine=engine, device=device, **options)


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("from_clip", [True, False], ids=["clip", "nothing"])
def test_rollout_equals_the_reference_sampler(
    predictor: Predictor, clip: np.ndarray, from_clip: bool
) -> None:
    """Same seed: same token order, latents and frames, past the point where the ring wraps."""
    model = load_model(predictor.bundle)
    size, takes_context_actions = predictor.config.action_dim, predictor.config.group == 1
    rng = np.random.default_rng(0)
    if from_clip:
        video = torch.from_numpy(np.stack([clip, clip[::-1]]))
        told = None
        if size and takes_context_actions:
            told = rng.standard_normal((2, 3, size)).astype(np.float32)
        rollout = predictor.start(video.numpy(), seed=11, batch=2, actions=told)
        latents = sampler.encode(model, video)
        state = sampler.start(model, latents, None if told is None else torch.from_numpy(told))
    else:
        rollout = predictor.start(seed=11, batch=2)
        state = sampler.empty_state(model, 2)
    for i in range(7):
        action = rng.standard_normal((2, size)).astype(np.float32) if size and i % 2 else None
        noise = sampler.draw_noise(
            predictor.config, predictor.sampling, seed=11, streams=[0, 1], frame=state.time
        )
        state, sample = sampler.step(
            model, predictor.sampling, state, noise,
            None if action is None else torch.from_numpy(action),
        )  # fmt: skip
        got = rollout.step(action)
        np.testing.assert_array_equal(got.order, sample.order.numpy())
        assert relative(got.latent, sample.latent.numpy()) < TOLERANCE
        frames = sample.frames.numpy()[:, -got.frames.shape[1] :]
        assert np.abs(got.frames.astype(int) - frames).max() <= 1
        if sample.canvas is None:
            assert got.canvas is None
            assert got.staticness is None
        else:
            assert got.canvas is not None
            assert got.staticness is not None
            assert relative(got.canvas, sample.canvas.numpy()) < TOLERANCE
            still = sample.staticness.numpy().reshape(got.staticness.shape)
            assert relative(got.staticness, still) < TOLERANCE


def test_the_flow_temperature_is_the_reference_samplers(
    bundles: Callable[[str], Bundle], clip: np.ndarray
) -> None:
    """By the frame of each video: a rollout whose clock began later draws the same."""
    predictor = canvasmar_rt.load(bundles("unified").path)
    model = load_model(predictor.bundle)
    sampling = dataclasses.replace(
        predictor.sampling, flow_temperature=(0.9, 0.4), temperature_frames=6
    )
    rollout = predictor.start(clip, seed=2, sampling=sampling)
    state = sampler.start(model, sampler.encode(model, torch.from_numpy(clip[None])))
    for _ in range(4):
        noise = sampler.draw_noise(
            predictor.config, sampling, seed=2, streams=[0], frame=state.time
        )
        state, sample = sampler.step(model, sampling, state, noise)
        assert relative(rollout.step().latent, sample.latent.numpy()) < TOLERANCE
    later = predictor.start(clip, seed=2, sampling=sampling, clock=5)
    later.step()
    scale = flow_temperature(sampling, 4)
    plain = np.empty_like(later._program.noise.flow)
    fill_normal(plain, seed=2, streams=[0], frame=9, purpose=Purpose.FLOW)
    np.testing.assert_allclose(later._program.noise.flow, scale * plain, rtol=1e-6)


def test_golden_tensors_hold(predictor: Predictor) -> None:
    engine = predictor.engine
    options = {"engine_dir": engine._directory} if isinstance(engine, TensorRTEngine) else {}
    report = verify(predictor.bundle.path, engine=engine.name, device=engine.device, **options)
    names = set(components(predictor.config))
    if engine.name == "torch":
        names.discard("frame")
    assert set(report["components"]) == names
    assert len(report["drift"]) == math.ceil(32 / predictor.config.group)
    assert max(report["drift"]) < 1e-3
    assert report["flipped_orders"] == 0


def test_warming_up_changes_nothing(predictor: Predictor, clip: np.ndarray) -> None:
    cold, warm = (predictor.start(clip, seed=3) for _ in range(2))
    for i in range(3):
        warm.warmup()
        np.testing.assert_array_equal(warm.step().latent, cold.step().latent, err_msg=str(i))
    state = warm.state()
    for name, array in cold.state().arrays.items():
        np.testing.assert_array_equal(state.arrays[name], array, err_msg=name)


def test_batch_rows_are_separate_videos(predictor: Predictor, clip: np.ndarray) -> None:
    """Batch 8 gives the same eight videos as eight runs of batch 1."""
    together = predictor.start(clip, seed=4, batch=8)
    alone = [predictor.start(clip, seed=4, stream=b) for b in range(8)]
    for _ in range(4):
        batch = together.step()
        for b, rollout in enumerate(alone):
            one = rollout.step()
            np.testing.assert_array_equal(one.order[0], batch.order[b])
            assert relative(one.latent[0], batch.latent[b]) < TOLERANCE
    assert relative(batch.latent[0], batch.latent[1]) > 0.1


def test_a_state_may_be_read_only(predictor: Predictor, clip: np.ndarray) -> None:
    """As arrays of a mapped file or of another library are; warnings are errors here."""
    rollout = predictor.start(clip)
    state = rollout.state()
    want = rollout.step().latent
    for array in (*state.arrays.values(), want):
        array.flags.writeable = False
    rollout.restore(state)
    np.testing.assert_array_equal(rollout.step().latent, want)
    if predictor.config.group == 1:
        rollout.observe_latent(want)


@pytest.mark.parametrize("change", ["shape", "dtype", "name"])
def test_arrays_are_checked_on_the_way_in(predictor: Predictor, change: str) -> None:
    component = predictor.bundle.manifest.components["decoder"]
    engine, memory = predictor.engine, predictor.engine.memory()

    def buffers(tensors: tuple[TensorEntry, ...]) -> dict[str, Buffer]:
        layout = {t.name: ([2 if d == "B" else d for d in t.dims], t.dtype) for t in tensors}
        return dict(memory.group(layout).buffers)

    inputs, outputs = buffers(component.inputs), buffers(component.outputs)
    engine.bind("decoder", inputs, outputs, memory)()
    memory.synchronize()
    latent = inputs.pop("latent")
    inputs[{"name": "latents"}.get(change, "latent")] = {
        "shape": dataclasses.replace(latent, shape=(2, *latent.shape[2:])),
        "dtype": dataclasses.replace(latent, dtype="float16"),
        "name": latent,
    }[change]
    with pytest.raises(InputError, match=r"decoder: .*latent"):
        engine.bind("decoder", inputs, outputs, memory)


def test_unknown_component_is_refused(predictor: Predictor) -> None:
    with pytest.raises(EngineError, match="no component 'encoder2'"):
        predictor.engine.bind("encoder2", {}, {}, predictor.engine.memory())


def test_two_threads_share_a_predictor(predictor: Predictor, clip: np.ndarray) -> None:
    import threading

    want = [[p.latent for p in _rolled(predictor, clip, seed)] for seed in (1, 2)]
    got: dict[int, list[np.ndarray]] = {}

    def work(seed: int) -> None:
        got[seed] = [p.latent for p in _rolled(predictor, clip, seed)]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for seed in (1, 2):
        np.testing.assert_array_equal(got[seed], want[seed - 1])


def test_the_packaged_model_gives_one_video_on_two_engines() -> None:
    """From real frames and under their actions; a residual model adds up what engines round."""
    with np.load(DEMO_CLIP) as demo:
        frames, actions = demo["frames"], demo["actions"]
    t = Bundle.open("toytable").manifest.model.autoencoder.temporal_compression
    rollouts = [
        canvasmar_rt.load("toytable", engine=engine, threads=1).start(frames[: 1 + t], seed=0)
        for engine in ("onnxruntime", "torch")
    ]
    for i in range(t, len(frames) - t, t):
        drawn = [r.step(action=actions[i : i + t].ravel()) for r in rollouts]
        one, two = (r.state().arrays["latent"] for r in rollouts)
        assert np.linalg.norm(one - two) < 1e-3 * np.linalg.norm(two)
        assert np.abs(drawn[0].frames.astype(int) - drawn[1].frames).max() <= 1
    assert i > 16


def _rolled(predictor: Predictor, clip: np.ndarray, seed: int) -> list[canvasmar_rt.Prediction]:
    rollout = predictor.start(clip, seed=seed)
    return [rollout.step() for _ in range(5)]


@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_no_falling_back_to_another_device(bundles: Callable[[str], Bundle], engine: str) -> None:
    if lacking(engine) is None:
        pytest.skip("there is a GPU that it can use")
    with pytest.raises(EngineError, match="cuda"):
        canvasmar_rt.load(bundles("expert").path, engine=engine, device="cuda")


def test_a_plugin_that_is_missing_is_named(bundles: Callable[[str], Bundle]) -> None:
    if importlib.util.find_spec("onnxruntime_ep_nv_tensorrt_rtx"):
        pytest.skip("the TensorRT-RTX plugin is installed")
    path = bundles("expert").path
    with pytest.raises(EngineError, match="pip install onnxruntime-ep-nv-tensorrt-rtx"):
        canvasmar_rt.load(path, device="cuda", provider="tensorrt-rtx")
    with pytest.raises(EngineError, match="provider must be cpu on cpu"):
        canvasmar_rt.load(path, provider="tensorrt-rtx")


def test_unknown_engine_lists_those_there_are(bundles: Callable[[str], Bundle]) -> None:
    with pytest.raises(EngineError, match="onnxruntime, torch, tensorrt"):
        canvasmar_rt.load(bundles("expert").path, engine="onnx")


@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
def test_outputs_that_are_not_written_are_wrong(
    bundles: Callable[[str], Bundle], engine: str
) -> None:
    """Also where the right ones are zeros, as new memory is."""
    made = canvasmar_rt.load(bundles("expert").path, engine=engine).engine
    idle: Any = SimpleNamespace(
        name="idle", bundle=made.bundle, memory=made.memory, bind=lambda *_: lambda: None
    )
    entry = made.bundle.manifest.components["decoder"]
    inputs, outputs = (
        {t.name: np.zeros([1 if d == "B" else d for d in t.dims], t.dtype) for t in tensors}
        for tensors in (entry.inputs, entry.outputs)
    )
    assert not compare_component(idle, "decoder", inputs, outputs).relative <= 1.0


def test_the_worst_output_counts_wherever_it_is() -> None:
    want = {"a": np.ones(4), "b": np.ones(4)}
    bad = np.array([1.0, 1.0, 1.0, -3.0])
    for name in want:
        found = difference(want | {name: bad}, want)
        assert (found.max_abs, found.cosine) == (4.0, 0.0)
        assert found.relative == 2.0
        nan = difference(want | {name: bad * np.nan}, want)
        assert np.isnan([nan.max_abs, nan.relative, nan.cosine]).all()
