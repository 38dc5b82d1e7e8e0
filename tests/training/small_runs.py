"""A source of 16x16 clips that costs nothing, and both stages on it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from canvasmar_rt.models.families import build
from tests.conftest import SAMPLING, small_config
from training.clips import Clips, LatentClips
from training.config import AutoencoderTraining, ModelTraining
from training.losses import open_skips, zero_outputs
from training.stages import AutoencoderStage, ModelStage
from training.trainer import Ranks, Trainer

ONE = Ranks(0, 1, torch.device("cpu"))


@dataclass(frozen=True, kw_only=True)
class Waves:
    """Coloured waves that their actions move, 16x16 pixels."""

    frames: int = 5
    height: int = 16
    width: int = 16
    action_dim: int = 2
    seed: int = 0

    def clips(self, first: int, count: int) -> Clips | LatentClips:
        frames, actions = [], []
        y, x = np.mgrid[0 : self.height, 0 : self.width] / 16
        for index in range(first, first + count):
            rng = np.random.default_rng((self.seed, index))
            moves = rng.normal(0, 0.5, (self.frames - 1, 2)).astype(np.float32)
            place = np.cumsum(np.concatenate([rng.uniform(0, 6, (1, 2)), moves]), axis=0)
            phase = rng.uniform(0, 6, 3)
            waves = [
                np.sin(6 * x + place[:, :1, None] + p) * np.cos(6 * y + place[:, 1:, None])
                for p in phase
            ]
            frames.append((127.5 + 127 * np.stack(waves, axis=-1)).astype(np.uint8))
            actions.append(moves)
        told = torch.from_numpy(np.stack(actions)) if self.action_dim else None
        return Clips(frames=torch.from_numpy(np.stack(frames)), actions=told)


def autoencoder_stage(**changes: Any) -> AutoencoderStage:
    options: dict[str, Any] = {
        "steps": 6, "batch": 4, "frames": 5, "learning_rate": 3e-3, "warmup_steps": 0,
        "weight_decay": 0.0, "statistics_clips": 4, "log_every": 1, "checkpoint_every": 100,
        "sample_every": 0, "precision": "fp32", "ema_decay": 0.9,
    }  # fmt: skip
    model = build(small_config(), seed=0)
    open_skips(model.autoencoder)
    config = AutoencoderTraining(**options | changes)
    return AutoencoderStage(model, SAMPLING, config, Waves(seed=1))


def model_stage(**changes: Any) -> ModelStage:
    options: dict[str, Any] = {
        "steps": 6, "batch": 4, "frames": 5, "learning_rate": 2e-3, "warmup_steps": 0,
        "log_every": 1, "checkpoint_every": 100, "sample_every": 0, "precision": "fp32",
        "flow_repeat": 1, "ema_decay": 0.9,
    }  # fmt: skip
    model = build(small_config(), seed=0)
    zero_outputs(model)
    return ModelStage(model, SAMPLING, ModelTraining(**options | changes), Waves(seed=1))


def history_stage(**changes: Any) -> ModelStage:
    return model_stage(own_history=2, **changes)


STAGES = {"autoencoder": autoencoder_stage, "model": model_stage, "history": history_stage}


def trainer(stage: Any, directory: Path, ranks: Ranks = ONE, **options: Any) -> Trainer:
    return Trainer(stage, Waves(), directory, ranks=ranks, quiet=True, **options)


def logged(directory: Path) -> list[dict[str, float]]:
    """The lines of a run's log, without the clock."""
    lines = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
