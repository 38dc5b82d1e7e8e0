"""The soak's clients against a server that only keeps time."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

import pytest

from canvasmar_rt.benchmarks import latency, service_soak
from canvasmar_rt.errors import ConfigError, EngineError
from canvasmar_rt.service.settings import Settings

from .conftest import FakePredictor, Running


def test_what_the_soak_sees(serve: Callable[..., Running], fake: FakePredictor) -> None:
    running = serve(fake, slots=3)
    url = f"http://127.0.0.1:{running.port}/"
    seen = asyncio.run(
        service_soak._soak(url, os.getpid(), 1.0, clients=3, stalled=1, garbage=1, tick_s=0.04)
    )
    assert len(seen["readers"]) == 2
    for reader in seen["readers"]:
        assert reader["share_of_rate"] > 0.9
        assert reader["pictures"] >= 20
        assert reader["ended"] == ""
    first = next(iter(seen["garbage_ended"]))
    assert first == "1007 Invalid JSON: EOF while parsing an object at line 1 column 1"
    assert seen["server"]['canvasmar_session_ends_total{reason="malformed"}'] >= 1
    assert 1 < seen["resident_mb_at_start"] <= seen["resident_mb_at_most"]


def test_a_reader_that_is_cut_off_loses_its_share() -> None:
    reader = service_soak.Reader(got=10, first_s=100.0)
    assert reader.report(0.1, 100.95)["share_of_rate"] == 1
    assert reader.report(0.1, 101.95)["share_of_rate"] == 0.5


def test_somebody_must_read() -> None:
    with pytest.raises(ConfigError, match="at least one must read"):
        service_soak.soak("toytable-int8", Settings(), seconds=4, clients=2, stalled=2, garbage=0)


def test_a_soak_where_memory_cannot_be_read_is_refused_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(latency, "_status", lambda field: None)
    with pytest.raises(EngineError, match="only Linux has"):
        service_soak.soak("none", Settings(), seconds=4, clients=2, stalled=1, garbage=0)
