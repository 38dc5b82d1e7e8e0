"""The arithmetic of a comparison, on contestants whose times are known."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import canvasmar_rt
from canvasmar_rt.benchmarks import baselines, latency, random_models, report
from canvasmar_rt.benchmarks.contestants import Played, RolloutContestant
from canvasmar_rt.benchmarks.latency import (
    OURS,
    BenchOptions,
    bench,
    moving_clip,
    percentiles,
    play_in_turn,
    ratios,
    summary,
)
from canvasmar_rt.bundle import Bundle
from canvasmar_rt.config import ModelConfig, preset
from canvasmar_rt.errors import ConfigError, EngineError, InputError
from canvasmar_rt.rollout import Predictor


class Fixed:
    """Plays clips of known times and notes the order of calls."""

    described: Mapping[str, object] = {"engine": "none", "device": "cpu", "arithmetic": "float32"}

    def __init__(self, name: str, clip: Played, calls: list[str], *, chunked: bool = False) -> None:
        self.name, self.chunked = name, chunked
        self._clip, self._calls = clip, calls

    def play(self, frames: int) -> Played:
        assert frames == len(self._clip.ready)
        self._calls.append(self.name)
        return self._clip


STREAM = Played((0.010, 0.030, 0.060), (0.001, 0.002, 0.003), {"flow": 0.03, "noise": 0.003})
CHUNK = Played((0.100, 0.110, 0.120), (0.010, 0.020, 0.030), {})


def test_contestants_take_turns_and_warm_up_is_not_kept() -> None:
    calls: list[str] = []
    a, b = Fixed("a", STREAM, calls), Fixed("b", CHUNK, calls, chunked=True)
    played = play_in_turn([a, b], 3, warmup=1, iterations=2)
    assert calls == ["a", "a", "b", "b"] * 3  # short clips settle first
    assert {name: len(clips) for name, clips in played.items()} == {"a": 2, "b": 2}
    calls.clear()
    slow = Fixed("slow", Played((2.0, 3.0, 4.0), None, {}), calls)
    play_in_turn([slow], 3, warmup=0, iterations=2)
    assert calls == ["slow", "slow"]


def test_what_was_measured_before_an_interrupt_is_kept(predictor: Predictor) -> None:
    kept: list[int] = []

    def broken(context: np.ndarray, batch: int) -> Fixed:
        if batch == 2:
            raise KeyboardInterrupt
        return Fixed("broken", Played((0.1,), None, {}), [])

    options = BenchOptions(batches=(1, 2), frames=1, warmup=0, iterations=1)
    with pytest.raises(KeyboardInterrupt):
        bench(
            predictor, options, {"broken": broken},
            so_far=lambda report: kept.extend(m["batch"] for m in report["metrics"]),
        )  # fmt: skip
    assert kept == [1]


def test_a_frame_is_the_time_between_pixels() -> None:
    found = summary([STREAM], pixel_frames=12, chunked=False)
    assert found["frame_ms"]["p50"] == pytest.approx(20.0)  # of 10, 20 and 30
    assert found["first_frame_ms"]["p50"] == pytest.approx(10.0)
    assert found["clip_ms"]["p50"] == pytest.approx(60.0)
    assert found["clip_without_autoencoder_ms"]["p50"] == pytest.approx(57.0)
    assert found["pixel_frames_per_second"] == pytest.approx(200.0)
    assert found["component_ms"] == {"flow": 10.0, "noise": 1.0}
    assert found["outside_engine_share"] == pytest.approx(0.05)


def test_frames_that_are_ready_at_once_share_their_time() -> None:
    pairs = Played((0.2, 0.2, 0.3, 0.3), None, {})
    found = summary([pairs], 8, chunked=False)
    assert found["frame_ms"]["p50"] == pytest.approx(75.0)
    assert found["first_frame_ms"]["p50"] == pytest.approx(200.0)


def test_one_turn_has_no_spread() -> None:
    once, ours = [Played((0.4,), None, {})], [Played((0.2,), None, {})]
    assert report._spread(ratios(once, ours)["clip"]) == "2"
    assert report._spread(ratios(once * 2, ours + once)["clip"]) == "1.5 ±33%"


def test_a_batch_that_does_not_fit_is_refused_before_anything_is_measured(
    predictor: Predictor,
) -> None:
    said: list[str] = []
    with pytest.raises(InputError, match="bench: batch 1000 is outside"):
        bench(predictor, BenchOptions(batches=(1, 1000)), {}, lambda what, *_: said.append(what))
    assert said == []


def test_windows_are_drawn_in_order() -> None:
    """In whatever order they were measured."""
    parts = {f"history={n}": {"spatial": 1.0 + n, "canvas": 2.0} for n in (1, 2, 8)}
    swapped = dict(reversed(parts.items()))
    assert report._history("x", parts) == report._history("x", swapped)


def test_a_chunk_has_one_rate() -> None:
    found = summary([CHUNK], pixel_frames=3, chunked=True)
    assert found["frame_ms"]["p50"] == found["frame_ms"]["p99"] == pytest.approx(40.0)
    assert found["first_frame_ms"]["p50"] == pytest.approx(100.0)
    assert "component_ms" not in found


def test_ratios_are_taken_per_turn() -> None:
    """A machine that gets three times slower from one turn to the next moves no ratio."""

    def slower(clip: Played) -> Played:
        assert clip.decoding is not None
        return Played(
            tuple(3 * s for s in clip.ready), tuple(3 * s for s in clip.decoding), clip.parts
        )

    found = ratios([CHUNK, slower(CHUNK)], [STREAM, slower(STREAM)])
    assert found["first_frame"] == {"p5": 10.0, "median": 10.0, "p95": 10.0}
    assert found["clip"]["median"] == pytest.approx(2.0)
    assert found["clip_without_autoencoder"]["median"] == pytest.approx(0.09 / 0.057, abs=1e-3)
    unknown = Played(CHUNK.ready, None, {})
    assert set(ratios([unknown], [STREAM])) == {"first_frame", "clip"}


@pytest.fixture(scope="module")
def predictor(bundles: Callable[[str], Bundle]) -> Predictor:
    return canvasmar_rt.load(bundles("expert").path, threads=1)


@pytest.fixture(scope="module")
def measured(predictor: Predictor) -> dict[str, Any]:
    options = BenchOptions(batches=(1, 2), context=1, iterations=2, warmup=0, soak=101)
    others = baselines.sweep(predictor, "ar_steps=1,3", seed=0)
    return bench(predictor, options, others)


def test_a_report_is_complete(measured: dict[str, Any], predictor: Predictor) -> None:
    config = measured["config"]
    assert config["frames"] == predictor.config.context_frames - 1
    assert set(config["contestants"]) == {OURS, "ar_steps=1", "ar_steps=3"}
    assert config["contestants"]["ar_steps=3"]["sampling"]["ar_steps"] == 3
    assert [row["batch"] for row in measured["metrics"]] == [1, 2]
    for row in measured["metrics"]:
        assert row["over_ours"]["ar_steps=1"]["clip"]["median"] > 0
        ours = row["contestants"][OURS]
        assert ours["component_ms"]["decoder"] > 0
        assert 0 < ours["outside_engine_share"] < 1
        assert ours["clip_ms"]["p50"] > ours["first_frame_ms"]["p50"] > 0
        assert ours["peak_host_mb"] >= 0
    assert measured["soak"]["resident_mb_at_end"] > 0


def test_csv_holds_every_number(measured: dict[str, Any]) -> None:
    rows = list(csv.DictReader(io.StringIO(report.as_csv(measured))))
    found = {(r["batch"], r["system"], r["quantity"], r["statistic"]): r["value"] for r in rows}
    row = measured["metrics"][1]
    assert float(found["2", OURS, "frame_ms", "p99"]) == row["contestants"][OURS]["frame_ms"]["p99"]
    ratio = row["over_ours"]["ar_steps=3"]["clip"]["median"]
    assert float(found["2", "ar_steps=3", "clip_over_ours", "median"]) == ratio
    assert len(found) == len(rows)


def test_pictures_are_drawn(measured: dict[str, Any]) -> None:
    pictures = report.pictures(measured)
    drawn = {"first_frame.png", "clip.png", "throughput.png", "components.png", "ar_steps.png"}
    assert set(pictures) == drawn
    for png in pictures.values():
        assert np.asarray(Image.open(io.BytesIO(png)).convert("L")).std() > 5


def test_contestants_repeat_the_same_clip(predictor: Predictor) -> None:
    """Every turn starts from the context: the state left behind is the same."""
    context = moving_clip(predictor.config, 2)
    contestant = RolloutContestant(OURS, predictor, context, batch=1, seed=0)
    latents = []
    for _ in range(2):
        contestant.play(2)
        latents.append(contestant._rollout.state().arrays["latent"].copy())
    assert np.array_equal(*latents)
    contestant.play(1)
    assert not np.array_equal(contestant._rollout.state().arrays["latent"], latents[0])


def test_scaled_models_keep_their_depths() -> None:
    model, _ = preset("kinetics600")
    small = random_models.scaled(model, 4)
    assert (small.dim, small.heads, small.flow.width) == (256, 4, 320)
    assert small.autoencoder.widths == (32, 64, 128)
    assert small.spatial_layers == model.spatial_layers
    assert small.tokens == model.tokens
    with pytest.raises(ConfigError, match="does not divide"):
        random_models.scaled(model, 3)


def test_the_window_of_a_preset_can_be_swept(predictor: Predictor) -> None:
    there = baselines.sweep(predictor, "history=3", seed=0)["history=3"](
        moving_clip(predictor.config, 2), 1
    )
    assert isinstance(there, RolloutContestant)
    assert there._rollout.config.context_frames == 3
    assert there.play(1).ready[0] > 0


def test_history_beside_a_unified_model(
    predictor: Predictor, bundles: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both families at every window, drawn as two curves each."""
    asked = []

    def exported(there: Predictor, config: ModelConfig, *_: Any, **__: Any) -> Predictor:
        asked.append((config.family, config.context_frames, config.temporal_layers))
        name = "unified" if config.family == "unified" else "expert"
        return canvasmar_rt.load(bundles(name).path, threads=1)

    monkeypatch.setattr(baselines, "random_like", exported)
    both = baselines.sweep(predictor, "history=2,3", seed=0, beside=True)
    assert list(both) == ["history=2", "history=3", "unified history=2", "unified history=3"]
    others = baselines.sweep(predictor, "history=3", seed=0, beside=True)
    measured = bench(
        predictor, BenchOptions(batches=(1,), context=1, frames=1, iterations=1), others
    )
    model = predictor.config
    layers = model.temporal_layers + model.canvas_layers + model.spatial_layers
    assert asked == [("canvasmar", 3, model.temporal_layers), ("unified", 3, layers)]
    unified = measured["metrics"][0]["contestants"]["unified history=3"]
    assert "canvas" not in unified["component_ms"]
    assert unified["component_ms"]["spatial"] > 0
    assert (
        np.asarray(
            Image.open(io.BytesIO(report.pictures(measured)["history.png"])).convert("L")
        ).std()
        > 5
    )


