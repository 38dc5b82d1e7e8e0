"""The model card quotes the committed measurements."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CARD = (ROOT / "docs" / "toytable.md").read_text()


def report(name: str, model: str = "toytable") -> dict[str, Any]:
    return dict(json.loads((ROOT / "training" / "results" / f"{model}_{name}.json").read_text()))


def result(name: str) -> dict[str, Any]:
    return dict(report(name)["result"])


def test_the_figures_are_the_committed_ones() -> None:
    one, long, both = result("one_step"), result("long"), result("rollouts")
    with_actions, without = both["with_actions"], both["without_actions"]
    quoted = [
        f"**{result('reconstruction_float')['psnr_db']:.1f} dB**",
        f"| the same, decoded in int8 | | {result('reconstruction')['psnr_db']:.1f} dB |",
        f"prediction | far below both | **{one['prediction']['frechet']:.1f}**",
        f"| its canvas alone | | {one['canvas']['frechet']:.1f} |",
        f"| a copy of the last frame | | {one['copy']['frechet']:.1f} |",
        f"| the truth through the autoencoder | | {one['autoencoder']['frechet']:.1f} |",
        f"**{with_actions['gripper_penalised_px']:.1f} px** "
        f"({with_actions['gripper_px']:.1f} where it is found",
        f"| {without['gripper_penalised_px']:.1f} px; a frozen gripper is "
        f"{without['frozen_gripper_px']:.1f} px off |",
        f"| {with_actions['frechet']:.1f}, {without['frechet']:.1f} |",
        f"frames 5-20 | | {long['frechet_by_window']['5-20']:.1f} |",
        f"| **{long['frechet_by_window']['85-100']:.0f}** |",
        f"**{long['all_toys_kept']:.0%}** all, {long['toys_kept']:.0%} of toys",
    ]
    again = result("recall")
    shortly = again["by_hidden_latent_frames"]["1"]
    quoted += [
        f"{again['toys']} of {again['clips']} clips",
        f"{again['kept']:.0%}, with {again['area']:.0%} of their area",
        f"one latent frame alone, all before it being true, {shortly['kept']:.0%} are drawn again",
    ]
    assert [text for text in quoted if text not in CARD] == []


def test_all_figures_are_of_one_model() -> None:
    names = ("one_step", "rollouts", "long", "reconstruction", "recall")
    assert len({report(name)["weights"] for name in names}) == 1
    assert report("reconstruction")["engine"] == "onnxruntime"


def test_figure_3_is_the_measured_one() -> None:
    labels = {
        "no canvas": "no canvas",
        "canvas": "canvas",
        "canvas + motion order": "canvas, motion-aware order",
        "without canvas guidance": "the same, temporal guidance only",
        "without temporal guidance": "the same, canvas guidance only",
        "full guidance": "the same, both",
    }
    curves = result("figure3")["curves"]
    assert set(curves) == set(labels)
    for name, points in curves.items():
        cells = [f"{points[k]['mean']:.2f}" for k in ("1", "2", "4", "8")]
        row = next(line for line in CARD.splitlines() if line.startswith(f"| {labels[name]} |"))
        assert row.replace("*", "").split(" | ")[1:] == [*cells[:3], f"{cells[3]} |"]


def test_the_sampling_table_is_measured_as_it_says() -> None:
    """Every row's files were sampled as the row says, and hold its numbers."""
    lines = CARD.split("## How it samples")[1].split("## ")[0].splitlines()
    rows = [line.replace("*", "").strip("| ").split(" | ") for line in lines if line[:1] == "|"][2:]
    assert len(rows) >= 5
    for row in rows:
        ar, flow, scales = int(row[0]), int(row[1].split()[0]), row[2].split(" (")[0]
        w_t, w_s = map(float, scales.split(", "))
        measured = f"k{ar}e{flow}w{10 * w_s:.0f}t{10 * w_t:.0f}"
        name = "default" if "default" in row[1] else measured
        for kind in ("sampling", "long"):
            sampling = report(f"{kind}_{name}")["sampling"]
            assert (sampling["ar_steps"], sampling["flow_steps"]) == (ar, flow), name
            assert (sampling["temporal_guidance"], sampling["canvas_guidance"]) == (w_t, w_s)
        short, long = result(f"sampling_{name}")["with_actions"], result(f"long_{name}")
        assert row[3:] == [
            f"{short['frechet']:.1f}",
            f"{short['gripper_penalised_px']:.1f}",
            windows(long),
            f"{long['toys_kept']:.0%}",
            f"{long['all_toys_kept']:.0%}",
        ]


