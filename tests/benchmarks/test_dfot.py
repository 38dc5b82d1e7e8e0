"""The DFoT baseline: its size, its network and sampler against NumPy, and its runners."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

import canvasmar_rt
from canvasmar_rt.benchmarks import dfot
from canvasmar_rt.benchmarks.dfot import (
    DfotConfig,
    DfotContestant,
    Guidance,
    Schedule,
    dfot_for,
    make_runner,
    schedule,
)
from canvasmar_rt.benchmarks.dfot_model import (
    Dfot,
    DfotStep,
    build_dfot,
    evaluation_flops,
    parameters,
    rotary_tables,
)
from canvasmar_rt.bundle import Bundle
from canvasmar_rt.cli import DEMO_CLIP
from canvasmar_rt.components import autoencoder_states
from canvasmar_rt.config import preset
from canvasmar_rt.engines.onnxruntime_engine import OnnxRuntimeEngine
from canvasmar_rt.engines.torch_engine import load_model
from canvasmar_rt.errors import ConfigError, EngineError, InputError
from canvasmar_rt.models import sampler
from canvasmar_rt.noise import Purpose, fill_normal
from canvasmar_rt.rollout import Predictor

TINY = DfotConfig(width=144, layers=2, heads=2, frames=3, grid=(4, 2), channels=4)
GUIDANCES: tuple[Guidance, ...] = ("conditional", "vanilla")

# -- size


def test_xl_is_the_published_one() -> None:
    config = dfot_for(preset("kinetics600")[0])
    assert config == DfotConfig(
        width=1152, layers=28, heads=16, frames=5, grid=(16, 16), channels=16
    )
    assert parameters(config) == pytest.approx(673.7e6, rel=0.005)
    assert evaluation_flops(config) == pytest.approx(1.36e12, rel=0.005)
    per_token = dataclasses.replace(config, modulation="token")
    assert evaluation_flops(per_token) == pytest.approx(1.93e12, rel=0.005)


def test_other_sizes_and_models_are_scaled() -> None:
    kinetics, bair, toytable = (preset(n)[0] for n in ("kinetics600", "bair", "toytable"))
    found = {s: dfot_for(kinetics, s) for s in dfot.SIZES}
    assert {s: (c.width, c.layers, c.heads) for s, c in found.items()} == {
        "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)
    }  # fmt: skip
    # three quarters of the width, half the layers
    assert dfot_for(bair) == DfotConfig(
        width=864, layers=14, heads=12, frames=9, grid=(16, 16), channels=16
    )
    small = dfot_for(toytable, "S")  # a width of 72 becomes a head's 64
    assert (small.width, small.layers, small.heads) == (64, 3, 1)
    with pytest.raises(ConfigError, match="sizes are S, B, L, XL"):
        dfot_for(kinetics, "M")


# -- the network


def numpy_dfot(network: Dfot, x: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """v of x (T, N, C) at levels (T,), in float64: rotation of complex numbers, one head and one
    frame's modulation at a time."""
    w = {k: p.double().numpy() for k, p in network.state_dict().items()}
    c = network.config
    t, (rows, columns) = c.frames, c.grid
    tokens, head_dim = rows * columns, c.width // c.heads

    def linear(name: str, y: np.ndarray) -> np.ndarray:
        return y @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def silu(y: np.ndarray) -> np.ndarray:
        return y / (1 + np.exp(-y))

    def norm(y: np.ndarray) -> np.ndarray:
        return (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)

    def gelu(y: np.ndarray) -> np.ndarray:
        return 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))

    phase = np.zeros((t * tokens, head_dim // 2))
    third = head_dim // 6
    for i in range(t * tokens):
        place = i // tokens, i % tokens // columns, i % columns
        for axis in range(3):
            for j in range(third):
                phase[i, axis * third + j] = place[axis] * 10000.0 ** (-j / third)
    turn = np.exp(1j * phase)

    def rotated(y: np.ndarray) -> np.ndarray:
        z = (y[:, : head_dim // 2] + 1j * y[:, head_dim // 2 :]) * turn
        return np.concatenate([z.real, z.imag], axis=1)

    angle = levels[:, None] * 10000.0 ** (-np.arange(128) / 128)
    sinusoids = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    condition = silu(linear("level.2", silu(linear("level.0", sinusoids))))

    def by_frame(name: str, count: int) -> list[np.ndarray]:
        """Shift, scale, gate ... of every token, (L, D) each."""
        per_frame = linear(name, condition).reshape(t, count, c.width)
        return [np.repeat(per_frame[:, i], tokens, axis=0) for i in range(count)]

    h = linear("embed", x.reshape(t * tokens, -1))
    for i in range(c.layers):
        shift, scale, gate, shift2, scale2, gate2 = by_frame(f"blocks.{i}.modulation", 6)
        qkv = linear(f"blocks.{i}.attention.qkv", norm(h) * (1 + scale) + shift)
        heads = []
        for k in range(c.heads):
            q, key, v = (qkv[:, part * c.width + k * head_dim :][:, :head_dim] for part in range(3))
            score = np.exp(rotated(q) @ rotated(key).T / np.sqrt(head_dim))
            heads.append(score / score.sum(-1, keepdims=True) @ v)
        h = h + gate * linear(f"blocks.{i}.attention.out", np.concatenate(heads, axis=1))
        inside = linear(f"blocks.{i}.mlp.0", norm(h) * (1 + scale2) + shift2)
        h = h + gate2 * linear(f"blocks.{i}.mlp.2", gelu(inside))
    shift, scale = by_frame("modulation", 2)
    return linear("out", norm(h) * (1 + scale) + shift).reshape(t, tokens, -1)


def test_the_network_against_numpy() -> None:
    network = build_dfot(TINY, seed=1)
    rng = np.random.default_rng(0)
    x, levels = rng.normal(size=(2, 3, 8, 4)), np.array([[0.0, 719.0, 719.0], [999.0, 0.0, 19.0]])
    v = network(torch.from_numpy(x).float(), torch.from_numpy(levels).float()).numpy()
    wanted = np.stack([numpy_dfot(network, x[i], levels[i]) for i in range(2)])
    np.testing.assert_allclose(v, wanted, atol=2e-5 * np.abs(wanted).max())


def test_a_head_that_three_axes_do_not_divide() -> None:
    config = dataclasses.replace(TINY, width=64, heads=1)
    cos, sin = rotary_tables(config)
    assert cos.shape == (24, 32)
    np.testing.assert_allclose(cos**2 + sin**2, 1.0, rtol=1e-6)
    turned = [np.flatnonzero(sin[token]).tolist() for token in (8, 2, 1)]  # one frame, row, column
    assert turned == [list(range(10)), list(range(10, 21)), list(range(21, 32))]


def test_modulation_per_token_is_the_same_function() -> None:
    network = build_dfot(TINY)
    x, levels = torch.randn(2, 3, 8, 4), torch.tensor([[0.0, 99.0, 999.0], [500.0, 499.0, 0.0]])
    per_frame = network(x, levels)
    network.config = dataclasses.replace(TINY, modulation="token")
    torch.testing.assert_close(network(x, levels), per_frame, rtol=1e-5, atol=1e-6)


def test_narrow_weights_keep_the_tables() -> None:
    x, levels = torch.randn(1, 3, 8, 4), torch.tensor([[0.0, 979.0, 999.0]])
    wanted = build_dfot(TINY)(x, levels)
    for dtype in (torch.float16, torch.bfloat16):
        network = build_dfot(TINY, dtype=dtype)
        assert network.cos.dtype == torch.float32
        found = network(x, levels)
        assert found.dtype == torch.float32
        assert float((found - wanted).norm() / wanted.norm()) < 0.03


# -- the sampler


class Ideal(torch.nn.Module):
    """The best v there is for data whose values are normal with this mean and deviation."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        angle = np.pi / 2 * ((levels.double() + 1) / 1000 + 0.008) / 1.008
        a = (torch.cos(angle) / np.cos(np.pi / 2 * 0.008 / 1.008))[..., None, None]
        s = torch.sqrt(1 - a**2)
        gain = a * self.std**2 / (a**2 * self.std**2 + s**2)
        clean = self.mean + gain * (x - a * self.mean)
        return a * (x - a * clean) / s - s * clean


def denoised(
    network: torch.nn.Module, x: torch.Tensor, plan: Schedule, noise: torch.Tensor | None = None
) -> torch.Tensor:
    tables = [torch.from_numpy(values) for values in plan.inputs().values()]
    step, index = DfotStep(network), torch.zeros(1, dtype=torch.int64)
    with torch.inference_mode():
        for _ in plan.keep:
            x, index = step(x, index, *tables, *([] if noise is None else [noise]))
    assert int(index) == len(plan.keep)
    return x


def test_the_ideal_network_leads_from_noise_to_the_data() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 5, dtype=torch.float64)
    point = denoised(Ideal(1.2, 0.0), x, schedule(3, 1, "conditional"))
    assert torch.equal(point[:, 0], x[:, 0])  # the history, to the bit
    torch.testing.assert_close(point[:, 1:], torch.full_like(x[:, 1:], 1.2), atol=1e-5, rtol=0)
    errors = []
    for steps in (50, 200):  # without noise of its own DDIM maps quantiles to quantiles
        found = denoised(Ideal(1.2, 0.4), x, schedule(3, 1, "conditional", steps=steps))
        errors.append(float((found - (1.2 + 0.4 * x))[:, 1:].abs().max()))
    assert errors[0] < 0.05
    assert errors[1] < errors[0] / 2


def test_the_schedule_is_the_published_one() -> None:
    plan = schedule(5, 2, "vanilla")
    assert plan.levels.shape == (50, 2, 5)
    assert plan.levels[:, 0, -1].tolist() == list(range(999, 0, -20))
    assert (plan.levels[:, 0, :2] == 0).all()
    assert (plan.levels[:, 1, :2] == 999).all()
    assert (plan.levels[:, 0, 2:] == plan.levels[:, 1, 2:]).all()
    a = np.cos(np.pi / 2 * (np.arange(1000, -1, -20) / 1000 + 0.008) / 1.008)
    phase = np.arccos(a / a[-1])  # each update turns (x, v) by so much
    np.testing.assert_allclose(plan.keep[:, -1], np.cos(np.diff(phase)), atol=1e-6)
    np.testing.assert_allclose(plan.move[:, -1], np.sin(np.diff(phase)), atol=1e-6)


class Spy(torch.nn.Module):
    """v is the mean of the history and the level it is said to have."""

    def forward(self, x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        return (x[:, :1].mean((1, 2, 3)) + levels[:, 0])[:, None, None, None].expand_as(x)


def test_vanilla_guidance_goes_beyond_the_history() -> None:
    x, noise = torch.randn(2, 3, 8, 4), torch.randn(2, 3, 8, 4)
    plan = schedule(3, 1, "vanilla", steps=2)
    found = denoised(Spy(), x, plan, noise)
    with_history = x[:, :1].mean((1, 2, 3))
    without = noise[:, :1].mean((1, 2, 3)) + 999
    v = (without + dfot.VANILLA_SCALE * (with_history - without))[:, None, None]
    for frame in (1, 2):
        wanted = x[:, frame]
        for keep, move in zip(plan.keep[:, frame], plan.move[:, frame], strict=True):
            wanted = keep * wanted + move * v
        torch.testing.assert_close(found[:, frame], wanted, rtol=1e-5, atol=1e-3)
    assert torch.equal(found[:, 0], x[:, 0])


# -- runners and the contestant

PLACES = [
    ("onnxruntime", "cpu"),
    ("torch", "cpu"),
    pytest.param(
        ("onnxruntime", "cuda"),
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(
                "CUDAExecutionProvider" not in ort.get_available_providers(),
                reason=f"onnxruntime {ort.__version__} has no CUDA provider",
            ),
        ],
    ),
    pytest.param(
        ("torch", "cuda"),
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(
                not torch.cuda.is_available(), reason=f"PyTorch {torch.__version__} has no GPU"
            ),
        ],
    ),
]


@pytest.fixture(params=PLACES, ids="-".join)
def predictor(request: pytest.FixtureRequest) -> Predictor:
    engine, device = request.param
    return canvasmar_rt.load("toytable", engine=engine, device=device, threads=1)


@pytest.fixture(scope="module")
def toys() -> np.ndarray:
    """A packaged clip, uint8 (T, 64, 64, 3)."""
    with np.load(DEMO_CLIP) as archive:
        return archive["frames"]


def chunk_noise(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """What a rollout would draw for its flow, for every frame of a chunk (B, T, N, C)."""
    out = np.zeros(shape, np.float32)
    for frame in range(shape[1]):
        fill_normal(
            out[:, frame], seed=seed, streams=range(shape[0]), frame=frame, purpose=Purpose.FLOW
        )
    return torch.from_numpy(out)


def test_a_clip_is_what_pytorch_makes_of_it(predictor: Predictor, toys: np.ndarray) -> None:
    # between the engines both kinds of guidance; one export is enough
    guidance: Guidance = "vanilla" if predictor.engine.name == "torch" else "conditional"
    contestant = DfotContestant(predictor, toys[:7], batch=2, size="S", guidance=guidance, seed=4)
    model, config = load_model(predictor.bundle), dfot_for(predictor.config, "S")
    latents = sampler.encode(model, torch.from_numpy(toys[None, :7]))
    noise = chunk_noise((2, 6, 64, model.config.autoencoder.latent_channels), seed=4)
    x = torch.cat([latents.expand(2, -1, -1, -1), noise[:, 4:]], dim=1)
    passes = noise if guidance == "vanilla" else None
    x = denoised(build_dfot(config, seed=4), x, schedule(6, 4, guidance), passes)
    states = [
        torch.zeros(2, *s) for s in autoencoder_states(predictor.config.autoencoder, decoder=True)
    ]
    with torch.inference_mode():
        pixels = model.autoencoder.decode(x, states)[0].numpy()[:, 8:]
    for _ in range(2):  # it goes back to the context
        contestant.latents[...] = 0
        contestant.frames[...] = 0
        played = contestant.play(2)
        wanted = x[:, 4:].numpy()
        assert np.abs(contestant.latents - wanted).max() < 1e-3 * np.abs(wanted).max()
        off = contestant.frames.reshape(pixels.shape).astype(int) - pixels
        assert np.abs(off).max() <= 1
    assert played.decoding is not None
    assert len(played.ready) == len(played.decoding) == 2
    before = played.parts["noise"] + played.parts["denoise"]
    assert before < played.ready[0] < played.ready[1]
    assert played.decoding[0] < played.decoding[1] < played.ready[1] - before
    assert contestant.described["parameters"] == parameters(config)
    assert contestant.described["device"] == predictor.engine.device


def test_an_odd_number_of_steps(predictor: Predictor) -> None:
    config = dataclasses.replace(TINY, layers=1)
    plan = schedule(3, 2, "vanilla", steps=3)
    runner = make_runner(predictor, config, "vanilla", plan, batch=1, seed=2)
    x, noise = torch.randn(1, 3, 8, 4), torch.randn(1, 3, 8, 4)
    assert runner.noise is not None
    runner.x[...], runner.noise[...] = x.numpy(), noise.numpy()
    wanted = denoised(build_dfot(config, seed=2), x, plan, noise).numpy()
    np.testing.assert_allclose(runner.denoise(), wanted, atol=1e-4 * np.abs(wanted).max())


def test_an_int8_model_gets_an_int8_baseline() -> None:
    packaged = canvasmar_rt.load("toytable", threads=1)
    manifest = dataclasses.replace(packaged.bundle.manifest, quantization="int8")
    predictor = Predictor(OnnxRuntimeEngine(Bundle(packaged.bundle.path, manifest), threads=1))
    config, plan = (
        dataclasses.replace(TINY, layers=1, width=192),
        schedule(3, 1, "conditional", steps=4),
    )
    x = torch.randn(1, 3, 8, 4)
    runner = make_runner(predictor, config, "conditional", plan, batch=1, seed=2)
    runner.x[...] = x.numpy()
    wanted = denoised(build_dfot(config, seed=2), x, plan).numpy()
    off = np.linalg.norm(runner.denoise() - wanted) / np.linalg.norm(wanted)
    assert 1e-5 < off < 0.02


def test_what_it_cannot_play(toys: np.ndarray) -> None:
    predictor = canvasmar_rt.load("toytable", engine="torch")
    contestant = DfotContestant(predictor, toys[:5], batch=1, size="S")
    with pytest.raises(ConfigError, match="denoises 6 latent frames at once and 3 are given"):
        contestant.play(2)
    for frames in (4, 11):
        with pytest.raises(InputError, match=r"1 \+ n\*2 frames .* at most 9; got"):
            DfotContestant(predictor, toys[:frames], batch=1)
    other: Any = SimpleNamespace(
        engine=SimpleNamespace(name="tensorrt"), config=predictor.config, start=predictor.start
    )
    with pytest.raises(EngineError, match="onnxruntime and torch, not on tensorrt"):
        DfotContestant(other, toys[:3], batch=1)


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
import numpy as np
import canvasmar_rt
from canvasmar_rt.benchmarks.dfot import DfotContestant
from canvasmar_rt.errors import EngineError
try:
    DfotContestant(canvasmar_rt.load("toytable"), np.zeros((3, 64, 64, 3), np.uint8), batch=1)
except EngineError as error:
    print(error)
"""


def test_without_pytorch_it_says_what_to_install(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == (
        'the DFoT baseline needs torch: pip install "canvasmar-rt[export]"'
    ), done.stderr
