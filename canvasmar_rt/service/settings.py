"""What the service can be told."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from canvasmar_rt.bundle import DEMO_CLIP
from canvasmar_rt.config import TOYTABLE_SPEED, ModelConfig, coerce_fields
from canvasmar_rt.errors import ConfigError

_SERVER = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s]+")
BUDGET_SHARE = 0.8
"""Of a tick; the rest is for seating newcomers and for the machine's hiccups."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of `create_app`.

    slots: videos predicted at once, the batch of the one rollout; it never changes.
    fps: pixel frames a second, the model's own if None. A tick is t pixel frames.
    budget_ms: milliseconds from a tick's start in which its frames should be ready; 80% of a tick
        if None.
    max_sessions: clients connected at once; those beyond `slots` wait for a free place.
    max_message_bytes, max_message_rate: limits on what a client sends, and how often in a second.
    stall_s: seconds after which a client that takes no data is disconnected.
    action_limit: largest absolute value of an action's number, in the units of the model's training
        data. The default is ToyTable's top speed in table widths a pixel frame.
    seed: same seed and same order of starts, same videos.
    clip: the video, folder or archive that start pictures are cut from.
    origins: web pages of other servers whose scripts may connect, such as "https://game.example";
        "*" stands for all. Programs that are no pages always may.
    """

    slots: int = 2
    fps: float | None = None
    budget_ms: float | None = None
    max_sessions: int = 16
    max_message_bytes: int = 2048
    max_message_rate: int = 60
    stall_s: float = 10.0
    action_limit: float = TOYTABLE_SPEED
    seed: int = 0
    clip: Path = DEMO_CLIP
    origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        coerce_fields(self)
        for name in ("slots", "max_sessions", "max_message_bytes", "max_message_rate"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"seed must lie in [0, 2**64), got {self.seed}")
        for name in ("fps", "budget_ms", "stall_s", "action_limit"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{name} must be a positive number, got {value}")
        for origin in self.origins:
            if origin not in ("*", "null") and not _SERVER.fullmatch(origin):
                raise ConfigError(
                    f"origins: a page's scheme and server alone, as https://game.example, or *; "
                    f"got {origin!r}"
                )

    def tick_s(self, config: ModelConfig) -> float:
        """Seconds of a tick, in which one latent frame, or one group of them, is predicted.

        Raises:
            ConfigError: if that is more than an hour: threads cannot wait for any length of time.
        """
        tick = config.step_frames / (self.fps or config.fps)
        if tick > 3600:
            raise ConfigError(f"fps: a tick would take {tick:g} s, at most 3600; raise fps")
        return tick

    def budget_s(self, config: ModelConfig) -> float:
        """Seconds from a tick's start to its deadline.

        Raises:
            ConfigError: if that is more than a tick.
        """
        tick = self.tick_s(config)
        if self.budget_ms is None:
            return BUDGET_SHARE * tick
        if self.budget_ms > 1e3 * tick:
            raise ConfigError(
                f"budget_ms: {self.budget_ms:g} is more than a tick of {1e3 * tick:g} ms; lower it "
                "or the frame rate"
            )
        return self.budget_ms / 1e3
