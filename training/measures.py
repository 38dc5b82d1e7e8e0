"""What `training.evaluation`'s commands measure on held-out ToyTable clips, and on recordings.

Clips come from seed 1; training draws from seed 0. Held-out clip i draws its noise from stream i,
so its prediction does not depend on the batch it falls into (but for the rounding of int8
bundles).

Shapes: B clips, T pixel frames, t pixel frames per latent frame; a context of n latent frames is
1 + (n-1)*t pixel frames.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from canvasmar_rt.config import AutoencoderConfig, SamplingConfig
from canvasmar_rt.errors import ConfigError, InputError
from canvasmar_rt.models import sampler
from canvasmar_rt.models.autoencoder import first_frame_group
from canvasmar_rt.models.canvasmar import FrameModel
from canvasmar_rt.rollout import Predictor
from canvasmar_rt.schedule import set_sizes
from training.clips import Clips, ClipSource, ToyTableSource, check_length, latent_actions
from training.config import ModelTraining
from training.losses import MASK_RATIO, Draws, model_loss
from training.metrics import GaussianStats, at_resolution, psnr, psnr_of_mean_error, ssim
from training.stages import (
    HELD_OUT_SEED,
    continue_clips,
    decode_by,
    decode_clips,
    encode_clips,
    reconstruct,
    weights_id,
)
from training.toytable_metrics import (
    KEPT_SHARE,
    METRIC_SIZE,
    ToyTableEvaluator,
    pair_features,
    toy_areas,
)


def held_out(first: int, count: int, frames: int, size: int) -> Clips:
    """Held-out clips first ... first + count - 1."""
    return ToyTableSource(frames=frames, size=size, seed=HELD_OUT_SEED).clips(first, count)


def batches(
    model: FrameModel, clips: int, batch: int, frames: int, *, start: int = 0
) -> Iterator[tuple[int, Clips]]:
    """(index of the first, clips) of held-out clips start ... start + clips - 1 in turn."""
    size = model.config.autoencoder.height
    for first in range(start, start + clips, batch):
        yield first, held_out(first, min(batch, start + clips - first), frames, size)


def held(frames: Tensor, given: int, count: int) -> Tensor:
    """The last of the frames given of clips (B, T, ...), again and again: (B, count, ...)."""
    last = frames[:, given - 1 : given]
    return last.expand(-1, count, *last.shape[2:])


def given_frames(model: FrameModel, context: int) -> int:
    """Pixel frames of a context of latent frames."""
    return 1 + (context - 1) * model.config.autoencoder.temporal_compression


def check_predicted(model: FrameModel, frames: int) -> None:
    t = model.config.autoencoder.temporal_compression
    if frames < 1 or frames % t:
        raise InputError(f"{frames} predicted frames are not whole latent frames of {t}")


def measure_reconstruction(
    model: FrameModel,
    *,
    clips: int,
    frames: int,
    batch: int,
    tick: Callable[[int], None],
    predictor: Predictor | None = None,
) -> dict[str, Any]:
    """PSNR of clips through the autoencoder, decoded by the engine of `predictor` where there is
    one: the mean over all frames, over each frame of a clip (one that drifts shows), and that of
    the mean squared error of all pixels, which the worst frames weigh on. And the root mean square
    of how far normalised latents move from one frame to the next where no pixel of their patch
    changes by more than a grey level, and elsewhere: what stays is the easier to predict the less
    its latents move.

    Raises:
        InputError: if the clips are not 1 + n*t frames long.
    """
    check_length(frames, model.config.autoencoder.temporal_compression)
    values, moves, stays = [], [], []
    for _, given in batches(model, clips, batch, frames):
        latents = sampler.encode(model, given.frames.to(model.device))
        decoded = decode_by(predictor, latents) if predictor else decode_clips(model, latents)
        values.append(psnr(given.frames, decoded))
        moves.append(latents.diff(dim=1).square().mean(-1).cpu())
        stays.append(still_patches(model.config.autoencoder, given.frames))
        tick(len(given.frames))
    found, moved, still = torch.cat(values), torch.cat(moves), torch.cat(stays)
    return {
        "psnr_db": float(found.mean()),
        "psnr_db_of_mean_error": float(psnr_of_mean_error(found)),
        "psnr_db_by_frame": [round(v, 2) for v in found.mean(0).tolist()],
        "latents": {
            "still_share": float(still.float().mean()),
            "still_move": float(moved[still].mean().sqrt()),
            "other_move": float(moved[~still].mean().sqrt()),
        },
        "clips": clips,
        "frames": frames,
    }


def still_patches(config: AutoencoderConfig, frames: Tensor) -> Tensor:
    """Where the pixels of two latent frames after each other are alike to a grey level, of uint8
    clips (B, 1+n*t, H, W, 3): bool (B, n, N)."""
    t, side = config.temporal_compression, config.spatial_compression
    groups = first_frame_group(frames, t).short()
    groups = groups.reshape(len(frames), -1, t, *frames.shape[2:])
    change = groups.diff(dim=1).abs().amax((2, -1))  # (B, n, H, W)
    grid = (config.latent_height, side, config.latent_width, side)
    patches = change.reshape(*change.shape[:2], *grid).amax((3, 5))
    return (patches <= 1).flatten(2)


class AlikeDraws(Draws):
    """Draws that do not depend on what else a model draws: each is keyed by its distribution, its
    shape and how many like it came before, or what it decides. So a model with a canvas and one
    without see the same masks, times and flow noise, and all families the same mask ratio."""

    def __init__(self, device: torch.device, *, seed: int, step: int, batch: int) -> None:
        super().__init__(device, seed=seed, step=step, batch=batch)
        self._seed, self._step = seed, step
        self._drawn: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def _next(self, kind: str, shape: tuple[int, ...]) -> Draws:
        key = repr((self._seed, kind, shape, self._drawn[kind, shape]))
        self._drawn[kind, shape] += 1
        seed = zlib.crc32(key.encode())
        return Draws(self.device, seed=seed, step=self._step, batch=self.batch)

    def normal(self, *shape: int) -> Tensor:
        return self._next("normal", shape).normal(*shape)

    def uniform(self, *shape: int) -> Tensor:
        return self._next("uniform", shape).uniform(*shape)

    def shared_uniform(self, what: str = MASK_RATIO) -> float:
        if what == MASK_RATIO:
            return super().shared_uniform()
        return self._next(what, ()).shared_uniform()


@torch.no_grad()
def measure_losses(
    model: FrameModel, *, clips: int, batch: int, tick: Callable[[int], None]
) -> dict[str, Any]:
    """The training losses on held-out clips of 17 frames (or the whole latent frames in them) under
    the same draws for every model. The mask ratio is one for a batch: only figures of one batch
    size compare."""
    loss = model_loss(model, ModelTraining(steps=1, batch=batch)).eval()
    device = model.device
    t = model.config.autoencoder.temporal_compression
    sums: dict[str, float] = {}
    for first, given in batches(model, clips, batch, 1 + 16 // t * t):
        assert given.actions is not None
        actions = latent_actions(given.actions, t).to(device) if model.config.action_dim else None
        latents = encode_clips(model, given.frames)
        count = len(latents)
        draws = AlikeDraws(device, seed=0, step=first, batch=count)
        with torch.autocast(device.type, torch.bfloat16):
            terms = loss(latents, actions, draws)[1]
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + float(value) * count
        tick(count)
    return {**{name: total / clips for name, total in sums.items()}, "clips": clips, "batch": batch}


def measure_one_step(
    model: FrameModel,
    sampling: SamplingConfig,
    *,
    clips: int,
    context: int,
    batch: int,
    seed: int,
    tick: Callable[[int], None],
    predictor: Predictor | None = None,
) -> dict[str, Any]:
    """The next latent frame alone: predictions, the canvas alone, a copy of the last frame, and
    the truth through the autoencoder (no prediction can be nearer), each against the truth."""
    t = model.config.autoencoder.temporal_compression
    given = given_frames(model, context)
    gathered = {
        name: ToyTableEvaluator() for name in ("prediction", "canvas", "copy", "autoencoder")
    }
    for first, drawn in batches(model, clips, batch, given + t):
        assert drawn.actions is not None
        real, actions = drawn.frames[:, given:], drawn.actions[:, given - 1 :]
        before = drawn.frames[:, :given]
        shown = continue_clips(
            model,
            sampling,
            drawn,
            context=context,
            seed=seed,
            first_stream=first,
            canvas=True,
            predictor=predictor,
        )
        frames = {
            "prediction": shown.frames[:, given:],
            "canvas": shown.canvas,
            "copy": held(before, given, t),
            "autoencoder": reconstruct(model, drawn.frames)[:, given:],
        }
        for name, predicted in frames.items():
            if predicted is not None:
                gathered[name].update(before, predicted, real, actions)
        tick(len(real))
    keep = ("frechet", "gripper_penalised_px", "gripper_missing")
    result: dict[str, Any] = {"clips": clips, "context": context}
    for name, evaluator in gathered.items():
        if name != "canvas" or model.canvas is not None:
            report = dataclasses.asdict(evaluator.report())
            result[name] = {key: report[key] for key in keep}
    return result


def measure_rollouts(
    model: FrameModel,
    sampling: SamplingConfig,
    *,
    clips: int,
    frames: int,
    context: int,
    batch: int,
    seed: int,
    tick: Callable[[int], None],
    use_actions: bool = True,
    windows: tuple[tuple[int, int], ...] = (),
    predictor: Predictor | None = None,
) -> dict[str, Any]:
    """Predictions of `frames` pixel frames against the truth. `windows` (first, last), counted
    from 1 at the first predicted frame, add the Frechet distance of those parts alone, of the pairs
    of frames within them.

    Raises:
        InputError: if `frames` are not whole latent frames, or a window is not two of them or more.
    """
    given = given_frames(model, context)
    check_predicted(model, frames)
    for start, end in windows:
        if not 1 <= start < end <= frames:
            raise InputError(f"window {start}-{end}: expected two or more of frames 1-{frames}")
    evaluator = ToyTableEvaluator()
    parts = {window: (GaussianStats(), GaussianStats()) for window in windows}
    for first, drawn in batches(model, clips, batch, given + frames):
        assert drawn.actions is not None
        shown = continue_clips(
            model,
            sampling,
            drawn,
            context=context,
            seed=seed,
            first_stream=first,
            use_actions=use_actions,
            predictor=predictor,
        ).frames
        real, shown = (at_resolution(x, METRIC_SIZE) for x in (drawn.frames, shown))
        before, actions = real[:, :given], drawn.actions[:, given - 1 :]
        evaluator.update(before, shown[:, given:], real[:, given:], actions)
        for (start, end), sides in parts.items():
            for stats, clip in zip(sides, (real, shown), strict=True):
                window = clip[:, given + start - 1 : given + end]
                stats.update(pair_features(window).flatten(0, 1))
        tick(len(drawn.frames))
    report = {"context": context, **dataclasses.asdict(evaluator.report())}
    report["frechet_by_window"] = {
        f"{start}-{end}": real.distance(predicted)
        for (start, end), (real, predicted) in parts.items()
    }
    return report


SHOWN, HIDDEN = 0.6, 0.2
"""Shares of a toy's largest area in its clip from which it counts as seen, and up to which not."""


