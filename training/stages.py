"""The two stages of a training: the autoencoder, then CanvasMAR on its latents."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from canvasmar_rt.components import components
from canvasmar_rt.config import SamplingConfig
from canvasmar_rt.contact_sheet import contact_sheet
from canvasmar_rt.errors import InputError
from canvasmar_rt.models import sampler
from canvasmar_rt.models.canvasmar import FrameModel
from canvasmar_rt.rollout import Predictor
from canvasmar_rt.verify import run_component
from training.clips import Clips, ClipSource, LatentClips, latent_actions
from training.config import AutoencoderTraining, ModelTraining
from training.losses import AutoencoderLoss, CanvasMarLoss, Draws, model_loss
from training.metrics import psnr

HELD_OUT_SEED = 1
"""ToyTable seed of the clips that training never sees; training draws from seed 0."""


def weights_id(module: nn.Module) -> str:
    """A digest of a module's weights: latents belong to the autoencoder that made them, figures to
    the model they were measured on."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def encode_clips(model: FrameModel, frames: Tensor) -> Tensor:
    """uint8 clips (B, 1+n*t, H, W, 3) -> normalised latents (B, 1+n, N, C) float32, bf16 inside."""
    device = model.device
    with torch.autocast(device.type, torch.bfloat16):
        latents = sampler.encode(model, frames.to(device))
    return latents.float().clone()  # made in inference mode: autograd takes only a copy


class AutoencoderStage:
    """Encoder and decoder on pixels; every checkpoint carries the latents' mean and deviation."""

    name = "autoencoder"

    def __init__(
        self,
        model: FrameModel,
        sampling: SamplingConfig,
        config: AutoencoderTraining,
        held_out: ClipSource,
    ) -> None:
        self.model, self.sampling, self.config = model, sampling, config
        self.held_out = held_out
        model.autoencoder.encoder.requires_grad_(not config.freeze_encoder)
        self.loss: nn.Module = AutoencoderLoss(model.autoencoder, config)
        self.stay = 1
        self.carried: Tensor | None = None

    def inputs(self, clips: Clips | LatentClips, ages: Sequence[int]) -> dict[str, Any]:
        del ages
        assert isinstance(clips, Clips)
        return {"frames": clips.frames}

    def advance(self, inputs: dict[str, Any], draws: Draws) -> None:
        pass

    def finish(self) -> None:
        """Measure the latents of held-out clips: their mean and deviation become the scale."""
        if self.config.freeze_encoder:
            return
        ae = self.model.autoencoder
        ae.latent_mean.zero_()
        ae.latent_std.fill_(1.0)
        done, parts = 0, []
        while done < self.config.statistics_clips:
            clips = self.held_out.clips(done, min(16, self.config.statistics_clips - done))
            assert isinstance(clips, Clips)
            parts.append(encode_clips(self.model, clips.frames).cpu())
            done += len(clips.frames)
        latents = torch.cat(parts)
        ae.latent_mean.copy_(latents.mean((0, 1, 2)))
        ae.latent_std.copy_(latents.std((0, 1, 2)).clamp_min(1e-4))  # of a channel the KL closed

    def sample(self, writer: SummaryWriter, step: int, directory: Path) -> None:
        """Held-out clips beside their reconstructions, and their PSNR."""
        clips = self.held_out.clips(0, 4)
        assert isinstance(clips, Clips)
        output = reconstruct(self.model, clips.frames)
        together = psnr(clips.frames.flatten(0, 2), output.flatten(0, 2))
        writer.add_scalar("autoencoder/held_out_psnr", float(together), step)
        rows = [("given", clips.frames), ("rebuilt", output)]
        log_videos(writer, "autoencoder", rows, step, directory, self.model.config.fps)


@torch.inference_mode()
def reconstruct(model: FrameModel, frames: Tensor) -> Tensor:
    """uint8 clips (B, 1+n*t, H, W, 3) through the autoencoder and back, float32."""
    return decode_clips(model, sampler.encode(model, frames.to(model.device)))


@torch.inference_mode()
def decode_clips(model: FrameModel, latents: Tensor) -> Tensor:
    """Normalised latents (B, 1+n, N, C) -> uint8 clips (B, 1+n*t, H, W, 3) on the CPU."""
    state = sampler.empty_state(model, len(latents))
    output, _ = model.autoencoder.decode(latents, state.decoder)
    return output[:, model.config.autoencoder.temporal_compression - 1 :].cpu()