def test_a_group_is_there_at_once(bundles: Callable[[str], Bundle], predictor: Predictor) -> None:
    """Six latent frames from groups of three: two steps, the first three ready together."""
    groups = canvasmar_rt.load(bundles("next-group").path, threads=1)
    context = moving_clip(groups.config, 2)
    system = RolloutContestant("groups", groups, context, batch=1, seed=0)
    played = system.play(6)
    assert len(played.ready) == 6
    assert played.ready[0] == played.ready[2] < played.ready[3]
    with pytest.raises(
        ConfigError, match="4 latent frames are no whole groups of 3; give --frames 3"
    ):
        system.play(4)
    window = dataclasses.replace(groups.config, context_frames=7)
    assert BenchOptions(context=2).predicted(window) == 3  # of five
    assert BenchOptions(context=1, baselines=("dfot", "next-group")).predicted(window) == 6
    with pytest.raises(ConfigError, match="no whole groups of 12; give --frames 12"):
        BenchOptions(frames=18, baselines=("next-group:4",)).predicted(window)
    make = baselines.baselines(predictor, ("next-group:2",), seed=0)["next-group:2"]
    with pytest.raises(ConfigError, match=r"^baseline next-group:2: .*every fourth spatial layer"):
        make(context, 1)


@pytest.mark.parametrize("text", ["ar_steps", "ar_steps=", "ar_steps=a", "colour=1"])
def test_a_sweep_that_makes_no_sense(predictor: Predictor, text: str) -> None:
    with pytest.raises(ConfigError, match="ar_steps=1,2,4,8"):
        baselines.sweep(predictor, text, seed=0)