def test_what_the_packaged_model_was_sampled_with_is_measured_as_it_says() -> None:
    changed = {
        "as `g1`: noise 0.2, w_s 1.5": ("as_g1", {}),
        "w_s 1.35": ("ws135", {"canvas_guidance": 1.35}),
        "w_s 1.2": ("ws12", {"canvas_guidance": 1.2}),
        "no noise on the canvas tokens (`fast`)": ("cn0", {"canvas_noise": 0.0}),
        "the same, w_s 1.3": ("cn0ws13", {"canvas_noise": 0.0, "canvas_guidance": 1.3}),
        "the same, flow noise times 0.6": (
            "cn0ft06",
            {"canvas_noise": 0.0, "flow_temperature": [0.6, 0.6]},
        ),
        "the same, flow noise times 1.2": (
            "cn0ft12",
            {"canvas_noise": 0.0, "flow_temperature": [1.2, 1.2]},
        ),
        "noise 0.1 on the frame the canvas reads, for 0.3": ("fn1", {"frame_noise": 0.1}),
        "w_t 1": ("wt1", {"temporal_guidance": 1.0}),
        "w_t 1.4": ("wt14", {"temporal_guidance": 1.4}),
        "K = 2": ("k2", {"ar_steps": 2}),
    }
    rows = {}
    for label, (name, options) in changed.items():
        told = report(f"h2_long_{name}")
        long = told["result"]
        usual = {"ar_steps": 1, "flow_steps": 4, "temporal_guidance": 1.2, "canvas_guidance": 1.5}
        wanted = {**usual, "frame_noise": 0.3, "canvas_noise": 0.2,
                  "flow_temperature": [1.0, 1.0], **options}  # fmt: skip
        assert {n: told["sampling"][n] for n in wanted} == wanted, name
        rows[label] = [
            windows(long),
            f"{long['gripper_penalised_px']:.1f}",
            f"{long['toys_kept']:.0%}",
            f"{long['all_toys_kept']:.0%}",
        ]
    assert missing(rows, "toytable.md") == []


def test_the_card_of_next_2_quotes_the_committed_figures() -> None:
    models = ("next_2", "next_2_500", "toytable_g1")
    short, long = ([report(n, m)["result"] for m in models] for n in ("rollouts", "long"))
    pairs = [(r["with_actions"], r["without_actions"]) for r in short]
    rows = {
        "16-frame rollouts, 256 clips: Fréchet distance with actions": [
            f"{told['frechet']:.2f}" for told, _ in pairs
        ],
        "gripper error where it is found; found in": [
            f"{told['gripper_px']:.1f} px; {1 - told['gripper_missing']:.0%}" for told, _ in pairs
        ],
        "toys kept": [f"{told['toys_kept']:.0%}" for told, _ in pairs],
        "Fréchet distance without actions": [f"{untold['frechet']:.1f}" for _, untold in pairs],
        "100-frame rollouts, 64 clips: frames 5-20, 85-100": [windows(r) for r in long],
        "toys kept after 100 frames; all kept": [
            f"{r['toys_kept']:.0%}; {r['all_toys_kept']:.0%}" for r in long
        ],
    }
    assert missing(rows, "toytable_next_2.md") == []
    benchmarks = (ROOT / "docs" / "benchmarks.md").read_text()
    near = [f"{told['frechet']:.2f}" for told, _ in pairs]
    far = [f"{r['frechet_by_window']['85-100']:.0f}" for r in long]
    for now, _, before in (near, far):
        assert f" {now} for {before}" in " ".join(benchmarks.split())


