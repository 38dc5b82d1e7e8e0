"""What `bench` measured, for people: a table, CSV and pictures."""

from __future__ import annotations

import csv
import importlib.util
import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from canvasmar_rt.benchmarks.latency import OURS
from canvasmar_rt.errors import ConfigError

COLOURS = ("#000000", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
"""Of Okabe and Ito, which colour-blind people can tell apart; markers differ too."""
MARKERS = "os^vDP*X"


def table(report: Mapping[str, Any]) -> Table:
    """One row per batch and system. Latencies are medians; a ratio is their time over ours, taken
    per turn: median, and half the way from the 5th to the 95th percentile."""
    config = report["config"]
    described = config["contestants"][OURS]
    shown = Table(
        title=f"{config['model']} on {described['engine']}/{described['device']}, "
        f"{_number(described)}; ms; clips of {config['frames']} latent frames",
        box=None,
        padding=(0, 1, 0, 0),
    )
    shown.add_column("batch", justify="right", no_wrap=True)
    shown.add_column("system", no_wrap=True)
    for name in (
        "first\nframe", "frame", "frame\np99", "clip", "px.\nfr./s", "first\n/ ours",
        "clip\n/ ours",
    ):  # fmt: skip
        shown.add_column(name, justify="right", no_wrap=True)
    for row in report["metrics"]:
        for name, m in row["contestants"].items():
            over = row["over_ours"].get(name, {})
            shown.add_row(
                str(row["batch"]), name, _digits(m["first_frame_ms"]["p50"]),
                _digits(m["frame_ms"]["p50"]), _digits(m["frame_ms"]["p99"]),
                _digits(m["clip_ms"]["p50"]), _digits(m["pixel_frames_per_second"]),
                _spread(over.get("first_frame")), _spread(over.get("clip")),
            )  # fmt: skip
    return shown


def _digits(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _spread(ratio: Mapping[str, float] | None) -> str:
    if ratio is None:
        return ""
    median, half = ratio["median"], (ratio["p95"] - ratio["p5"]) / 2
    return f"{median:.3g} ±{half / median:.0%}" if half else f"{median:.3g}"  # of one turn


def as_csv(report: Mapping[str, Any]) -> str:
    """Columns batch, system, quantity, statistic, value; ratios are `<quantity>_over_ours`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["batch", "system", "quantity", "statistic", "value"])
    for row in report["metrics"]:
        for name, m in row["contestants"].items():
            ratios = {f"{k}_over_ours": v for k, v in row["over_ours"].get(name, {}).items()}
            for quantity, value in (m | ratios).items():
                for statistic, number in (
                    value.items() if isinstance(value, dict) else [("value", value)]
                ):
                    writer.writerow([row["batch"], name, quantity, statistic, number])
    return text.getvalue()


def check_matplotlib() -> None:
    """See that pictures can be drawn, before what they show is measured.

    Raises:
        ConfigError: if matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("pictures need matplotlib: pip install matplotlib")


def pictures(report: Mapping[str, Any]) -> dict[str, bytes]:
    """PNGs by file name: first-frame latency and whole-clip time against batch (the paper's
    Figures 6a and 8), and what our frame is made of.

    Raises:
        ConfigError: if matplotlib is not installed.
    """
    config, rows = report["config"], report["metrics"]
    under = f"{config['model']}, {where(report)}"
    swept = [n for n in rows[0]["contestants"] if "=" in n]
    names = [n for n in rows[0]["contestants"] if n not in swept]
    batches = [row["batch"] for row in rows]

    def lines(quantity: str) -> dict[str, Sequence[float]]:
        return {n: [row["contestants"][n][quantity]["p50"] for row in rows] for n in names}

    def split(row: Mapping[str, Any], name: str) -> dict[str, float]:
        parts = row["contestants"][name].get("component_ms", {})
        return {k: v for k, v in parts.items() if k != "total"}

    made = {
        "first_frame.png": _curves(
            "First-frame latency", under, "ms until the first pixels", batches,
            lines("first_frame_ms"),
        ),
        "clip.png": _curves(
            f"Time of a clip of {config['frames']} latent frames", under, "ms", batches,
            lines("clip_ms"),
        ),
        "throughput.png": _curves(
            "Throughput", under, "pixel frames a second", batches,
            {
                n: [row["contestants"][n]["pixel_frames_per_second"] for row in rows]
                for n in names
            },
        ),
        "components.png": _bars(
            "One latent frame", under, "ms / batch",
            {
                f"batch {row['batch']}": {
                    part: ms / row["batch"] for part, ms in split(row, OURS).items()
                }
                for row in rows
            },
        ),
    }  # fmt: skip
    if swept:
        option = swept[0].partition("=")[0]
        under += f", batch {batches[0]}"
        if any(n.startswith("unified ") for n in swept):
            made["history.png"] = _history(under, {n: split(rows[0], n) for n in swept})
        else:
            made[f"{option}.png"] = _bars(
                f"One latent frame by {option.replace('_', ' ')}", under, "ms",
                {n.partition("=")[2]: split(rows[0], n) for n in swept},
            )  # fmt: skip
    return made


def _history(under: str, parts: Mapping[str, Mapping[str, float]]) -> bytes:
    """PNG: what drawing a frame costs against the latent frames of history, CanvasMAR's spatial
    part beside that of a unified model."""
    lines: dict[str, list[float]] = {}

    def length(name: str) -> int:
        return int(name.partition("=")[2])

    for name, split in sorted(parts.items(), key=lambda part: length(part[0])):
        model = "unified" if name.startswith("unified") else "CanvasMAR"
        for label, wanted in (("spatial part", ("spatial", "condition")), ("whole frame", split)):
            total = sum(split.get(part, 0.0) for part in wanted)
            lines.setdefault(f"{model}, {label}", []).append(total)
    history = sorted({length(name) for name in parts})
    return _curves(
        "Cost of a latent frame by its history", under, "ms", history, lines,
        axis="latent frames of history",
    )  # fmt: skip


def where(report: Mapping[str, Any]) -> str:
    """The machine and the engine, for a caption."""
    metadata, ours = report["metadata"], report["config"]["contestants"][OURS]
    place = metadata.get("gpu", metadata["cpu"])
    return f"{ours['engine']} {_number(ours)} on {place}"


def _number(described: Mapping[str, Any]) -> str:
    """What products are computed in."""
    return "int8" if described.get("quantization") == "int8" else str(described["arithmetic"])


def _curves(
    title: str,
    under: str,
    label: str,
    x: Sequence[int],
    lines: Mapping[str, Sequence[float]],
    *,
    axis: str = "batch",
) -> bytes:
    """PNG of lines against batch, on logarithmic axes."""
    figure, axes = figure_of(title, under)
    from matplotlib.ticker import LogLocator

    for i, (name, values) in enumerate(lines.items()):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        axes.plot(x, values, label=name, color=colour, marker=marker, linewidth=1.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xticks(x, labels=[str(v) for v in x])
    axes.set_xlabel(axis)
    axes.set_ylabel(label)
    axes.grid(which="both", alpha=0.25)
    axes.legend(frameon=False)
    return png(figure)


def _bars(title: str, under: str, label: str, bars: Mapping[str, Mapping[str, float]]) -> bytes:
    """PNG of stacked bars; the smallest parts are summed up."""
    figure, axes = figure_of(title, under)
    total = {n: sum(b.get(n, 0.0) for b in bars.values()) for b in bars.values() for n in b}
    shown = sorted(total, key=lambda n: -total[n])[: len(COLOURS) - 1]
    stacks = {name: [bar.get(name, 0.0) for bar in bars.values()] for name in shown}
    stacks["the rest"] = [sum(v for n, v in b.items() if n not in shown) for b in bars.values()]
    left = [0.0] * len(bars)
    for (name, values), colour in zip(stacks.items(), (*COLOURS[1:], "#999999"), strict=False):
        axes.barh(list(bars), values, left=left, color=colour, label=name, edgecolor="white")
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_xlabel(label)
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return png(figure)


def figure_of(title: str, under: str) -> tuple[Any, Any]:
    """A figure and its axes, with a title and a smaller line under it.

    Raises:
        ConfigError: if matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(6.4, 4.2), dpi=160, layout=ConstrainedLayoutEngine())
    axes = figure.add_subplot()
    axes.set_title(f"{title}\n", fontsize=11)
    axes.text(0.5, 1.02, under, transform=axes.transAxes, ha="center", fontsize=8, color="#555555")
    return figure, axes


def png(figure: Any) -> bytes:
    """The figure as a file, the same bytes for the same picture."""
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()