def decode_by(predictor: Predictor, latents: Tensor) -> Tensor:
    """`decode_clips` by the decoder of the predictor's engine, a latent frame at a time and as many
    clips as the bundle takes at once."""
    most = predictor.bundle.manifest.batch.maximum
    if len(latents) > most:
        return torch.cat([decode_by(predictor, part) for part in torch.split(latents, most)])
    component = components(predictor.config)["decoder"]
    inputs, outputs = (
        {s.name: (len(latents), *map(int, s.dims[1:])) for s in specs}
        for specs in (component.inputs, component.outputs)
    )
    first, *states = (np.zeros(shape, np.float32) for shape in inputs.values())
    pictures = []
    for latent in latents.cpu().numpy().swapaxes(0, 1):
        first[...] = latent
        have = dict(zip(inputs, (first, *states), strict=True))
        frames, *states = run_component(predictor.engine, "decoder", have, outputs).values()
        pictures.append(frames)
    clips = np.concatenate(pictures, axis=1)
    return torch.from_numpy(clips[:, predictor.config.autoencoder.temporal_compression - 1 :])


class ModelStage:
    """CanvasMAR on the latents of a frozen autoencoder, encoded on the way or read from disk."""

    name = "model"

    def __init__(
        self,
        model: FrameModel,
        sampling: SamplingConfig,
        config: ModelTraining,
        held_out: ClipSource,
    ) -> None:
        self.model, self.sampling, self.config = model, sampling, config
        self.held_out = held_out
        t, group = model.config.autoencoder.temporal_compression, model.config.group
        least = max(3, 2 * group)  # a group may begin at any of the first, and one more follows
        if held_out.frames < 1 + (least - 1) * t:
            raise InputError(
                f"clips of {held_out.frames} frames: the model wants at least "
                f"{1 + (least - 1) * t}, "
                + (
                    "two latent frames of context and one to predict"
                    if group == 1
                    else f"two groups of {group} latent frames"
                )
            )
        model.autoencoder.requires_grad_(False)
        self.loss: nn.Module = model_loss(model, config)
        self.stay = config.own_history + 1
        self.carried: Tensor | None = None  # the histories of the batch's clips (B, T, N, C)

    def inputs(self, clips: Clips | LatentClips, ages: Sequence[int]) -> dict[str, Any]:
        """With `own_history`, clips of age 0 are seen as they are, others as `advance` left
        them."""
        actions = clips.actions
        if isinstance(clips, LatentClips):
            latents = clips.latents
        else:
            latents = encode_clips(self.model, clips.frames)
            if not self.model.config.action_dim:
                actions = None
            elif actions is not None:
                t = self.model.config.autoencoder.temporal_compression
                actions = latent_actions(actions, t)
        told = {"latents": latents, "actions": actions}
        if self.carried is None:
            return told
        stayed = torch.tensor([age > 0 for age in ages], device=latents.device)
        return told | {"history": torch.where(stayed[:, None, None, None], self.carried, latents)}

    def advance(self, inputs: dict[str, Any], draws: Draws) -> None:
        """After a step: the histories of the next one."""
        if self.stay > 1:
            assert isinstance(self.loss, CanvasMarLoss)
            history = inputs.get("history", inputs["latents"])
            self.carried = self.loss.predicted(history, inputs["actions"], draws)

    def finish(self) -> None:
        pass

    def sample(self, writer: SummaryWriter, step: int, directory: Path) -> None:
        """Held-out clips continued from their first two latent frames under their own actions."""
        clips = self.held_out.clips(0, 4)
        assert isinstance(clips, Clips)
        predicted = continue_clips(self.model, self.sampling, clips, context=2, seed=0).frames
        rows = [("given", clips.frames), ("predicted", predicted)]
        log_videos(writer, "model", rows, step, directory, self.model.config.fps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continuation:
    """frames: uint8 (B, T, H, W, 3), the context as it was given, then predictions; canvas: uint8
    (B, t, H, W, 3), the first predicted latent frame's canvas decoded in its place, if asked for
    and the model has one."""

    frames: Tensor
    canvas: Tensor | None = None


@torch.inference_mode()
def continue_clips(
    model: FrameModel,
    sampling: SamplingConfig,
    clips: Clips,
    *,
    context: int,
    seed: int,
    first_stream: int = 0,
    use_actions: bool = True,
    canvas: bool = False,
    predictor: Predictor | None = None,
) -> Continuation:
    """The first `context` latent frames of each clip, then predictions to its end under its own
    actions, by the reference sampler under bf16 autocast, or by rollouts of `predictor` if there is
    one; clip i draws from stream `first_stream` + i.

    Raises:
        InputError: if the context leaves nothing to predict.
    """
    config, device, group = model.config, model.device, model.config.group
    t = config.autoencoder.temporal_compression
    total = 1 + (clips.frames.shape[1] - 1) // t
    if not 1 <= context < total:
        raise InputError(f"a context of {context} of {total} latent frames leaves no prediction")
    actions = None
    if use_actions and config.action_dim and clips.actions is not None:
        actions = latent_actions(clips.actions, t)
    if predictor is not None:
        return _rolled_out(
            predictor, sampling, clips.frames, actions, context=context, seed=seed,
            first_stream=first_stream, canvas=canvas and config.canvas,
        )  # fmt: skip
    actions = None if actions is None else actions.to(device)
    given = 1 + (context - 1) * t
    streams = range(first_stream, first_stream + len(clips.frames))
    guess = None
    with torch.autocast(device.type, torch.bfloat16):
        latents = sampler.encode(model, clips.frames[:, :given].to(device))
        before = None if actions is None or group > 1 else actions[:, : context - 1]
        state = sampler.start(model, latents, before)
        out = [clips.frames[:, :given]]
        for i in range(context, total, group):
            noise = sampler.draw_noise(config, sampling, seed=seed, streams=streams, frame=i)
            noise = sampler.FrameNoise(**{k: v.to(device) for k, v in vars(noise).items()})
            decoder = state.decoder
            action = None if actions is None else group_actions(actions, i - 1, group)
            state, sample = sampler.step(model, sampling, state, noise, action)
            out.append(sample.frames.cpu())
            if canvas and i == context and sample.canvas is not None:
                latent = sample.canvas.view(len(latents), group, *latents.shape[2:])[:, :1]
                guess = model.autoencoder.decode(latent, decoder)[0].cpu()
    film = torch.cat(out, dim=1)
    return Continuation(frames=film[:, : clips.frames.shape[1]], canvas=guess)


def group_actions(actions: Tensor, first: int, group: int) -> Tensor:
    """The actions (B, J*A) that lead to a group, from actions (B, T-1, A) of which `first` leads to
    its first frame; beyond the clip's end there are none, 0."""
    taken = actions[:, first : first + group].flatten(1)
    return nn.functional.pad(taken, (0, group * actions.shape[2] - taken.shape[1]))


def _rolled_out(
    predictor: Predictor,
    sampling: SamplingConfig,
    frames: Tensor,
    actions: Tensor | None,
    *,
    context: int,
    seed: int,
    first_stream: int,
    canvas: bool,
) -> Continuation:
    """`continue_clips` by rollouts, each of as many clips as the bundle takes at once."""
    t, group = predictor.config.autoencoder.temporal_compression, predictor.config.group
    given, most = 1 + (context - 1) * t, predictor.bundle.manifest.batch.maximum
    shown, guesses = [], []
    for first in range(0, len(frames), most):
        part = frames[first : first + most]
        told = None if actions is None else actions[first : first + most].cpu()
        rollout = predictor.start(
            part[:, :given].numpy(),
            seed=seed,
            stream=first_stream + first,
            actions=None if told is None or group > 1 else told[:, : context - 1].numpy(),
            sampling=sampling,
        )
        out = [part[:, :given]]
        for i in range(context, 1 + (frames.shape[1] - 1) // t, group):
            action = None if told is None else group_actions(told, i - 1, group).numpy()
            made = rollout.step(action, decode_canvas=canvas and i == context)
            out.append(torch.from_numpy(made.frames))
            if made.canvas_frames is not None:
                guesses.append(torch.from_numpy(made.canvas_frames[:, :t]))
        shown.append(torch.cat(out, dim=1)[:, : frames.shape[1]])
    return Continuation(frames=torch.cat(shown), canvas=torch.cat(guesses) if guesses else None)


def log_videos(
    writer: SummaryWriter,
    tag: str,
    rows: Sequence[tuple[str, Tensor]],
    step: int,
    directory: Path,
    fps: float,
) -> None:
    """Put rows of clips (B, T, H, W, 3) side by side into TensorBoard as a moving picture, and
    beside the logs as a sheet of frames."""
    film = torch.cat([torch.cat(list(clips), dim=-2) for _, clips in rows], dim=-3).numpy()
    pictures = [Image.fromarray(frame) for frame in film]
    data = io.BytesIO()
    pictures[0].save(
        data, "GIF", save_all=True, append_images=pictures[1:], duration=1000 / fps, loop=0
    )
    image = Summary.Image(
        height=film.shape[1], width=film.shape[2], colorspace=3,
        encoded_image_string=data.getvalue(),
    )  # fmt: skip
    summary = Summary(value=[Summary.Value(tag=f"{tag}/samples", image=image)])
    file_writer: Any = writer.file_writer  # not annotated: the writer's add_image takes no GIF
    file_writer.add_summary(summary, step)
    sheet = contact_sheet(
        [
            (f"{label} {i}", list(np.asarray(clip)[::2]))
            for i in range(len(rows[0][1]))
            for label, clip in ((label, clips[i]) for label, clips in rows)
        ],
        scale=1,
        title=f"{tag}, step {step}",
    )
    folder = directory / "samples"
    folder.mkdir(exist_ok=True)
    Image.fromarray(sheet).save(folder / f"{tag}_{step:08d}.png")
