"""Print the README's benchmark table from the committed measurements.

python -m scripts.readme_table
"""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


def table(results: Path = RESULTS) -> str:
    """Markdown: one row a model and batch size, in the order of the files' names."""
    rows = [
        "| model | batch | ours, ms a latent frame (p50 / p95) | eager PyTorch (p50) "
        "| eager / ours | outside the engine |",
        "|---|---|---|---|---|---|",
    ]
    for path in sorted(results.glob("*.json")):
        report: dict[str, Any] = json.loads(path.read_text())
        for m in report["metrics"]:
            ratio = m.get("eager_over_ours")
            if ratio is None:  # a soak
                continue
            rows.append(
                f"| `{report['config']['model']}` | {m['batch']} | {m['frame_ms']['p50']:.0f} / "
                f"{m['frame_ms']['p95']:.0f} | {m['eager_frame_ms']['p50']:.0f} | "
                f"{ratio['median']:.2f} ({ratio['p5']:.2f} to {ratio['p95']:.2f}) | "
                f"{m['outside_engine_share']:.1%} |"
            )
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
