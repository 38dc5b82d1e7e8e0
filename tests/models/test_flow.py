"""Flow head: against the adaLN perceptron written in NumPy. Letters as in `canvasmar_rt.config`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from canvasmar_rt.components import components
from canvasmar_rt.config import AutoencoderConfig, FlowConfig, ModelConfig, SamplingConfig
from canvasmar_rt.models.canvasmar import FlowHead
from canvasmar_rt.models.families import build
from canvasmar_rt.models.graphs import CutModulation, graph, put_tokens
from canvasmar_rt.schedule import flow_plan, guidance_branches

Array = npt.NDArray[np.float64]
C, D, W, BLOCKS = 5, 24, 40, 2
MODULATIONS = ("joint", "additive")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def head(modulation: Any) -> FlowHead:
    """Weights away from their defaults."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = FlowHead(C, D, FlowConfig(width=W, blocks=BLOCKS, modulation=modulation)).eval()
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return flow


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- the NumPy oracle


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def linear(x: Array, module: nn.Module) -> Array:
    out = x @ module.weight.double().numpy().T
    return out if module.bias is None else out + module.bias.double().numpy()


def normed(x: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)


def time_embedding(flow: FlowHead, u: float) -> Array:
    """DiT's sinusoids, cosines first, of 1000 u at 128 frequencies 1 .. 1/10000, then an MLP."""
    frequency = 10000.0 ** (-np.arange(128) / 128)
    angle = 1000.0 * u * frequency
    first, _, second = flow.time
    return linear(silu(linear(np.concatenate([np.cos(angle), np.sin(angle)]), first)), second)


def numpy_velocity(flow: FlowHead, x: Array, u: float, z: Array) -> Array:
    """One token: x (C,), z (D,)."""
    t, c = time_embedding(flow, u), linear(z, flow.condition)
    if flow.config.modulation == "joint":
        m = linear(silu(t + c), flow.modulation)
    else:
        m = linear(silu(c), flow.modulation) + linear(silu(t), flow.time_modulation)
    parts = m.reshape(-1, W)
    assert len(parts) == 3 * BLOCKS + 2
    h = linear(x, flow.embed)
    for i in range(BLOCKS):
        shift, scale, gate = parts[3 * i : 3 * i + 3]
        y = normed(h) * flow.norms[i].weight.double().numpy() + flow.norms[i].bias.double().numpy()
        first, _, second = flow.mlps[i]
        h = h + gate * linear(silu(linear(y * (1 + scale) + shift, first)), second)
    shift, scale = parts[-2:]
    return linear(normed(h) * (1 + scale) + shift, flow.out)


# -- velocity


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_velocity_equals_numpy(modulation: str) -> None:
    flow = head(modulation)
    x, z = random(4, C), random(4, D, seed=2)
    times = [0.0, 0.31, 29 / 30, 1.0]
    embedded, condition = flow.embed_time(torch.tensor(times)), flow.embed_condition(z)
    for e, u in enumerate(times):
        got = flow.velocity(x, embedded[e], condition).double().numpy()
        assert got.shape == (4, C)
        for token in range(4):
            want = numpy_velocity(flow, x[token].double().numpy(), u, z[token].double().numpy())
            np.testing.assert_allclose(got[token], want, rtol=1e-4, atol=1e-4)


def test_a_joint_modulation_in_parts_is_the_same_velocity() -> None:
    """As the float32 graphs have it: the last shift behind the output layer, C wide."""
    flow = head("joint")
    x, condition = random(3, C), flow.embed_condition(random(2, 3, D, seed=2))
    time = flow.embed_time(torch.tensor([0.3]))[0]
    parts = CutModulation(flow)(torch.nn.functional.silu(time + condition))
    assert [part.shape[-1] for part in parts] == [W] * (3 * BLOCKS) + [C, W]
    got = flow.modulated(x, parts, shifted=True)
    torch.testing.assert_close(got, flow.velocity(x, time, condition), rtol=1e-4, atol=1e-5)


