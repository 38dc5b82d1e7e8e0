"""What a training run is: optimisation, the two stages, and named configurations.

Table 3 and section 8 of the specification give the model's losses and augmentations; what a paper
leaves open (learning rate, warm-up) is a default here and can be overridden by name.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from canvasmar_rt.config import ModelConfig, SamplingConfig, preset
from canvasmar_rt.errors import ConfigError

Precision = Literal["fp32", "bf16"]
OptimizerName = Literal["adamw", "muon"]
FlowTime = Literal["uniform", "logit-normal"]
FlowTimeOf = Literal["token", "frame"]
Teacher = Literal["ctf", "mtf", "next-frame"]


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def _require_amounts(config: object, *names: str) -> None:
    for name in names:
        _require(
            0 <= getattr(config, name) < math.inf,
            f"training: {name} must be finite and not negative",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The optimisation of either stage. `batch` counts the clips of all ranks; `frames` is the
    length of a clip in pixel frames. The learning rate warms up linearly, stays, and falls
    linearly to zero over the last `decay_steps`. With `minutes` the clock ends the training, after
    whatever steps there were time for, and the learning rate falls over the same share of the time.
    `bf16` runs the networks under autocast with float32 weights. "muon" orthogonalises the updates
    of the matrices of transformer blocks and of convolutions, scaled to AdamW's size; all other
    weights keep AdamW."""

    steps: int
    batch: int
    frames: int = 17
    seed: int = 0
    precision: Precision = "bf16"
    optimizer: OptimizerName = "adamw"
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.02
    warmup_steps: int = 1000
    decay_steps: int = 0
    minutes: float = 0.0
    clip_norm: float = 1.0
    ema_decay: float = 0.9999
    checkpoint_every: int = 5000
    keep_checkpoints: int = 2
    log_every: int = 20
    sample_every: int = 5000

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "frames", "checkpoint_every", "keep_checkpoints"):
            _require(getattr(self, name) >= 1, f"training: {name} must be at least 1")
        for name in ("warmup_steps", "decay_steps", "sample_every"):
            _require(getattr(self, name) >= 0, f"training: {name} must not be negative")
        _require_amounts(self, "weight_decay", "minutes")
        _require(self.log_every >= 1, "training: log_every must be at least 1")
        _require(0 <= self.seed < 2**63, "training: seed must lie in [0, 2**63)")
        _require(
            0 < self.learning_rate < math.inf,
            "training: learning_rate must be above 0 and finite",
        )
        _require(all(0 <= b < 1 for b in self.betas), "training: betas must lie in [0, 1)")
        _require(self.clip_norm > 0, "training: clip_norm must be above 0")
        _require(0 <= self.ema_decay < 1, "training: ema_decay must lie in [0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderTraining(RunConfig):
    """Autoencoder: L1 + gradient term + KL. `kl_weight` multiplies the KL of one latent frame in
    nats, summed over its tokens and channels; `gradient_weight` the L1 of spatial differences.
    With `freeze_encoder` only the decoder learns: latents and their scale stay, and so do models
    trained on them."""

    kl_weight: float = 1e-6
    gradient_weight: float = 1.0
    statistics_clips: int = 128
    freeze_encoder: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_amounts(self, "kl_weight", "gradient_weight")
        _require(self.statistics_clips >= 1, "training: statistics_clips must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelTraining(RunConfig):
    """The second stage (eq. 10). Drop probabilities are per latent frame (sec. 4.4), `action_drop`
    per clip half the time and per latent frame otherwise, so that a model also runs whole clips
    without actions. `history_noise` is the largest deviation of the noise added to each latent
    frame the Temporal ViT reads (not in the paper; MAGI's noise on the clean copies).
    `own_history` (not in the paper): clips stay in the batch for so many steps more, and after
    each all their frames but the first are predicted from the clips as they stand and take their
    places as history, which so carries the errors of that many frames drawn one after another.
    What is to be predicted stays the truth. `flow_repeat` flow times are drawn per token (MAR's
    multiplier), or with `flow_time_of` "frame" for the tokens of a latent frame together: additive
    modulation then embeds a time a frame, which takes an eighth off a step.

    `mask_all` (not in the paper) is the chance of a step to mask every token, which MAR's
    distribution of the mask ratio hardly ever does: what a single AR step has to draw.

    `mar_weight` multiplies L_MAR; with 0 the Temporal ViT and the Canvas ViT learn alone, in less
    time, and the others keep their weights.

    Unified models alone: `teacher` is what a masked frame sees of the frames before it: their
    clean copies ("ctf", MAGI's complete teacher forcing), masked copies ("mtf", its ablation), or
    clean frames before the one masked frame that ends the clip ("next-frame", VideoMAR).
    `frame_intervals`: a step's clips keep every s-th latent frame, s drawn from 1 to this (MAGI's
    dynamic intervals). `lengths`: latent frames of the clips, each for an equal share of the steps
    (VideoMAR's short-to-long curriculum; empty: whole clips), which a training by the clock does
    not know."""

    mar_weight: float = 1.0
    canvas_weight: float = 0.1
    static_weight: float = 0.1
    canvas_drop: float = 0.05
    temporal_drop: float = 0.05
    both_drop: float = 0.05
    action_drop: float = 0.1
    frame_noise: tuple[float, float] = (0.2, 0.6)
    canvas_noise: tuple[float, float] = (0.0, 0.3)
    history_noise: float = 0.0
    own_history: int = 0
    mask_ratio_min: float = 0.7
    mask_ratio_std: float = 0.25
    mask_all: float = 0.0
    flow_repeat: int = 4
    flow_time: FlowTime = "uniform"
    flow_time_of: FlowTimeOf = "token"
    teacher: Teacher = "ctf"
    frame_intervals: int = 1
    lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.frame_intervals >= 1, "training: frame_intervals must be at least 1")
        _require(all(n >= 2 for n in self.lengths), "training: lengths must be at least 2")
        _require(
            not (self.lengths and self.minutes),
            "training: lengths are shares of the steps, whose number minutes leave open; set steps",
        )
        drops = self.canvas_drop, self.temporal_drop, self.both_drop
        _require(min(drops) >= 0 and sum(drops) <= 1, "training: drops must be chances, sum <= 1")
        _require(0 <= self.action_drop <= 1, "training: action_drop must lie in [0, 1]")
        for name in ("frame_noise", "canvas_noise"):
            low, high = getattr(self, name)
            _require(0 <= low <= high <= 1, f"training: {name} must be a range within [0, 1]")
        _require(0 <= self.history_noise <= 1, "training: history_noise must lie in [0, 1]")
        _require(0 <= self.mask_ratio_min <= 1, "training: mask_ratio_min must lie in [0, 1]")
        _require(0 <= self.mask_all <= 1, "training: mask_all must lie in [0, 1]")
        _require(
            0 < self.mask_ratio_std < math.inf,
            "training: mask_ratio_std must be above 0 and finite",
        )
        _require_amounts(self, "mar_weight", "canvas_weight", "static_weight")
        _require(self.own_history >= 0, "training: own_history must not be negative")
        _require(self.flow_repeat >= 1, "training: flow_repeat must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named configuration: the network, how it samples, and both stages."""

    model: ModelConfig
    sampling: SamplingConfig
    autoencoder: AutoencoderTraining
    training: ModelTraining


def bair() -> Recipe:
    """Table 3, BAIR: batch 192, 600 epochs of 43,264 clips."""
    model, sampling = preset("bair")
    return Recipe(
        model=model,
        sampling=sampling,
        autoencoder=AutoencoderTraining(steps=200_000, batch=32, learning_rate=1e-4),
        training=ModelTraining(steps=135_000, batch=192),
    )


def ucf101() -> Recipe:
    """Table 3, UCF-101: batch 64, 800 epochs of 9,537 training clips."""
    model, sampling = preset("ucf101")
    return Recipe(
        model=model,
        sampling=sampling,
        autoencoder=AutoencoderTraining(steps=200_000, batch=16, learning_rate=1e-4),
        training=ModelTraining(steps=119_000, batch=64),
    )


def kinetics600() -> Recipe:
    """Table 3, Kinetics-600: batch 192, 270 epochs of about 400,000 clips."""
    model, sampling = preset("kinetics600")
    return Recipe(
        model=model,
        sampling=sampling,
        autoencoder=AutoencoderTraining(steps=400_000, batch=32, learning_rate=1e-4),
        training=ModelTraining(steps=562_000, batch=192),
    )


def toytable() -> Recipe:
    """The small world, for hours of two CPU cores or minutes of a GPU. The model's clips are longer
    than its window and than the autoencoder remembers (10 latent frames): in shorter ones it would
    never meet what it meets in a long rollout."""
    model, sampling = preset("toytable")
    return Recipe(
        model=model,
        sampling=sampling,
        autoencoder=AutoencoderTraining(
            steps=4_500, batch=8, frames=13, optimizer="muon", learning_rate=2e-3,
            warmup_steps=50, decay_steps=2_200, weight_decay=0.0, ema_decay=0.995,
            checkpoint_every=500, sample_every=500,
        ),
        training=ModelTraining(
            steps=12_000, batch=8, frames=25, optimizer="muon", learning_rate=2e-3,
            warmup_steps=100, decay_steps=4_000, ema_decay=0.998, checkpoint_every=250,
            sample_every=500, flow_repeat=1, flow_time_of="frame", history_noise=0.15,
        ),
    )  # fmt: skip


def toytable_unified() -> Recipe:
    """`toytable` as a unified model: MAGI by default, VideoMAR with `teacher` next-frame."""
    return dataclasses.replace(toytable(), model=preset("toytable_unified")[0])


def toytable_next_2() -> Recipe:
    """`toytable`, two latent frames at a time: a tenth of its training, from its weights."""
    base = toytable()
    training = dataclasses.replace(base.training, steps=1_200, decay_steps=600)
    return dataclasses.replace(base, model=preset("toytable_next_2")[0], training=training)


RECIPES = {
    f.__name__: f for f in (bair, ucf101, kinetics600, toytable, toytable_unified, toytable_next_2)
}


def recipe(name: str) -> Recipe:
    """A named configuration.

    Raises:
        ConfigError: if there is none of that name; the message lists those there are.
    """
    if name not in RECIPES:
        raise ConfigError(f"no training configuration {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]()