@pytest.mark.parametrize("name", ["dream", "no-canvas:", "no-canvas:x", "no-canvas:0"])
def test_an_unknown_baseline(predictor: Predictor, name: str) -> None:
    with pytest.raises(ConfigError, match="naive-onnx"):
        baselines.baselines(predictor, (name,), seed=0)


def test_a_context_must_leave_a_frame(predictor: Predictor) -> None:
    full = BenchOptions(context=predictor.config.context_frames)
    with pytest.raises(ConfigError, match="--frames"):
        full.predicted(predictor.config)
    with pytest.raises(ConfigError, match="at least 1"):
        BenchOptions(context=0)
    with pytest.raises(ConfigError, match="at most 1024"):
        BenchOptions(context=10**30)


def test_a_batch_size_is_measured_once() -> None:
    with pytest.raises(ConfigError, match=r"twice in \(2, 1, 1\)"):
        BenchOptions(batches=(2, 1, 1))


def test_throughput_counts_the_frames_of_all_videos(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        latency, "RolloutContestant", lambda name, *_, **__: Fixed(name, STREAM, [])
    )
    rows = bench(predictor, BenchOptions(batches=(1, 4), frames=3, iterations=1), {})["metrics"]
    t = predictor.config.autoencoder.temporal_compression
    for row in rows:
        rate = row["contestants"][OURS]["pixel_frames_per_second"]
        assert rate == pytest.approx(row["batch"] * 3 * t / 0.060, abs=0.01)