def measure_recall(
    model: FrameModel,
    sampling: SamplingConfig,
    *,
    clips: int,
    frames: int,
    seed: int,
    tick: Callable[[int], None],
    predictor: Predictor | None = None,
) -> dict[str, Any]:
    """What comes back from under the arm: where a toy that was seen before has been hidden for some
    latent frames and is seen again in the next, that one is predicted from all true frames before
    it. `area` is the toy's there over its true one, `kept` the share of toys with 0.3 of it, over
    all of them and by how many latent frames they were hidden.

    Raises:
        InputError: if the clips are not 1 + n*t frames long, or no toy comes back in them.
    """
    t = model.config.autoencoder.temporal_compression
    check_length(frames, t)
    found: dict[int, list[float]] = {}
    for first, true in batches(model, clips, 1, frames):
        areas = toy_areas(at_resolution(true.frames, METRIC_SIZE))[0]
        share = (areas / areas.amax(0).clamp(min=1))[::t]  # at the end of every latent frame
        for latent in range(2, len(share)):
            hues = [h for h in range(share.shape[1]) if _returns(share[: latent + 1, h])]
            if not hues:
                continue
            end = 1 + latent * t
            told = None if true.actions is None else true.actions[:, : end - 1]
            made = continue_clips(
                model, sampling, Clips(frames=true.frames[:, :end], actions=told), context=latent,
                seed=seed, first_stream=first, predictor=predictor,
            ).frames  # fmt: skip
            drawn = toy_areas(at_resolution(made[:, -1:], METRIC_SIZE))[0, 0]
            for hue in hues:
                away = _hidden_for(share[:latent, hue])
                found.setdefault(away, []).append(float(drawn[hue] / areas[latent * t, hue]))
        tick(1)
    if not found:
        raise InputError(
            f"recall: no toy comes back in {clips} clips of {frames} frames; take more"
        )

    def told_of(values: list[float]) -> dict[str, float]:
        ratios = torch.tensor(values)
        return {
            "toys": len(values),
            "area": float(ratios.mean()),
            "kept": float((ratios >= KEPT_SHARE).float().mean()),
        }

    every = [value for values in found.values() for value in values]
    by = {str(away): told_of(found[away]) for away in sorted(found)}
    return {"clips": clips, "frames": frames, **told_of(every), "by_hidden_latent_frames": by}


