"""Print the README's benchmark table from the committed measurements.

python -m scripts.readme_table
"""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
OTHERS = (
    ("eager-paper", "clip"), ("eager", "clip"), ("compile", "clip"), ("naive-onnx", "clip"),
    ("dfot", "first_frame"), ("dfot", "clip"),
)  # fmt: skip


def reports(results: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """What `canvasmar-rt bench` wrote, by the file's name."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    return {name: report for name, report in found.items() if "timed_boundary" in report}


def table() -> str:
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
    print(table())