def test_embed_time_equals_numpy() -> None:
    times = torch.tensor([0.0, 1 / 30, 0.5, 1.0])
    for modulation in MODULATIONS:
        flow = head(modulation)
        got = flow.embed_time(times).double().numpy()
        for e, u in enumerate(times.tolist()):
            want = time_embedding(flow, u)
            if modulation == "additive":
                want = linear(silu(want), flow.time_modulation)
            np.testing.assert_allclose(got[e], want, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_guidance_branches_share_x(modulation: str) -> None:
    """Leading dimensions broadcast: (B, S, C) under conditions (G, B, S, .)."""
    flow = head(modulation)
    x, z = random(2, 6, C), random(3, 2, 6, D, seed=2)
    time = flow.embed_time(torch.tensor([0.4]))[0]
    together = flow.velocity(x, time, flow.embed_condition(z))
    assert together.shape == (3, 2, 6, C)
    for g in range(3):
        alone = flow.velocity(x, time, flow.embed_condition(z[g]))
        torch.testing.assert_close(together[g], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_tokens_are_independent_and_everything_counts(modulation: str) -> None:
    flow = head(modulation)
    x, z = random(6, C), random(6, D, seed=2)
    times = flow.embed_time(torch.tensor([0.4, 0.5]))
    before = flow.velocity(x, times[0], flow.embed_condition(z))
    x2, z2 = x.clone(), z.clone()
    x2[1] *= -1
    z2[4] *= -1
    after = flow.velocity(x2, times[0], flow.embed_condition(z2))
    changed = (after - before).abs().amax(-1) > 1e-4
    assert changed.tolist() == [False, True, False, False, True, False]
    later = flow.velocity(x, times[1], flow.embed_condition(z))
    assert (later - before).abs().amax(-1).min() > 1e-5


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_every_weight_counts(modulation: str) -> None:
    flow = head(modulation)
    x, z = random(3, C), random(3, D, seed=2)

    def run() -> Tensor:
        time = flow.embed_time(torch.tensor([0.7]))[0]
        return flow.velocity(x, time, flow.embed_condition(z))

    before = run()
    for name, parameter in flow.named_parameters():
        kept = parameter.clone()
        parameter.add_(random(*parameter.shape, seed=len(name)))
        assert not torch.equal(run(), before), name
        parameter.copy_(kept)
    assert torch.equal(run(), before)


# -- the component: solver and guidance around the velocity


def model_config(modulation: Any) -> ModelConfig:
    return ModelConfig(
        name="tiny",
        autoencoder=AutoencoderConfig(
            height=8, width=8, temporal_compression=2, latent_channels=C, widths=(8,)
        ),
        flow=FlowConfig(width=W, blocks=BLOCKS, modulation=modulation),
        dim=D,
        heads=1,
        temporal_layers=1,
        canvas_layers=1,
        spatial_layers=2,
        encoder_layers=1,
        context_frames=2,
    )


@pytest.mark.parametrize("modulation", MODULATIONS)
@pytest.mark.parametrize("solver", ["euler", "heun", "ab2"])
def test_component_integrates_the_guided_velocity(modulation: str, solver: Any) -> None:
    """Textbook solvers over the NumPy velocity, token by token, with eq. 9 inside."""
    model = build(model_config(modulation))
    for parameter in model.flow.parameters():
        parameter.add_(0.05 * random(*parameter.shape))
    w_t, w_s, steps = 1.2, 1.5, 3
    sampling = SamplingConfig(
        solver=solver, flow_steps=steps, temporal_guidance=w_t, canvas_guidance=w_s
    )
    branches, plan = guidance_branches(sampling, has_canvas=True), flow_plan(sampling)
    tokens = 16
    z = random(3, 2, 4, D, seed=3)  # branches: temporal + canvas, temporal, none
    select = torch.tensor([[3, 0, 9, 15], [7, 8, 1, 2]])
    noise, partial = random(2, tokens, C, seed=4), random(2, tokens, C, seed=5)
    tensors = {
        "z_tokens": z,
        "branch_weight": torch.from_numpy(branches.weight),
        "select_index": select,
        "flow_noise": noise,
        "flow_time": torch.from_numpy(plan.time),
        "step_new": torch.from_numpy(plan.step_new),
        "step_old": torch.from_numpy(plan.step_old),
        "partial": partial,
    }
    names = [t.name for t in components(model.config)["flow"].inputs]
    (got,) = graph(model, "flow")(*(tensors[name] for name in names))
    dt = 1 / steps
    for row in range(2):
        for s, position in enumerate(select[row].tolist()):

            def guided(x: Array, u: float, row: int = row, s: int = s) -> Array:
                v_ts, v_t, v_0 = (
                    numpy_velocity(model.flow, x, u, z[g, row, s].double().numpy())
                    for g in range(3)
                )
                return v_0 + w_t * (v_t - v_0) + w_s * (v_ts - v_t)

            x, past = noise[row, position].double().numpy(), None
            for i in range(steps):
                v = guided(x, i * dt)
                if solver == "heun":
                    x = x + dt / 2 * (v + guided(x + dt * v, (i + 1) * dt))
                elif solver == "ab2" and past is not None:
                    x = x + dt * (1.5 * v - 0.5 * past)
                else:
                    x = x + dt * v
                past = v
            np.testing.assert_allclose(got[row, position], x, rtol=1e-3, atol=1e-3)
        others = [j for j in range(tokens) if j not in select[row].tolist()]
        assert torch.equal(got[row, others], partial[row, others])


def test_put_tokens_leaves_the_partial_frame_alone() -> None:
    partial, index = random(2, 6, C), torch.tensor([[5, 0], [2, 3]])
    before, tokens = partial.clone(), random(2, 2, C, seed=2)
    out = put_tokens(partial, index, tokens)
    assert torch.equal(partial, before)
    for row in range(2):
        for i in range(2):
            before[row, index[row, i]] = tokens[row, i]
    assert torch.equal(out, before)


def test_the_flow_table_is_no_weight() -> None:
    """Frequencies are constants: a checkpoint does not hold them, fp16 models keep float32."""
    flow = head("joint")
    assert not any("frequency" in name for name in flow.state_dict())
    want = 10000.0 ** (-np.arange(128) / 128)
    np.testing.assert_allclose(flow.frequency.double().numpy(), want, rtol=1e-6)
    assert dataclasses.asdict(flow.config)["width"] == W
