"""Both stages: the latents' scale, what goes into the losses, and the pictures for the log."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from canvasmar_rt.config import SamplingConfig
from canvasmar_rt.errors import InputError
from canvasmar_rt.models import sampler
from canvasmar_rt.models.canvasmar import CanvasMAR
from canvasmar_rt.models.families import build
from tests.conftest import SAMPLING, small_config
from tests.training.small_runs import Waves, autoencoder_stage, model_stage
from training.clips import Clips, LatentClips, latent_actions
from training.config import ModelTraining
from training.stages import (
    ModelStage,
    continue_clips,
    encode_clips,
    reconstruct,
    weights_id,
)


def drawn(count: int, first: int = 0, **changes: int) -> Clips:
    clips = Waves(**changes).clips(first, count)
    assert isinstance(clips, Clips)
    return clips


@pytest.fixture(scope="module")
def model() -> CanvasMAR:
    return build(small_config(), seed=3)


# Autoencoder


def test_the_scale_is_that_of_held_out_latents() -> None:
    stage = autoencoder_stage(statistics_clips=20)  # more than are encoded at once
    ae = stage.model.autoencoder
    ae.latent_mean.fill_(7.0)
    ae.latent_std.fill_(9.0)
    stage.finish()
    mean, std = ae.latent_mean.clone(), ae.latent_std.clone()
    raw = []
    ae.latent_mean.zero_()
    ae.latent_std.fill_(1.0)
    for i in range(20):
        raw.append(encode_clips(stage.model, drawn(1, i, seed=1).frames).numpy())
    values = np.concatenate(raw).reshape(-1, 4).astype(np.float64)
    np.testing.assert_allclose(mean, values.mean(0), atol=2e-3)
    np.testing.assert_allclose(std, values.std(0, ddof=1), rtol=5e-3)

    stage.finish()
    latents = encode_clips(stage.model, torch.cat([drawn(20, seed=1).frames]))
    np.testing.assert_allclose(latents.mean((0, 1, 2)), np.zeros(4), atol=1e-2)
    np.testing.assert_allclose(latents.std((0, 1, 2)), np.ones(4), atol=1e-2)


def test_a_channel_that_says_nothing_has_a_scale() -> None:
    stage = autoencoder_stage()
    with torch.no_grad():
        stage.model.autoencoder.encoder.conv_out.weight[1].zero_()  # a channel of the mean
    stage.finish()
    assert encode_clips(stage.model, drawn(2).frames).isfinite().all()


def test_the_autoencoder_is_shown_frames() -> None:
    clips = drawn(2)
    assert autoencoder_stage().inputs(clips, [0, 0]) == {"frames": clips.frames}


def test_reconstruct_is_the_streamed_autoencoder(model: CanvasMAR) -> None:
    frames = drawn(2).frames
    output = reconstruct(model, frames)
    assert output.shape == frames.shape
    assert output.dtype == torch.uint8
    latents, state = sampler.encode(model, frames), sampler.empty_state(model, 2)
    decoder, parts = state.decoder, []
    with torch.inference_mode():
        for i in range(latents.shape[1]):
            part, new = model.autoencoder.decode(latents[:, i : i + 1], decoder)
            decoder = tuple(new)
            parts.append(part if i else part[:, -1:])  # the first frame is its group's last copy
    streamed = torch.cat(parts, dim=1)
    assert (output.int() - streamed.int()).abs().max() <= 1


# CanvasMAR


def test_a_model_is_shown_latents_and_actions_of_latent_steps() -> None:
    stage = model_stage()
    clips = drawn(3)
    told = stage.inputs(clips, [0, 0, 0])
    assert told.keys() == {"latents", "actions"}
    latents, actions = told["latents"], told["actions"]
    assert clips.actions is not None
    assert torch.equal(actions, latent_actions(clips.actions, 2))
    torch.testing.assert_close(latents, sampler.encode(stage.model, clips.frames), atol=0.1, rtol=0)
    assert not latents.is_inference()  # autograd could not save it
    assert latents.dtype == torch.float32
    stored = LatentClips(latents=latents, actions=actions)
    assert stage.inputs(stored, [0, 0, 0]) == told


def test_actions_of_the_data_may_be_left_out() -> None:
    config = ModelTraining(steps=1, batch=1)
    stage = ModelStage(build(small_config(action_dim=0)), SAMPLING, config, Waves())
    assert stage.inputs(drawn(1), [0])["actions"] is None
    assert model_stage().inputs(drawn(1, action_dim=0), [0])["actions"] is None


def test_only_the_model_learns() -> None:
    stage = model_stage()
    trained = {n for n, p in stage.model.named_parameters() if p.requires_grad}
    assert trained
    assert not any(n.startswith("autoencoder.") for n in trained)
    assert trained == {n for n, _ in stage.loss.named_parameters()}


def test_clips_must_be_long_enough() -> None:
    config = ModelTraining(steps=1, batch=1)
    with pytest.raises(InputError, match="3 frames: the model wants at least 5"):
        ModelStage(build(small_config()), SAMPLING, config, Waves(frames=3))


def test_weights_have_a_name(model: CanvasMAR) -> None:
    ae = model.autoencoder
    assert weights_id(ae) == weights_id(build(small_config(), seed=3).autoencoder)
    assert weights_id(ae) != weights_id(build(small_config(), seed=4).autoencoder)
    before = weights_id(ae)
    ae.latent_std[0] += 1  # the scale is part of what made the latents
    after = weights_id(ae)
    ae.latent_std[0] -= 1
    assert len({before, after}) == 2


# Continuing clips


def by_hand(model: CanvasMAR, sampling: SamplingConfig, clips: Clips, context: int) -> list[Tensor]:
    """Pixels of each predicted latent frame, by the sampler in float32."""
    config = model.config
    assert clips.actions is not None
    actions = latent_actions(clips.actions, 2)
    latents = sampler.encode(model, clips.frames[:, : 1 + (context - 1) * 2])
    state, out = sampler.start(model, latents, actions[:, : context - 1]), []
    for i in range(context, 1 + clips.frames.shape[1] // 2):
        noise = sampler.draw_noise(config, sampling, seed=5, streams=[8, 9], frame=i)
        state, sample = sampler.step(model, sampling, state, noise, actions[:, i - 1])
        out.append(sample.frames)
    return out


@pytest.mark.parametrize("context", [1, 2])
def test_continued_clips_are_the_samplers(
    model: CanvasMAR, context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = drawn(2, frames=7)
    monkeypatch.setattr(torch, "autocast", lambda *_: torch.autograd.set_grad_enabled(False))
    out = continue_clips(model, SAMPLING, clips, context=context, seed=5, first_stream=8)
    given = 1 + (context - 1) * 2
    assert out.frames.shape == clips.frames.shape
    assert torch.equal(out.frames[:, :given], clips.frames[:, :given])
    expected = torch.cat(by_hand(model, SAMPLING, clips, context), dim=1)
    assert torch.equal(out.frames[:, given:], expected)
    assert out.canvas is None


def test_continuing_heeds_actions_seed_and_stream(model: CanvasMAR) -> None:
    clips = drawn(1)
    assert clips.actions is not None

    def future(clips: Clips = clips, **changes: int) -> Tensor:
        options = {"context": 2, "seed": 0, **changes}
        return continue_clips(model, SAMPLING, clips, **options).frames  # type: ignore[arg-type]

    base = future()
    assert torch.equal(base, future())
    other = dataclasses.replace(clips, actions=clips.actions + 1)
    for changed in (
        future(seed=1),
        future(first_stream=1),
        future(use_actions=False),
        future(other),
    ):
        assert torch.equal(changed[:, :3], base[:, :3])
        assert not torch.equal(changed[:, 3:], base[:, 3:])
    assert torch.equal(future(use_actions=False), future(other, use_actions=False))


def test_the_canvas_can_be_seen(model: CanvasMAR) -> None:
    clips = drawn(2)
    out = continue_clips(model, SAMPLING, clips, context=2, seed=0, canvas=True)
    assert out.canvas is not None
    assert out.canvas.shape == (2, 2, 16, 16, 3)
    assert not torch.equal(out.canvas, out.frames[:, 3:5])
    plain = build(small_config(canvas=False))
    assert continue_clips(plain, SAMPLING, clips, context=2, seed=0, canvas=True).canvas is None


@pytest.mark.parametrize("context", [0, 3])
def test_a_context_must_leave_something(model: CanvasMAR, context: int) -> None:
    with pytest.raises(InputError, match=f"context of {context} of 3 latent frames"):
        continue_clips(model, SAMPLING, drawn(1), context=context, seed=0)