def test_a_soak_compares_its_end_with_its_hundredth_frame(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="longer than 100 frames"):
        BenchOptions(soak=100)
    resident = iter([1, 200_000_000, 210_000_000])  # the first is asked for before anything runs
    monkeypatch.setattr(latency, "resident_bytes", lambda: next(resident))
    timed: list[int] = []
    monkeypatch.setattr(latency, "percentiles", lambda s: timed.append(len(s)) or {"p50": 1.0})
    said: list[int] = []
    made = bench(
        predictor, BenchOptions(frames=1, iterations=1, warmup=0, soak=103), {},
        so_far=lambda told: said.append(len(told["metrics"])),
    )  # fmt: skip
    assert made["soak"]["growth"] == 0.05
    assert (made["soak"]["resident_mb_at_100"], made["soak"]["resident_mb_at_end"]) == (
        200.0,
        210.0,
    )
    assert timed[-1] == 3
    assert said == [1]  # an interrupted soak keeps what was measured before it


def test_a_soak_where_memory_cannot_be_read_is_refused_first(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows and macOS; what is measured beside it is measured without."""
    monkeypatch.setattr(latency, "_status", lambda field: None)
    told: list[str] = []
    options = BenchOptions(frames=1, iterations=1, warmup=0, soak=103)
    with pytest.raises(EngineError, match="only Linux has; run it there"):
        bench(predictor, options, {}, lambda what, done, total: told.append(what))
    assert not told
    made = bench(predictor, dataclasses.replace(options, soak=0), {})
    assert "peak_host_mb" not in made["metrics"][0]["contestants"][OURS]
    assert report.table(made).row_count == 1


def test_percentiles_are_in_ms() -> None:
    found = percentiles([0.001 * i for i in range(101)])
    assert found == {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "jitter": 29.155}


def made_up(**ours: Any) -> dict[str, Any]:
    """Of two systems at two batch sizes; every number is another."""

    def system(base: float) -> dict[str, Any]:
        return {
            "first_frame_ms": {"p50": base + 1.0},
            "frame_ms": {"p50": base + 2.0, "p95": base + 2.5, "p99": base + 3.0},
            "clip_ms": {"p50": base + 4.0}, "pixel_frames_per_second": base + 5.0,
            "component_ms": {"condition": 8.0, "spatial": 4.0, "flow": 16.0, "total": 28.0},
        }  # fmt: skip

    def ratio(median: float) -> dict[str, float]:
        return {"p5": median - 0.5, "median": median, "p95": median + 0.5}

    told = {"engine": "onnxruntime", "device": "cpu", "arithmetic": "float32"} | ours
    return {
        "config": {"model": "m", "frames": 3, "contestants": {OURS: told, "other": told}},
        "metadata": {"cpu": "a CPU"},
        "metrics": [
            {"batch": b, "contestants": {OURS: system(10.0 * b), "other": system(10.0 * b + 50)},
             "over_ours": {"other": {"first_frame": ratio(5.0), "clip": ratio(2.0)}}}
            for b in (1, 2)
        ],
    }  # fmt: skip


def test_a_table_holds_medians_the_worst_and_ratios() -> None:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(report.table(made_up()))
    rows = [line.split() for line in capture.get().splitlines()]
    assert ["1", "ours", "11.0", "12.0", "13.0", "14.0", "15.0"] in rows
    assert [
        "2", "other", "71.0", "72.0", "73.0", "74.0", "75.0", "5", "±10%", "2", "±25%",
    ] in rows  # fmt: skip
    assert "float32" in capture.get()
    assert report.where(made_up(quantization="int8")) == "onnxruntime int8 on a CPU"
    assert report.where(made_up()) == "onnxruntime float32 on a CPU"


def test_bars_are_of_one_video_and_sum_to_the_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Mapping[str, Mapping[str, float]]] = {}

    def bars(title: str, under: str, label: str, parts: Mapping[str, Mapping[str, float]]) -> bytes:
        drawn[label] = parts
        return b""

    monkeypatch.setattr(report, "_bars", bars)
    report.pictures(made_up())
    assert drawn["ms / batch"] == {
        "batch 1": {"condition": 8.0, "spatial": 4.0, "flow": 16.0},
        "batch 2": {"condition": 4.0, "spatial": 2.0, "flow": 8.0},
    }


def test_small_parts_are_summed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    made = report.figure_of
    monkeypatch.setattr(report, "figure_of", lambda *a: figures.append(made(*a)) or figures[-1])
    count = len(report.COLOURS) + 2
    report._bars("t", "u", "ms", {"batch 1": {f"part {i}": float(count - i) for i in range(count)}})
    widths = sorted(bar.get_width() for bar in figures[0][1].patches)
    assert sum(widths) == pytest.approx(count * (count + 1) / 2)
    assert len(widths) == len(report.COLOURS)


def test_the_spatial_part_reads_its_condition(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: dict[str, Any] = {}
    monkeypatch.setattr(report, "_curves", lambda *args, axis: lines.update(args[4]) or b"")
    report._history("u", {"history=2": {"spatial": 1.0, "condition": 2.0, "canvas": 4.0}})
    assert lines == {"CanvasMAR, spatial part": [3.0], "CanvasMAR, whole frame": [7.0]}


def test_a_picture_names_no_software() -> None:
    assert b"Software" not in report.png(report.figure_of("t", "u")[0])
