"""What the service counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0)


class Metrics:
    """Counters of one application, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.sessions = Gauge(
            "canvasmar_sessions", "Sessions connected, playing or waiting.", registry=registry
        )
        self.ticks = Counter(
            "canvasmar_ticks", "Ticks, by the AR steps of what was predicted.", ["ar_steps"],
            registry=registry,
        )  # fmt: skip
        self.missed = Counter(
            "canvasmar_missed_deadlines", "Ticks whose frames came too late.", registry=registry
        )
        self.latency = Histogram(
            "canvasmar_tick_latency_seconds", "From a tick's start to its frames.",
            buckets=BUCKETS, registry=registry,
        )  # fmt: skip
        self.sent = Counter("canvasmar_frames_sent", "Messages of pictures.", registry=registry)
        self.dropped = Counter(
            "canvasmar_frames_dropped", "Messages a slow client never got.", registry=registry
        )
        self.ends = Counter(
            "canvasmar_session_ends", "Sessions ended, by reason.", ["reason"], registry=registry
        )
