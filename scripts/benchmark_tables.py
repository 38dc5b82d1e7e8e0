"""Write the tables of the README and of docs/benchmarks.md from the committed measurements.

    python -m scripts.benchmark_tables

A table follows a comment that names the report, or `all`.
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
TABLE = re.compile(r"<!-- (\w+) -->\n((?:\|.*\n)+)")
OTHERS = (
    ("eager-paper", "clip"), ("eager", "clip"), ("compile", "clip"), ("naive-onnx", "clip"),
    ("dfot", "first_frame"), ("dfot", "clip"),
)  # fmt: skip


def reports() -> dict[str, dict[str, Any]]:
    """What `canvasmar-rt bench` wrote, by the file's name."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    return {name: report for name, report in found.items() if "timed_boundary" in report}


def filled(page: str) -> str:
    """The page with its tables written anew."""
    return TABLE.sub(lambda found: f"<!-- {found[1]} -->\n{table(found[1])}\n", page)


def table(name: str) -> str:
    """The Markdown table of one report, or of all."""
    return overview() if name == "all" else systems(reports()[name])


def systems(report: dict[str, Any]) -> str:
    """One row a batch size and system of a report."""
    rows = [
        "| batch | system | frame, ms (p50 / p95 / p99) | clip, ms | pixel frames/s "
        "| its clip / ours |",
        "|---|---|---|---|---|---|",
    ]
    for m in report["metrics"]:
        for name, system in m["contestants"].items():
            frame, over = system["frame_ms"], m["over_ours"].get(name)
            rows.append(
                f"| {m['batch']} | {name} | {frame['p50']:.0f} / {frame['p95']:.0f} / "
                f"{frame['p99']:.0f} | {system['clip_ms']['p50']:.0f} | "
                f"{system['pixel_frames_per_second']:.0f} | {spread(over)} |"
            )
    return "\n".join(rows)


def spread(over: dict[str, Any] | None) -> str:
    """Their clip over ours: the median and, of few turns, the least and the greatest."""
    if over is None:
        return ""
    clip = over["clip"]
    return f"{clip['median']:.2f} ({clip['p5']:.2f} to {clip['p95']:.2f})"


def overview() -> str:
    """Markdown: one row a model and batch size, in the order of the files' names; measurements
    beside none of `OTHERS` are left out."""
    rows = [
        "| model | batch | ours, ms a latent frame (p50 / p95) | eager, paper's sampling "
        "| eager | torch.compile | plain ONNX | DFoT, first frame | DFoT, clip |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for report in reports().values():
        for m in report["metrics"]:
            if not {name for name, _ in OTHERS} & set(m["over_ours"]):
                continue
            ours = m["contestants"]["ours"]["frame_ms"]
            ratios = [ratio(m["over_ours"].get(name), what) for name, what in OTHERS]
            rows.append(
                f"| {label(report)} | {m['batch']} | {ours['p50']:.0f} / {ours['p95']:.0f} | "
                f"{' | '.join(ratios)} |"
            )
    return "\n".join(rows)


def label(report: dict[str, Any]) -> str:
    """The model, its numbers and its sampling."""
    ours = report["config"]["contestants"]["ours"]
    how = ours["sampling"]
    guided = how["temporal_guidance"] != 1 or how["canvas_guidance"] != 1
    number = "int8" if ours["quantization"] == "int8" else ours["arithmetic"]
    return (
        f"`{report['config']['model']}`, {number}, K = {how['ar_steps']}, {how['flow_steps']} "
        f"{how['solver']}{'' if guided else ', no guidance'}"
    )


def ratio(over: dict[str, Any] | None, what: str) -> str:
    """Their time over ours: the median."""
    return "" if over is None else f"{over[what]['median']:.3g}x"


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text()))