def test_what_fast_costs_in_quality_is_the_committed_result() -> None:
    """Nothing: it may be 5% further from the truth than the paper's sampling."""
    paper, fast = (report(f"h2_sampling_{name}") for name in ("default", "fast"))
    assert (paper["sampling"]["ar_steps"], paper["sampling"]["flow_steps"]) == (4, 30)
    assert paper["weights"] == fast["weights"] == report("long")["weights"]
    theirs, ours = (r["result"]["with_actions"]["frechet"] for r in (paper, fast))
    assert ours <= 1.05 * theirs
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert f"Fréchet distance {theirs:.2f} against {ours:.2f} over 64 clips" in page


def test_what_convolutions_are_worth_is_the_committed_result() -> None:
    rows = {}
    for label, losses, short, long in (
        ("`g1`", "g1_losses", "sampling_k1e4w15t12", "long_k1e4w15t12"),
        ("with `canvas_conv`", *(f"canvas_conv_{n}" for n in ("losses", "rollouts", "long"))),
    ):
        lost, told, hundred = result(losses), result(short)["with_actions"], result(long)
        rows[label] = [
            f"{lost['canvas']:.3f}",
            f"{lost['mar']:.3f}",
            f"{told['frechet']:.1f}",
            windows(hundred),
            f"{told['gripper_penalised_px']:.1f} px",
            f"{hundred['toys_kept']:.0%}; {hundred['all_toys_kept']:.0%}",
        ]
    assert missing(rows, "training.md") == []


def test_what_a_finer_temporal_patch_is_worth_is_the_committed_result() -> None:
    rows = {}
    for label, losses, long in (
        ("`g1`", "g1_losses", "long_k1e4w15t12"),
        ("`temporal_patch=1`", "patch_1_losses", "patch_1_long"),
    ):
        lost, hundred = result(losses), result(long)
        rows[label] = [
            f"{lost['canvas']:.3f}",
            f"{lost['mar']:.3f}",
            windows(hundred),
            f"{hundred['gripper_penalised_px']:.1f} px",
            f"{hundred['toys_kept']:.0%}; {hundred['all_toys_kept']:.0%}",
        ]
    assert missing(rows, "training.md") == []


def test_the_planning_page_is_the_committed_result() -> None:
    now, before = (
        json.loads((ROOT / "training" / "results" / f"plan_push{end}.json").read_text())
        for end in ("", "_before")
    )
    rows = {}
    for name, found in now["planners"].items():
        share, ends = found["success"], found["distance_px_by_task"]
        earlier = before["planners"][name]["success"]
        rows[name] = [
            f"{share * now['tasks']:.0f} ({share:.0%})",
            f"{found['distance_px']:.1f} ({statistics.median(ends):.1f})",
            f"{found['ticks']:.1f}",
            f"{earlier * before['tasks']:.0f} ({earlier:.0%})" if "model" in name else "",
        ]
    rows = {name: [cell for cell in cells if cell] for name, cells in rows.items()}
    shown = (ROOT / "docs" / "planning.md").read_text().replace("**", "")
    for name, cells in rows.items():
        assert f"| {name} | {' | '.join(cells)} |" in shown, name
    assert f"a tick took {now['planners']['model']['seconds_a_tick']:.1f} s" in shown
    model = f"[{now['planners']['model']['success']:.0%} of pushes planned](docs/planning.md)"
    assert model in (ROOT / "README.md").read_text()


def windows(long: dict[str, Any]) -> str:
    """Fréchet distances of the first and the last frames."""
    first, last = (long["frechet_by_window"][w] for w in ("5-20", "85-100"))
    return f"{first:.1f}, {last:.0f}"


def missing(rows: dict[str, list[str]], page: str) -> list[str]:
    """Rows of a table, label and cells, that a page of the docs does not show."""
    shown = (ROOT / "docs" / page).read_text().replace("**", "")
    lines = [f"| {label} | {' | '.join(cells)} |" for label, cells in rows.items()]
    return [line for line in lines if line not in shown]
