"""The reference sampler: a pure function, equal to a rollout written out by hand.

The hand-written rollout keeps whole sequences: the Temporal ViT over all frames at once, a spatial
pass for each guidance branch, Euler steps in a loop and the whole clip through the decoder.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from canvasmar_rt.components import autoencoder_states
from canvasmar_rt.config import AutoencoderConfig, FlowConfig, ModelConfig, SamplingConfig
from canvasmar_rt.errors import ConfigError
from canvasmar_rt.models import sampler
from canvasmar_rt.models.canvasmar import CanvasMAR
from canvasmar_rt.models.families import build
from canvasmar_rt.models.sampler import FrameNoise, Sample, State
from canvasmar_rt.noise import Purpose, fill_gumbel, fill_normal
from canvasmar_rt.schedule import set_sizes, time_rotation

N, C, D = 16, 4, 32
PLAIN = SamplingConfig(
    ar_steps=3, flow_steps=4, temporal_guidance=1.0, canvas_guidance=1.0, temperature=2.0
)
GUIDED = dataclasses.replace(PLAIN, temporal_guidance=1.3, canvas_guidance=1.7)


def config(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "name": "tiny",
        "autoencoder": AutoencoderConfig(
            height=16, width=16, temporal_compression=2, latent_channels=C, widths=(8, 16), blocks=1
        ),
        "flow": FlowConfig(width=24, blocks=2),
        "dim": D,
        "heads": 2,
        "temporal_layers": 2,
        "canvas_layers": 1,
        "spatial_layers": 3,
        "encoder_layers": 1,
        "context_frames": 3,
    }
    return ModelConfig(**values | changes)


VARIANTS = {
    "expert": config(),
    "mmdit-isolated-actions": config(
        norm="mmdit",
        condition_attention="isolated",
        action_dim=2,
        residual=True,
        flow=FlowConfig(width=24, blocks=2, modulation="additive"),
    ),
    "no-canvas": config(canvas=False, norm="shared", action_dim=2),
}


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> CanvasMAR:
    return make(VARIANTS[request.param])


def make(c: ModelConfig) -> CanvasMAR:
    model = build(c)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.autoencoder.latent_std.fill_(1.5)
        model.autoencoder.latent_mean.fill_(-0.2)
    return model


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def context(frames: int = 5, batch: int = 2) -> Tensor:
    """Latents of more frames than the ring holds."""
    return random(batch, frames, N, C, seed=2)


def actions_of(model: CanvasMAR, count: int, batch: int = 2) -> Tensor | None:
    size = model.config.action_dim
    return random(batch, count, size, seed=3) if size else None


def noise_of(
    model: CanvasMAR, sampling: SamplingConfig, frame: int, streams: Any = (0, 1), seed: int = 7
) -> FrameNoise:
    return sampler.draw_noise(model.config, sampling, seed=seed, streams=streams, frame=frame)


def tensors(value: State | FrameNoise | Sample) -> list[Tensor]:
    """All tensors of a state, noise or sample, in order."""
    found: list[Tensor] = []
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        found += [t for t in (item if isinstance(item, tuple) else (item,)) if torch.is_tensor(t)]
    return found


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


# -- the rollout by hand


@torch.inference_mode()
def by_hand(
    model: CanvasMAR,
    sampling: SamplingConfig,
    latents: Tensor,
    noise: FrameNoise,
    actions: Tensor | None,
) -> Sample:
    """The frame after `latents` (B, n, N, C); `actions` (B, n, A) lead to frames 1..n."""
    batch, n = latents.shape[:2]
    c = model.config
    seen = torch.cat([torch.zeros(batch, 1, N, C), latents], 1)
    is_first = torch.zeros(batch, n + 1)
    is_first[:, 0] = 1
    told = given = None
    if c.action_dim:
        assert actions is not None
        told = torch.cat([torch.zeros(batch, 1, c.action_dim), actions], 1)
        given = 1 - is_first
    times = np.stack([time_rotation(i, c.time_rotary_pairs) for i in range(n + 1)])
    z_t = model.temporal(seen, is_first, told, given, torch.from_numpy(times))[:, -1]

    z_c, canvas, staticness = None, None, None
    if model.canvas is not None:
        r, r2 = sampling.frame_noise, sampling.canvas_noise
        noised = latents[:, -1] * (1 - r) + noise.frame * r
        z_c, canvas, staticness = model.canvas(z_t, noised, torch.zeros_like(noised))
        if c.residual:
            canvas = canvas + latents[:, -1]
        z_c = z_c * (1 - r2) + noise.canvas * r2

    sizes = set_sizes(N, sampling.ar_steps)
    drawn: list[list[int]] = [[] for _ in range(batch)]
    latent = torch.zeros(batch, N, C)
    no_temporal = model.spatial.no_temporal.expand_as(z_t)
    mask = model.spatial.mask.expand(batch, N, D)
    for k, size in enumerate(sizes, start=1):
        left = [[j for j in range(N) if j not in row] for row in drawn]
        for b in range(batch):
            gumbel = noise.order[b, k - 1]
            score = gumbel.clone()
            if staticness is not None:
                tau = sampling.temperature * k / sampling.ar_steps
                score = staticness[b].log() + tau * gumbel
            left[b].sort(key=lambda j: -float(score[j]))
        rest, known = torch.tensor(left), torch.tensor(drawn).long()

        def embeddings(
            condition: Tensor,
            tokens: Tensor,
            rest: Tensor = rest,
            known: Tensor = known,
            size: int = size,
        ) -> Tensor:
            cond = (
                model.spatial.condition_keys_values(condition)
                if model.spatial.isolated
                else condition
            )
            more = ()
            if known.numel():
                more = (torch.stack([latent[b, known[b]] for b in range(batch)]), known)
            return model.spatial(cond, tokens, rest, rest.shape[1], *more)[:, :size]

        w_t, w_s = sampling.temporal_guidance, sampling.canvas_guidance
        z_0, z_1 = embeddings(no_temporal, mask), embeddings(z_t, mask)
        z_2 = None if z_c is None else embeddings(z_t, z_c)
        x = torch.stack([noise.flow[b, rest[b, :size]] for b in range(batch)])
        for i in range(sampling.flow_steps):
            time = model.flow.embed_time(torch.tensor([i / sampling.flow_steps]))[0]
            v_0, v_1, v_2 = (
                None if z is None else model.flow.velocity(x, time, model.flow.embed_condition(z))
                for z in (z_0, z_1, z_2)
            )
            assert v_0 is not None
            assert v_1 is not None
            v = v_0 + w_t * (v_1 - v_0)
            if v_2 is not None:
                v = v + w_s * (v_2 - v_1)
            x = x + v / sampling.flow_steps
        for b in range(batch):
            for s in range(size):
                token = int(rest[b, s])
                latent[b, token] = x[b, s] + (latents[b, -1, token] if c.residual else 0)
            drawn[b] += rest[b, :size].tolist()

    ae = model.autoencoder
    states = [torch.zeros(batch, *s) for s in autoencoder_states(c.autoencoder, decoder=True)]
    frames, _ = ae.decode(torch.cat([latents, latent[:, None]], 1), states)
    return Sample(
        frames=frames[:, -c.autoencoder.temporal_compression :],
        latent=latent,
        canvas=canvas,
        staticness=staticness,
        order=torch.tensor(drawn),
    )


def close(got: Sample, want: Sample) -> None:
    assert torch.equal(got.order, want.order)
    torch.testing.assert_close(got.latent, want.latent, rtol=1e-3, atol=2e-4)
    assert (got.canvas is None) == (want.canvas is None)
    if got.canvas is not None:
        torch.testing.assert_close(got.canvas, want.canvas, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got.staticness, want.staticness, rtol=1e-4, atol=1e-4)
    assert got.frames.dtype == torch.uint8
    assert got.frames.shape == want.frames.shape
    assert (got.frames.int() - want.frames.int()).abs().max() <= 1


@pytest.mark.parametrize("sampling", [PLAIN, GUIDED], ids=["one-branch", "three-branches"])
def test_rollout_equals_the_one_by_hand(model: CanvasMAR, sampling: SamplingConfig) -> None:
    """From one and from five context frames; the ring of three wraps in both."""
    for first in (1, 5):
        latents = context(first)
        actions = actions_of(model, first + 2)
        before = None if actions is None else actions[:, : first - 1]
        state = sampler.start(model, latents, before)
        assert state.time == first
        for step in range(3):
            noise = noise_of(model, sampling, first + step)
            n = latents.shape[1]
            action = None if actions is None else actions[:, n - 1]
            state, got = sampler.step(model, sampling, state, noise, action)
            past = None if actions is None else actions[:, :n]
            close(got, by_hand(model, sampling, latents, noise, past))
            # follow the sampler's latents, so that rounding does not add up
            latents = torch.cat([latents, got.latent[:, None]], 1)
            assert torch.equal(state.latent, got.latent)
        assert state.time == first + 3


def test_guidance_changes_the_frame(model: CanvasMAR) -> None:
    state = sampler.start(model, context())
    noise = noise_of(model, PLAIN, 5)
    _, plain = sampler.step(model, PLAIN, state, noise)
    _, guided = sampler.step(model, GUIDED, state, noise)
    assert torch.equal(plain.order, guided.order)
    assert (plain.latent - guided.latent).abs().max() > 1e-3


# -- purity


def test_a_step_is_pure(model: CanvasMAR) -> None:
    state = sampler.start(model, context(), actions_of(model, 4))
    noise = noise_of(model, GUIDED, 5)
    action = actions_of(model, 1)
    action = None if action is None else action[:, 0]
    kept = [t.clone() for t in (*tensors(state), *tensors(noise))]
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    first_state, first = sampler.step(model, GUIDED, state, noise, action)
    torch.manual_seed(12345)  # no hidden generator
    second_state, second = sampler.step(model, GUIDED, state, noise, action)
    assert same(first, second)
    assert same(first_state, second_state)
    assert first_state.time == second_state.time == state.time + 1
    now = (*tensors(state), *tensors(noise))
    assert all(torch.equal(a, b) for a, b in zip(now, kept, strict=True))
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


@torch.inference_mode()
def test_states_do_not_share_memory(model: CanvasMAR) -> None:
    """Forks of a rollout are independent, whatever is done to one of them."""
    state = sampler.start(model, context())
    noise = noise_of(model, PLAIN, 5)
    one, _ = sampler.step(model, PLAIN, state, noise)
    two, _ = sampler.step(model, PLAIN, state, noise)
    kept = [t.clone() for t in tensors(two)]
    for tensor in tensors(one):
        tensor.fill_(7.0)
    assert all(torch.equal(a, b) for a, b in zip(tensors(two), kept, strict=True))


def test_a_rollout_can_be_resumed_and_forked(model: CanvasMAR) -> None:
    def roll(state: State, frames: range) -> tuple[State, list[Sample]]:
        out = []
        for frame in frames:
            state, sample = sampler.step(model, PLAIN, state, noise_of(model, PLAIN, frame))
            out.append(sample)
        return state, out

    start = sampler.start(model, context())
    _, straight = roll(start, range(5, 9))
    middle, first = roll(start, range(5, 7))
    _, second = roll(middle, range(7, 9))
    for a, b in zip(straight, first + second, strict=True):
        assert same(a, b)
    _, other = sampler.step(model, PLAIN, middle, noise_of(model, PLAIN, 7, seed=8))
    assert not torch.equal(other.latent, straight[2].latent)


@pytest.mark.parametrize("part", ["flow", "frame", "canvas", "order"])
def test_every_noise_counts(part: str) -> None:
    model = make(VARIANTS["expert"])
    state = sampler.start(model, context())
    noise, other = noise_of(model, PLAIN, 5), noise_of(model, PLAIN, 5, seed=8)
    _, before = sampler.step(model, PLAIN, state, noise)
    changed = dataclasses.replace(noise, **{part: getattr(other, part)})
    _, after = sampler.step(model, PLAIN, state, changed)
    assert (before.latent - after.latent).abs().max() > 1e-3
    assert torch.equal(before.canvas, after.canvas) == (part != "frame")


# -- batches


def test_rows_do_not_depend_on_the_batch(model: CanvasMAR) -> None:
    latents, actions = context(), actions_of(model, 6)

    def roll(rows: slice, streams: list[int]) -> list[Sample]:
        told = None if actions is None else actions[rows]
        state = sampler.start(model, latents[rows], None if told is None else told[:, :4])
        out = []
        for i in range(2):
            noise = noise_of(model, GUIDED, 5 + i, streams)
            action = None if told is None else told[:, 4 + i]
            state, sample = sampler.step(model, GUIDED, state, noise, action)
            out.append(sample)
        return out

    together = roll(slice(0, 2), [0, 1])
    for row in range(2):
        alone = roll(slice(row, row + 1), [row])
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a.order[0], b.order[row])
            torch.testing.assert_close(a.latent[0], b.latent[row], rtol=1e-5, atol=1e-5)
            assert (a.frames[0].int() - b.frames[row].int()).abs().max() <= 1
    assert not torch.equal(together[0].latent[0], together[0].latent[1])


# -- starts, options, limits


def test_a_video_from_nothing(model: CanvasMAR) -> None:
    """The first frame has no canvas: mask embeddings, a random order; the second has one."""
    state = sampler.empty_state(model, 2)
    noise = noise_of(model, GUIDED, 0)
    state, first = sampler.step(model, GUIDED, state, noise)
    assert state.time == 1
    assert first.canvas is None
    assert first.staticness is None
    assert torch.isfinite(first.latent).all()
    assert first.order.sort(1).values.tolist() == [list(range(N))] * 2
    best = noise.order[:, 0].sort(1, descending=True).indices[:, :2]
    assert torch.equal(first.order[:, :2], best)
    # neither augmentation noise has a say
    other = dataclasses.replace(noise, frame=noise.frame + 1, canvas=noise.canvas + 1)
    _, again = sampler.step(model, GUIDED, sampler.empty_state(model, 2), other)
    assert same(first, again)
    state, second = sampler.step(model, GUIDED, state, noise_of(model, GUIDED, 1))
    assert (second.canvas is None) == (not model.config.canvas)
    assert state.time == 2


def test_generated_frames_are_context_like_any_other(model: CanvasMAR) -> None:
    """Starting from latents equals having generated them: caches, decoder and all."""
    state = sampler.empty_state(model, 2)
    latents = []
    for frame in range(4):
        state, sample = sampler.step(model, PLAIN, state, noise_of(model, PLAIN, frame))
        latents.append(sample.latent)
    started = sampler.start(model, torch.stack(latents, 1))
    assert started.time == state.time
    for a, b in zip(tensors(started), tensors(state), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mmdit-isolated-actions", "no-canvas"])
def test_actions_count(name: str) -> None:
    model = make(VARIANTS[name])
    told = actions_of(model, 5)
    assert told is not None
    noise = noise_of(model, PLAIN, 5)

    def latent(past: Tensor | None, action: Tensor | None) -> Tensor:
        state = sampler.start(model, context(), past)
        return sampler.step(model, PLAIN, state, noise, action)[1].latent

    runs = [
        latent(told[:, :4], told[:, 4]),
        latent(told[:, :4], -told[:, 4]),
        latent(told[:, :4], torch.zeros(2, 2)),
        latent(told[:, :4], None),
        latent(None, told[:, 4]),
        latent(None, None),
    ]
    for i, a in enumerate(runs):
        assert torch.isfinite(a).all()
        for b in runs[i + 1 :]:
            assert (a - b).abs().max() > 1e-4


@pytest.mark.parametrize("ar_steps", [1, 2, N])
def test_any_number_of_steps(model: CanvasMAR, ar_steps: int) -> None:
    sampling = dataclasses.replace(PLAIN, ar_steps=ar_steps, flow_steps=2)
    latents = context(2)
    actions = actions_of(model, 2)
    state = sampler.start(model, latents, None if actions is None else actions[:, :1])
    noise = noise_of(model, sampling, 2)
    action = None if actions is None else actions[:, 1]
    _, got = sampler.step(model, sampling, state, noise, action)
    assert got.order.sort(1).values.tolist() == [list(range(N))] * 2
    close(got, by_hand(model, sampling, latents, noise, actions))


def test_too_many_steps() -> None:
    model = make(VARIANTS["expert"])
    sampling = dataclasses.replace(PLAIN, ar_steps=N + 1)
    state = sampler.start(model, context(1))
    with pytest.raises(ConfigError, match="ar_steps"):
        sampler.step(model, sampling, state, noise_of(model, sampling, 1))


@pytest.mark.parametrize("solver", ["euler", "heun", "ab2"])
def test_solvers_approach_one_another(solver: Any) -> None:
    """With a hundred steps all solvers draw the same frame, with three they do not."""
    model = make(VARIANTS["expert"])
    state, noise = sampler.start(model, context()), noise_of(model, PLAIN, 5)

    def latent(solver: Any, steps: int) -> Tensor:
        sampling = dataclasses.replace(PLAIN, ar_steps=1, solver=solver, flow_steps=steps)
        one = dataclasses.replace(noise, order=noise.order[:, :1])
        return sampler.step(model, sampling, state, one)[1].latent

    best = latent("heun", 100)
    fine, coarse = (latent(solver, n) - best for n in (100, 3))
    assert fine.norm() < 0.02 * best.norm()
    assert fine.norm() < 0.2 * coarse.norm()


@pytest.mark.parametrize("order", ["motion", "maskgit", "random"])
def test_orders(order: Any) -> None:
    model = make(VARIANTS["expert"])
    sampling = dataclasses.replace(PLAIN, order=order, temperature=0.0)
    state, noise = sampler.start(model, context()), noise_of(model, sampling, 5)
    _, sample = sampler.step(model, sampling, state, noise)
    assert sample.staticness is not None
    stillest = sample.staticness.sort(1, descending=True).indices
    assert torch.equal(sample.order, stillest) == (order != "random")


# -- noise and pixels


def test_draw_noise_is_the_counter_based_noise() -> None:
    model = make(VARIANTS["expert"])
    noise = sampler.draw_noise(model.config, PLAIN, seed=5, streams=[3, 1], frame=6)
    for part, purpose, fill, shape in (
        ("flow", Purpose.FLOW, fill_normal, (2, N, C)),
        ("frame", Purpose.FRAME_AUGMENTATION, fill_normal, (2, N, C)),
        ("canvas", Purpose.CANVAS_AUGMENTATION, fill_normal, (2, N, D)),
        ("order", Purpose.ORDER, fill_gumbel, (2, 3, N)),
    ):
        want = np.empty(shape, np.float32)
        fill(want, seed=5, streams=[3, 1], frame=6, purpose=purpose)
        np.testing.assert_array_equal(getattr(noise, part).numpy(), want)


def test_encode_is_causal_and_counts_frames() -> None:
    """1 + n t pixel frames are 1 + n latent frames."""
    model = make(VARIANTS["expert"])
    generator = torch.Generator().manual_seed(0)
    clip = torch.randint(0, 256, (2, 7, 16, 16, 3), dtype=torch.uint8, generator=generator)
    latents = sampler.encode(model, clip)
    assert latents.shape == (2, 4, N, C)
    for frames in (1, 3, 5):
        part = sampler.encode(model, clip[:, :frames])
        torch.testing.assert_close(part, latents[:, : 1 + frames // 2], rtol=1e-5, atol=1e-5)