def _hidden_for(share: Tensor) -> int:
    """For how many latent frames a toy has been hidden at the end of (T,)."""
    seen = (share >= HIDDEN).nonzero()
    return len(share) - 1 - int(seen[-1]) if len(seen) else len(share)


def _returns(share: Tensor) -> bool:
    """Whether a toy that was seen, then hidden, is seen again in the last of (T,)."""
    away = _hidden_for(share[:-1])
    before = share[: len(share) - 1 - away]
    return bool(share[-1] > SHOWN and away and (before > SHOWN).any())


SHOWN_CLIPS = 4
"""Recordings that the sheet beside their figures shows."""


@torch.inference_mode()
def measure_recordings(
    model: FrameModel,
    sampling: SamplingConfig,
    source: ClipSource,
    *,
    clips: int,
    context: int,
    batch: int,
    seed: int,
    tick: Callable[[int], None],
    predictor: Predictor | None = None,
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Predictions of any recordings, frame by frame, beside a copy of the last frame given and the
    truth through the autoencoder, which bounds what can be reached. PSNR is that of the mean
    squared error over clips. With actions where model and data have some, and then without, too.

    Returns:
        The figures; the first `SHOWN_CLIPS` and their predictions, uint8 (B, T, H, W, 3).

    Raises:
        InputError: if the context leaves nothing to predict, or frames are under 11 pixels a side.
    """
    given, count = given_frames(model, context), source.frames
    told = bool(model.config.action_dim and source.action_dim)
    sides: dict[str, list[tuple[Tensor, Tensor]]] = {}
    pictures: list[tuple[Tensor, Tensor]] = []
    for first in range(0, clips, batch):
        drawn = source.clips(first, min(batch, clips - first))
        assert isinstance(drawn, Clips)
        real = drawn.frames[:, given:]

        def predicted(drawn: Clips = drawn, first: int = first, **options: bool) -> Tensor:
            return continue_clips(
                model, sampling, drawn, context=context, seed=seed, first_stream=first,
                predictor=predictor, **options,
            ).frames  # fmt: skip

        shown = predicted()
        if first < SHOWN_CLIPS:
            pictures.append((drawn.frames, shown))
        made = {
            "prediction": shown[:, given:],
            "copy": held(drawn.frames, given, count - given),
            "autoencoder": reconstruct(model, drawn.frames)[:, given:],
        }
        if told:
            made["prediction without actions"] = predicted(use_actions=False)[:, given:]
        for name, side in made.items():
            sides.setdefault(name, []).append((psnr(real, side), ssim(real, side)))
        tick(len(real))
    figures = {}
    for name, parts in sides.items():
        each, likeness = (torch.cat(column) for column in zip(*parts, strict=True))
        figures[name] = {
            "psnr_db_of_mean_error": float(psnr_of_mean_error(each)),
            "psnr_db_of_mean_error_by_frame": psnr_of_mean_error(each, 0).tolist(),
            "ssim": float(likeness.mean()),
            "ssim_by_frame": likeness.mean(0).tolist(),
        }
    about = {"clips": clips, "context": context, "frames": count - given, "actions": told}
    real, shown = (torch.cat(column)[:SHOWN_CLIPS] for column in zip(*pictures, strict=True))
    return about | figures, real, shown


ABLATIONS: dict[str, dict[str, Any]] = {
    "no canvas": {"order": "random", "temporal_guidance": 1.0, "canvas_guidance": 1.0},
    "canvas": {"order": "random", "temporal_guidance": 1.0, "canvas_guidance": 1.0},
    "canvas + motion order": {
        "order": "motion", "temporal_guidance": 1.0, "canvas_guidance": 1.0,
    },
    "full guidance": {"order": "motion"},
    "without canvas guidance": {"order": "motion", "canvas_guidance": 1.0},
    "without temporal guidance": {"order": "motion", "temporal_guidance": 1.0},
}  # fmt: skip
"""The curves of the paper's Figure 3 as changes of the sampling configuration: (a) and (b) are
without guidance, (c) removes one branch at a time."""


def measure_ablations(
    model: FrameModel,
    plain: FrameModel,
    sampling: SamplingConfig,
    *,
    steps: tuple[int, ...],
    seeds: int,
    clips: int,
    frames: int,
    context: int,
    batch: int,
    tick: Callable[[int], None],
    before: Callable[[dict[str, Any]], dict[str, Any]] = lambda result: {},
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Frechet distance against AR steps (Figure 3): `plain` is the no-canvas model. Every seed has
    clips of its own, the same for all curves; a point is the mean over seeds, with each seed's
    value beside it.

    Args:
        before: is given the result without its curves and returns those already measured, whose
            points are not measured again.
        keep: is given the result after every point.

    Raises:
        InputError: if `frames` are not whole latent frames.
        ConfigError: if the models do not fit together, or there are more steps than tokens.
    """
    if plain.canvas is not None or model.canvas is None:
        raise ConfigError("ablations: expected a model with a canvas, and the other one without")
    curves = {
        name: (
            plain if name == "no canvas" else model,
            dataclasses.replace(sampling, **changes),
        )
        for name, changes in ABLATIONS.items()
    }
    return measure_curves(
        curves, steps=steps, seeds=seeds, clips=clips, frames=frames, context=context, batch=batch,
        about={"no_canvas_weights": weights_id(plain)}, tick=tick, before=before, keep=keep,
    )  # fmt: skip


def measure_curves(
    models: Mapping[str, tuple[FrameModel, SamplingConfig]],
    *,
    steps: tuple[int, ...],
    seeds: int,
    clips: int,
    frames: int,
    context: int,
    batch: int,
    about: Mapping[str, Any],
    tick: Callable[[int], None],
    before: Callable[[dict[str, Any]], dict[str, Any]] = lambda result: {},
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Frechet distance against AR steps, a curve for each of `models`, which share clips and noise,
    and of a `copy` of the last frame given; other arguments as for `measure_ablations`, `about`
    being what else the result says.

    Raises:
        InputError: if `frames` are not whole latent frames.
        ConfigError: if the models do not fit together, or there are more steps than tokens.
    """
    model = next(iter(models.values()))[0]
    if any(other.config.autoencoder != model.config.autoencoder for other, _ in models.values()):
        raise ConfigError("the models have autoencoders of different configurations")
    check_predicted(model, frames)
    points: dict[tuple[str, int], tuple[FrameModel, SamplingConfig]] = {}
    for name, (network, chosen) in models.items():
        for k in steps:
            set_sizes(network.config.tokens, k)
            points[name, k] = network, dataclasses.replace(chosen, ar_steps=k)
    given = given_frames(model, context)
    result: dict[str, Any] = {
        "clips": clips,
        "frames": frames,
        "context": context,
        "seeds": seeds,
        **about,
    }
    found = before(result)
    curves = result["curves"] = {name: dict(found.get(name, {})) for name in models}

    def features(shown: Tensor) -> Tensor:
        return pair_features(shown[:, given - 1 :]).flatten(0, 1)

    @functools.cache
    def truth(seed: int) -> tuple[list[tuple[int, Clips]], GaussianStats]:
        """The clips of a seed, drawn once for all points, and their statistics."""
        drawn: list[tuple[int, Clips]] = []
        stats = GaussianStats()
        for first, part in batches(model, clips, batch, given + frames, start=seed * clips):
            drawn.append((first, part))
            stats.update(features(part.frames))
        return drawn, stats

    def distance(seed: int, predict: Callable[[int, Clips], Tensor]) -> float:
        """Of what is predicted for the clips of a seed, of which the first's number is given."""
        predicted, (drawn, real) = GaussianStats(), truth(seed)
        for first, part in drawn:
            predicted.update(features(predict(first, part)))
        return real.distance(predicted)

    def continued(
        network: FrameModel, chosen: SamplingConfig, seed: int, first: int, part: Clips
    ) -> Tensor:
        shown = continue_clips(
            network, chosen, part, context=context, seed=seed, first_stream=first
        )
        tick(len(part.frames))
        return shown.frames

    def copied(first: int, part: Clips) -> Tensor:
        return torch.cat([part.frames[:, :given], held(part.frames, given, frames)], dim=1)

    result["copy"] = sum(distance(seed, copied) for seed in range(seeds)) / seeds
    for (name, k), (network, chosen) in points.items():
        if str(k) in curves[name]:
            tick(clips * seeds)
            continue
        distances = [
            distance(seed, functools.partial(continued, network, chosen, seed))
            for seed in range(seeds)
        ]
        curves[name][str(k)] = {"mean": sum(distances) / seeds, "seeds": distances}
        curves[name] = dict(sorted(curves[name].items(), key=lambda point: int(point[0])))
        keep(result)
    return result
