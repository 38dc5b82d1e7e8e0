"""What every engine must do, run on every engine and every kind of model."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import numpy as np
import pytest
import torch

import canvasmar_rt
from canvasmar_rt.bundle import Bundle
from canvasmar_rt.components import components
from canvasmar_rt.engines.memory import Buffer, host_buffer
from canvasmar_rt.engines.torch_engine import load_model
from canvasmar_rt.errors import EngineError, InputError
from canvasmar_rt.models import sampler
from canvasmar_rt.rollout import Predictor
from canvasmar_rt.verify import verify

TOLERANCE = 1e-4
CPU_ENGINES = ("onnxruntime", "torch")
CASES = [(e, v) for e in CPU_ENGINES for v in ("expert", "mmdit", "no-canvas")]


@pytest.fixture(params=CASES, ids=lambda c: f"{c[0]}-{c[1]}")
def predictor(request: pytest.FixtureRequest, bundles: Callable[[str], Bundle]) -> Predictor:
    engine, variant = request.param
    return canvasmar_rt.load(bundles(variant).path, engine=engine)


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("from_clip", [True, False], ids=["clip", "nothing"])
def test_rollout_equals_the_reference_sampler(
    predictor: Predictor, clip: np.ndarray, from_clip: bool
) -> None:
    """Same seed: same token order, latents and frames, past the point where the ring wraps."""
    model = load_model(predictor.bundle)
    takes_actions = predictor.config.action_dim > 0
    rng = np.random.default_rng(0)
    if from_clip:
        video = torch.from_numpy(np.stack([clip, clip[::-1]]))
        told = rng.standard_normal((2, 3, 4)).astype(np.float32) if takes_actions else None
        rollout = predictor.start(video.numpy(), seed=11, batch=2, actions=told)
        latents = sampler.encode(model, video)
        state = sampler.start(model, latents, None if told is None else torch.from_numpy(told))
    else:
        rollout = predictor.start(seed=11, batch=2)
        state = sampler.empty_state(model, 2)
    for i in range(7):
        action = rng.standard_normal((2, 4)).astype(np.float32) if takes_actions and i % 2 else None
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
            assert relative(got.staticness.reshape(2, -1), sample.staticness.numpy()) < TOLERANCE


def test_golden_tensors_hold(predictor: Predictor) -> None:
    report = verify(predictor.bundle.path, engine=predictor.engine.name)
    names = set(components(predictor.config))
    if predictor.engine.name == "torch":
        names.remove("frame")
    assert set(report["components"]) == names
    assert len(report["drift"]) == 32
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


@pytest.mark.parametrize("change", ["shape", "dtype", "name"])
def test_arrays_are_checked_on_the_way_in(predictor: Predictor, change: str) -> None:
    component = predictor.bundle.manifest.components["decoder"]
    sizes = {"B": 2}

    def arrays(tensors: tuple) -> dict[str, np.ndarray]:
        return {t.name: np.zeros([sizes.get(d, d) for d in t.dims], t.dtype) for t in tensors}

    def buffers(given: dict[str, np.ndarray]) -> dict[str, Buffer]:
        return {name: host_buffer(x) for name, x in given.items()}

    engine, memory = predictor.engine, predictor.engine.memory()
    inputs, outputs = arrays(component.inputs), arrays(component.outputs)
    engine.bind("decoder", buffers(inputs), buffers(outputs), memory)()
    latent = inputs.pop("latent")
    inputs[{"name": "latents"}.get(change, "latent")] = {
        "shape": latent[:, :-1].copy(),
        "dtype": latent.astype(np.float64),
        "name": latent,
    }[change]
    with pytest.raises(InputError, match=r"decoder: .*latent"):
        engine.bind("decoder", buffers(inputs), buffers(outputs), memory)


def test_buffers_lie_in_one_piece() -> None:
    array = np.zeros((4, 6), np.float32)
    for bad in (array.T, array[:, :3], np.broadcast_to(array[0], (2, 6))):
        with pytest.raises(InputError, match="C-contiguous"):
            host_buffer(bad)


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


def _rolled(predictor: Predictor, clip: np.ndarray, seed: int) -> list[canvasmar_rt.Prediction]:
    rollout = predictor.start(clip, seed=seed)
    return [rollout.step() for _ in range(5)]


@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_no_falling_back_to_another_device(bundles: Callable[[str], Bundle], engine: str) -> None:
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
