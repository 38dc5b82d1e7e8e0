"""Pictures of what `training.evaluation` measured."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from canvasmar_rt.errors import ConfigError, InputError

# (curve of the measurements, its name here, colour, marker, line): colours of Okabe and Ito, which
# colour-blind people can tell apart; markers and lines differ too, for a print without colours.
_Panels = Mapping[str, Sequence[tuple[str, str, str, str, str]]]
_PANELS: _Panels = {
    "Canvas and order, without guidance": (
        ("no canvas", "no canvas", "#0072B2", "s", "--"),
        ("canvas", "canvas", "#E69F00", "o", "-"),
        ("canvas + motion order", "canvas, motion-aware order", "#009E73", "^", "-"),
    ),
    "Guidance branches": (
        ("canvas + motion order", "no guidance", "#009E73", "^", "-"),
        ("without canvas guidance", "temporal only", "#CC79A7", "v", "--"),
        ("without temporal guidance", "canvas only", "#56B4E9", "D", "-."),
        ("full guidance", "both", "#000000", "o", "-"),
    ),
}


_STYLES = (
    ("#000000", "o", "-"), ("#0072B2", "s", "--"), ("#E69F00", "^", "-"), ("#009E73", "v", "-."),
    ("#CC79A7", "D", ":"), ("#56B4E9", "P", "-"), ("#D55E00", "X", "--"),
)  # fmt: skip


def draw_comparison(result: Any) -> bytes:
    """PNG of what `compare` measured: Frechet distance of each model against AR steps.

    Raises:
        ConfigError: if matplotlib is not installed.
        InputError: if `result` lacks a curve, or holds something else.
    """
    names = list(result.get("curves", ()))
    if not 1 <= len(names) <= len(_STYLES):
        raise InputError(f"plot: expected 1 to {len(_STYLES)} models, got {len(names)}")
    lines = [(n, n, *style) for n, style in zip(names, _STYLES, strict=False)]
    return draw_ablations(result, {"Models": lines})


def draw_ablations(result: Any, panels: _Panels = _PANELS) -> bytes:
    """PNG of Figure 3: Frechet distance against AR steps. `result` is that of `ablations`; a point
    is the mean over seeds, its bar reaches from the least to the greatest.

    Raises:
        ConfigError: if matplotlib is not installed.
        InputError: if `result` lacks a curve, or holds something else.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
        from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, ScalarFormatter
    except ImportError:
        raise ConfigError('plot needs matplotlib: pip install "canvasmar-rt[train]"') from None

    size = 4.5 * len(panels) if len(panels) > 1 else 8.0  # one of many lines: beside its legend
    figure = Figure(figsize=(size, 4.0), dpi=200, layout=ConstrainedLayoutEngine(wspace=0.06))
    seeds = 0
    for place, (title, lines) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), place + 1)
        seen: list[float] = []
        ticks: set[int] = set()
        for number, (curve, label, colour, marker, line) in enumerate(lines):
            points = _points(result, curve)
            steps = [k for k, _ in points]
            seeds = max(seeds, *(len(values) for _, values in points))
            means = [sum(values) / len(values) for _, values in points]
            low = [m - min(values) for m, (_, values) in zip(means, points, strict=True)]
            high = [max(values) - m for m, (_, values) in zip(means, points, strict=True)]
            # beside each other, so that no bar hides another
            shift = 1 + 0.04 * (number - (len(lines) - 1) / 2)
            axes.errorbar(
                [k * shift for k in steps], means, yerr=[low, high], label=label, color=colour,
                marker=marker, linestyle=line, linewidth=1.8, markersize=5, capsize=4,
            )  # fmt: skip
            ticks |= set(steps)
            seen += [value for _, values in points for value in values]
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(ticks), [str(k) for k in sorted(ticks)])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("AR steps per latent frame", fontsize=11)
        axes.set_ylabel("Fréchet distance (lower is better)", fontsize=11)
        if min(seen) > 0 and max(seen) > 8 * min(seen):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(bottom=0)
        if len(panels) > 1:
            axes.set_title(f"({'ab'[place]}) {title}", fontsize=12)
        axes.tick_params(labelsize=10)
        axes.grid(color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if len(panels) > 1:
            axes.legend(fontsize=10, frameon=False)
        else:
            axes.legend(fontsize=10, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    bars = f"; bars: least and greatest of {seeds} sets" if seeds > 1 else ""
    figure.supxlabel(
        f"{result['clips']} held-out clips a point, {result['frames']} predicted frames each{bars}",
        fontsize=10,
        color="#444444",
    )
    data = io.BytesIO()
    figure.savefig(data, format="png")  # by Agg: no window system is asked for
    return data.getvalue()


def _points(result: Any, curve: str) -> list[tuple[int, list[float]]]:
    """(AR steps, values of the seeds) of a curve, in order of steps."""
    try:
        _ = int(result["clips"]), int(result["frames"])
        points = [
            (int(k), [float(value) for value in point["seeds"]])
            for k, point in result["curves"][curve].items()
        ]
        if not points or not all(k >= 1 and values for k, values in points):
            raise ValueError("no points")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"plot: no curve {curve!r} with its seeds' values ({error}); measure it again with "
            "`python -m training.evaluation ablations`"
        ) from None
    return sorted(points)
