"""The cost model against counted runs, counted parameters and published arithmetic."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from canvasmar_rt.benchmarks import limit
from canvasmar_rt.benchmarks.dfot import DfotConfig, dfot_for
from canvasmar_rt.benchmarks.dfot_model import evaluation_flops, parameters
from canvasmar_rt.benchmarks.limit import (
    GPUS,
    Baseline,
    Cost,
    Machine,
    Measured,
    app,
    dfot_cost,
    encoder_cost,
    frame_costs,
    here,
    measured,
    predict,
)
from canvasmar_rt.bundle import Bundle
from canvasmar_rt.components import TensorSpec, components
from canvasmar_rt.config import ModelConfig, SamplingConfig, from_dict, preset, to_dict
from canvasmar_rt.errors import CanvasMarError, ConfigError, InputError
from canvasmar_rt.models import sampler
from canvasmar_rt.models.families import FAMILIES as MODELS
from canvasmar_rt.models.families import build, count_parameters
from canvasmar_rt.models.graphs import graph
from canvasmar_rt.schedule import ar_steps, flow_plan, guidance_branches
from tests.conftest import FAMILIES, SAMPLING, VARIANTS, small_config

XL = DfotConfig(width=1152, layers=28, heads=16, frames=5, grid=(16, 16), channels=16)
UNGUIDED = dataclasses.replace(SAMPLING, temporal_guidance=1.0, canvas_guidance=1.0)


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Attention as plain matrix products: the counter does not know the CPU's own operator."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def empty(spec: TensorSpec, sizes: dict[str, int]) -> torch.Tensor:
    dims = [sizes[d] if isinstance(d, str) else d for d in spec.dims]
    dtype = torch.float32 if spec.dtype == "hidden" else getattr(torch, spec.dtype)
    return torch.empty(dims, dtype=dtype)


def component_flops(config: ModelConfig, name: str, **sizes: int) -> int:
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"), torch.no_grad():
        patch.setattr(torch, "is_autocast_enabled", lambda device: False)  # no answer for meta
        module = graph(MODELS[config.family](config).requires_grad_(False), name)
        inputs = [empty(spec, sizes) for spec in components(config)[name].inputs]
        with counting() as counter:
            module(*inputs)
    return int(counter.get_total_flops())


def counted(config: ModelConfig, sampling: SamplingConfig, batch: int) -> dict[str, int]:
    """FLOPs that PyTorch counts in the graphs of a frame, run without data."""
    branches = guidance_branches(sampling, has_canvas=config.canvas)
    sizes = {
        "B": batch,
        "R": batch * config.group,
        "G": len(branches.weight),
        "E": len(flow_plan(sampling).time),
    }
    # one that sees nothing needs no first step
    first = int(sum(branches.temporal_on)) if config.family != "unified" else sizes["G"]

    def flops(name: str, **more: int) -> int:
        return component_flops(config, name, **(sizes | more))

    found = {
        name: flops(name)
        for name in ("temporal", "canvas", "condition", "decoder", "encoder")
        if name in components(config)
    }
    for name in ("temporal", "decoder"):  # of a group frame by frame
        found[name] *= config.group
    steps = ar_steps(config.tokens, sampling.ar_steps)
    found["spatial"] = sum(
        flops("spatial", K=s.known, S=s.drawn, M=s.left)
        if s.known
        else flops("spatial_first", S=s.drawn, G=first)
        for s in steps
    )
    found["flow"] = sum(flops("flow", S=s.drawn) for s in steps)
    return found


def full_size(name: str, batch: int) -> tuple[ModelConfig, SamplingConfig, int]:
    """A preset with fewer flow steps: they are all alike, and counting takes its time."""
    config, sampling = preset(name)
    return config, dataclasses.replace(sampling, flow_steps=3), batch


CASES = {
    **{name: (config, SAMPLING, 2) for name, config in FAMILIES.items()},
    "unguided": (VARIANTS["expert"], UNGUIDED, 1),
    "two branches": (
        VARIANTS["mmdit"], dataclasses.replace(SAMPLING, temporal_guidance=1.0), 1,
    ),
    "heun": (
        small_config("joint-isolated", condition_attention="isolated"),
        dataclasses.replace(SAMPLING, solver="heun", ar_steps=8), 3,
    ),
    "kinetics600": full_size("kinetics600", 1),
    "bair": full_size("bair", 2),
    "toytable": full_size("toytable", 8),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_flops_are_those_of_a_counted_run(case: str) -> None:
    config, sampling, batch = CASES[case]
    costs = frame_costs(config, sampling, batch=batch)
    predicted = {name: cost.flops for name, cost in costs.items()}
    predicted["encoder"] = encoder_cost(config, batch=batch).flops
    assert predicted == pytest.approx(counted(config, sampling, batch), rel=0.01)


@pytest.mark.parametrize("name", ["kinetics600", "bair", "toytable"])
def test_the_page_tells_what_is_predicted(name: str) -> None:
    """Its rows are the committed JSON, and that is what the model gives today."""
    root = Path(__file__).resolve().parents[2]
    report = json.loads((root / f"benchmarks/results/predicted/limit_{name}.json").read_text())
    rows = (root / "docs" / "limit.md").read_text().split(f"| `{name}` | 1 |")[1].splitlines()[:2]
    told = [[float(x) for x in re.findall(r"[0-9.]+", row)] for row in rows]
    told[1] = told[1][1:]  # the batch
    manifest = Bundle.open("toytable").manifest
    known = {"toytable": (manifest.model, manifest.sampling)}
    config, sampling = known[name] if name in known else preset(name)
    for batch, numbers in zip((1, 32), told, strict=True):
        found = [p for p in report["predictions"] if p["batch"] == batch]
        costs = frame_costs(config, sampling, batch=batch).values()
        assert {p["frame"]["flops"] for p in found} == {sum(cost.flops for cost in costs)}
        parts = [part for p in found for part in (p["frame"], p["components"]["flow"])]
        times = [part["predicted_ms"] for part in parts]
        assert numbers == pytest.approx(times, rel=0.006)


@pytest.mark.parametrize("variant", FAMILIES)
def test_the_reference_sampler_does_as_much(variant: str) -> None:
    config = FAMILIES[variant]
    model = build(config)
    state = sampler.start(model, torch.zeros(2, 1, config.tokens, 4))
    noise = sampler.draw_noise(config, SAMPLING, seed=0, streams=range(2), frame=1)
    with counting() as counter:
        sampler.step(model, SAMPLING, state, noise)
    total = sum(cost.flops for cost in frame_costs(config, SAMPLING, batch=2).values())
    # the graphs embed the flow times in every AR step, the sampler once
    with counting() as once:
        model.flow.embed_time(torch.zeros(SAMPLING.flow_steps))
    total -= (SAMPLING.ar_steps - 1) * once.get_total_flops()
    if config.condition_attention == "isolated":
        # and the keys of the condition once for all branches, the sampler in each
        branches = len(guidance_branches(SAMPLING, has_canvas=config.canvas).weight)
        z_temporal = torch.zeros(2, config.temporal_tokens, config.dim)
        module = graph(model, "condition")
        with counting() as shared:
            module(z_temporal, torch.ones(branches))
        with counting() as each:
            model.spatial.condition_keys_values(z_temporal.repeat(branches, 1, 1))
        total += each.get_total_flops() - shared.get_total_flops()
    if "unconditional" in components(config):
        # and the first set of a branch that sees nothing not at all
        drawn = ar_steps(config.tokens, SAMPLING.ar_steps)[0].drawn
        total += component_flops(config, "spatial_first", B=2, G=1, S=drawn)
    assert total == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("name", ["kinetics600", "bair", "ucf101", "toytable"])
def test_a_pass_reads_every_weight_once(name: str) -> None:
    """Biases, norms and position embeddings are what is missing."""
    config, sampling = preset(name)
    # the second AR step is the first that needs all of MM-DiT, one evaluation all of the flow head
    plan = dataclasses.replace(sampling, ar_steps=2, flow_steps=1, solver="euler")
    costs = frame_costs(config, plan, dtype_bytes=1, on_chip=1 << 40)
    costs["autoencoder"] = costs.pop("decoder") + encoder_cost(config, dtype_bytes=1)
    parameters = count_parameters(config)
    for module, count in parameters.items():
        assert 0.97 * count < costs[module].weight_bytes <= count, module


def test_weights_are_read_in_every_pass_but_for_what_fits() -> None:
    config, sampling = preset("kinetics600")
    flow = frame_costs(config, sampling, dtype_bytes=2)["flow"]
    assert 300 * 52e6 < flow.weight_bytes < 300 * 57e6  # E evaluations in each of K steps
    additive = dataclasses.replace(
        config, flow=dataclasses.replace(config.flow, modulation="additive")
    )
    kept, most, none = (
        frame_costs(additive, sampling, dtype_bytes=2, on_chip=size)["flow"].weight_bytes
        for size in (20_000_000, 19_000_000, 0)
    )
    # of 300 evaluations and 10 preparations, which are larger, all but the first of each
    assert none - most == 308 * 19_000_000
    assert none - kept == pytest.approx(299 * 19.74e6 + 9 * 20_000_000, rel=1e-3)
    groups = dataclasses.replace(config, group=2)
    one, two = (
        frame_costs(c, sampling, dtype_bytes=2, on_chip=1 << 40)["decoder"].weight_bytes
        for c in (config, groups)
    )
    assert one == two
    spatial = frame_costs(config, sampling, dtype_bytes=2)["spatial"]
    assert spatial.weight_bytes > 9 * 2 * 390e6
    assert spatial.weight_bytes < 10 * 2 * 404e6  # the first step has no known tokens to serve


def test_bytes_in_and_out_are_those_of_the_graphs() -> None:
    config = VARIANTS["mmdit"]
    costs = frame_costs(config, SAMPLING, batch=2, dtype_bytes=2)
    p, d, f = config.temporal_tokens, config.dim, config.context_frames
    n, c = config.tokens, config.autoencoder.latent_channels
    cache = 2 * config.temporal_layers * (f + 1) * 2 * p * d * 2  # keys and values, read and new
    rest = 2 * p * d * 2 + 4 * (2 * n * c + 2 + 2 * config.time_rotary_pairs + 2 * f)
    assert costs["temporal"].activation_bytes == cache + rest
    assert costs["decoder"].activation_bytes > 2 * 2 * 16 * 16 * 3  # uint8 pixels


def test_published_arithmetic() -> None:
    config, sampling = preset("kinetics600")
    unguided = dataclasses.replace(sampling, temporal_guidance=1.0, canvas_guidance=1.0)
    frame = {
        s: sum(cost.flops for cost in frame_costs(config, s).values()) for s in (sampling, unguided)
    }
    assert 4.6e12 < frame[sampling] < 5.0e12
    assert 1.6e12 < frame[unguided] < 1.7e12
    assert dfot_cost(XL).flops == pytest.approx(67.8e12, rel=0.005)
    assert dfot_cost(XL).flops / 50 == pytest.approx(1.36e12, rel=0.005)
    token = dataclasses.replace(XL, modulation="token")
    assert dfot_cost(token, steps=1).flops == pytest.approx(1.93e12, rel=0.005)
    assert dfot_cost(XL, passes=2).flops == 2 * dfot_cost(XL).flops
    assert dfot_cost(XL, passes=2).weight_bytes == dfot_cost(XL).weight_bytes

    baseline = Baseline(config=XL, predicted=3)
    guided, plain = (
        predict(config, s, GPUS["h200"], dtype="bf16", batch=32, baseline=baseline)["dfot"][
            "conditional"
        ]["work_over_ours"]
        for s in (sampling, unguided)
    )
    # 13.9 and 4.6 by the count of 4.88 TFLOP a frame that ignores what the last layer saves, and
    # draws the first set of a branch that sees nothing
    drawn = ar_steps(config.tokens, sampling.ar_steps)[0].drawn
    more = 1 + component_flops(config, "spatial_first", B=1, G=1, S=drawn) / frame[sampling]
    assert guided == {"first_frame": pytest.approx(more * 13.9, rel=0.04),
                      "clip": pytest.approx(more * 4.6, rel=0.04)}  # fmt: skip
    assert plain == {"first_frame": pytest.approx(40, rel=0.03),
                     "clip": pytest.approx(13, rel=0.06)}  # fmt: skip


@pytest.mark.parametrize("modulation", ["frame", "token"])
def test_dfot_is_that_of_a_counted_run(modulation: Literal["frame", "token"]) -> None:
    config = dataclasses.replace(XL, modulation=modulation)
    with counting():  # attention as matrix products
        counted = evaluation_flops(config)
    cost = dfot_cost(config, steps=1, dtype_bytes=1)
    assert cost.flops == pytest.approx(counted, rel=0.01)
    assert 0.99 * parameters(config) < cost.weight_bytes <= parameters(config)


def test_the_roofline_is_the_larger_of_two_times() -> None:
    machine = Machine(name="m", peak={"fp32": 100.0}, bandwidth=10.0, on_chip=0)
    assert machine.seconds(Cost(1000, 20, 30), "fp32") == (10.0, "compute")
    assert machine.seconds(Cost(1000, 150, 50), "fp32") == (20.0, "memory")
    with pytest.raises(ConfigError, match="there is fp32"):
        machine.seconds(Cost(1, 1, 1), "int8")


def test_prediction_sums_its_components() -> None:
    config, sampling = preset("bair")
    one, many = (predict(config, sampling, GPUS["orin"], dtype="fp16", batch=b) for b in (1, 32))
    for found in (one, many):
        parts = found["components"].values()
        assert found["frame"]["flops"] == sum(p["flops"] for p in parts)
        assert found["frame"]["predicted_ms"] == pytest.approx(
            sum(p["predicted_ms"] for p in parts), rel=1e-3
        )
    # the same weights for 32 times the work
    assert (
        many["components"]["temporal"]["weight_bytes"]
        == (one["components"]["temporal"]["weight_bytes"])
    )
    assert one["components"]["flow"]["bound_by"] == "memory"
    assert many["components"]["flow"]["bound_by"] == "compute"


def test_this_machine_is_measured() -> None:
    machine = here()
    assert 1e9 < machine.rate("fp32") < 1e14
    assert 1e8 < machine.bandwidth < 1e13
    assert machine.on_chip >= 0


def bench_report(
    sampling: SamplingConfig, model: str = "bair", **ours: str
) -> dict[str, dict[str, object]]:
    told = {"arithmetic": "bfloat16", "quantization": "none", "device": "cuda"} | ours
    told |= {"sampling": to_dict(sampling)}
    return {
        "config": {"model": model, "contestants": {"ours": told}},
        "metrics": [{"batch": 4, "contestants": {"ours": {"frame_ms": {"p50": 160.0}}}}],
    }  # type: ignore[dict-item]


def test_a_measurement_says_how_it_was_made() -> None:
    config, sampling = preset("bair")
    other = dataclasses.replace(sampling, ar_steps=2)
    assert measured(bench_report(other), config) == Measured({4: 160.0}, other, "bf16", "cuda")
    int8 = measured(bench_report(sampling, arithmetic="float32", quantization="int8"), config)
    assert int8.dtype == "int8"
    with pytest.raises(InputError, match="a report of ucf101"):
        measured(bench_report(sampling, "ucf101"), config)
    for nonsense in ("x", 0, None, [1], -5.0, math.nan, math.inf, True):
        report: Any = bench_report(sampling)
        report["metrics"][0]["contestants"]["ours"]["frame_ms"]["p50"] = nonsense
        with pytest.raises(InputError, match="not a report that"):
            measured(report, config)
    with pytest.raises(InputError, match="not a report"):
        measured({"metrics": []}, config)


def test_the_committed_reports_can_be_compared() -> None:
    """Also those from before a sampling option was there."""
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    found = measured(
        json.loads((results / "kinetics600_full_cpu.json").read_text()), preset("kinetics600")[0]
    )
    assert (found.dtype, found.device, found.sampling.ar_steps) == ("bf16", "cpu", 10)
    found = measured(
        json.loads((results / "toytable_int8_cpu.json").read_text()),
        Bundle.open("toytable-int8").manifest.model,
    )
    assert (found.dtype, found.sampling.ar_steps) == ("int8", 1)


def test_a_group_is_several_frames() -> None:
    """Of a model that draws two frames at once a clip of four takes two draws."""
    pair, sampling = preset("toytable_next_2")
    chunk = Baseline(config=dfot_for(pair), predicted=4)
    told = predict(pair, sampling, GPUS["h100"], dtype="fp32", batch=1, baseline=chunk)
    assert told["latent_frames"] == 2
    row = told["dfot"]["conditional"]
    decoder = told["components"]["decoder"]["flops"] / 2
    want = (row["chunk"]["flops"] + 4 * decoder) / (2 * told["frame"]["flops"])
    assert row["work_over_ours"]["clip"] == pytest.approx(want, abs=0.01)


def test_command(tmp_path: Path) -> None:
    sampling = preset("bair")[1]
    (tmp_path / "bench.json").write_text(json.dumps(bench_report(sampling)))
    output = tmp_path / "limit.json"
    arguments = ["bair", "--machine", "h100", "--batch", "4", "-o", str(output)]
    command = [sys.executable, "-m", "canvasmar_rt.benchmarks.limit", *arguments]
    done = subprocess.run(
        [*command, "--measured", str(tmp_path / "bench.json")],
        capture_output=True, text=True, timeout=120, check=True, env={"COLUMNS": "120"},
    )  # fmt: skip
    assert "predicted (roofline)" in " ".join(done.stdout.split())
    prediction = json.loads(output.read_text())["predictions"][0]
    expected = predict(*preset("bair"), GPUS["h100"], dtype="bf16", batch=4)
    assert {k: prediction[k] for k in expected} == expected
    assert prediction["fraction_of_roofline"] == pytest.approx(
        expected["frame"]["predicted_ms"] / 160.0, rel=1e-3
    )
    assert f"{prediction['fraction_of_roofline']:.1%}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere"),
        (["bair", "--machine", "h200,abacus"], "abacus"),
        (["bair", "--machine", "h200,a100", "--measured", "bench.json"], "one machine"),
        (["bair", "--dtype", "fp64"], "fp64"),
        (["bair", "--dtype", ""], "must be one of fp32"),
        (["bair", "--batch", "1,none"], "1,none"),
        (["bair", "--measured", "nowhere.json"], "nowhere.json"),
    ],
)
def test_mistakes(arguments: list[str], message: str) -> None:
    found = CliRunner().invoke(app, arguments).exception
    assert isinstance(found, CanvasMarError)
    assert message in str(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--machine", "here"], "of device 'cuda'"),
        (["--dtype", "fp32"], "it was measured in bf16"),
        (["--no-guidance"], "it was measured in bf16"),
    ],
)
def test_a_measurement_of_something_else(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(bench_report(preset("bair")[1])))
    found = CliRunner().invoke(app, ["bair", "--measured", str(path), *arguments]).exception
    assert isinstance(found, CanvasMarError)
    assert message in str(found)


def test_a_measurement_of_another_batch(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(bench_report(preset("bair")[1])))
    found = CliRunner().invoke(app, ["bair", "--measured", str(path)]).exception
    assert isinstance(found, InputError)
    assert "only for 4" in str(found)


def test_imports_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import canvasmar_rt.benchmarks.limit"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("name", ["kinetics600", "bair", "toytable"])
def test_the_committed_predictions_are_what_is_predicted(name: str) -> None:
    root = Path(__file__).resolve().parents[1]
    while not (root / "benchmarks/results").is_dir():
        root = root.parent
    report = json.loads((root / f"benchmarks/results/predicted/limit_{name}.json").read_text())
    sampling = from_dict(SamplingConfig, report["sampling"], "sampling")
    manifest = Bundle.open("toytable").manifest
    config = manifest.model if name == "toytable" else preset(name)[0]
    machines = {m.name: m for m in GPUS.values()}
    for told in report["predictions"]:
        found = predict(
            config, sampling, machines[told["machine"]], dtype=told["dtype"], batch=told["batch"]
        )
        for key in ("components", "frame", "observe"):
            assert told[key] == json.loads(json.dumps(found[key])), (
                name,
                told["machine"],
                told["dtype"],
                told["batch"],
                key,
            )


def test_prediction_sums_bytes_too() -> None:
    config, sampling = preset("bair")
    found = predict(config, sampling, GPUS["h100"], dtype="bf16", batch=2)
    for field in ("flops", "weight_bytes", "activation_bytes"):
        assert found["frame"][field] == sum(p[field] for p in found["components"].values())


def test_a_group_moves_the_bytes_of_its_frames() -> None:
    config = FAMILIES["next-group"]
    costs = frame_costs(config, SAMPLING, batch=2, dtype_bytes=2)
    sizes = {"B": 2}
    decoder = components(config)["decoder"]
    once = limit._moved(decoder, sizes, 2)
    assert costs["decoder"].activation_bytes == config.group * once


def test_indices_have_eight_bytes() -> None:
    table = components(FAMILIES["expert"])
    sizes = {"B": 2, "G": 3, "S": 5, "E": 4, "R": 2, "K": 3, "M": 6}
    flow = table["flow"]
    index = next(t for t in flow.inputs if t.name == "select_index")
    others = dataclasses.replace(flow, inputs=tuple(t for t in flow.inputs if t is not index))
    assert limit._moved(flow, sizes, 2) - limit._moved(others, sizes, 2) == 8 * 2 * 5


def test_a_chunk_is_read_and_written_and_noised() -> None:
    tokens = XL.frames * XL.grid[0] * XL.grid[1] * XL.channels
    assert dfot_cost(XL, steps=1).activation_bytes == 2 * tokens * 4
    assert dfot_cost(XL, steps=1, passes=2, batch=2).activation_bytes == 3 * 2 * tokens * 4


def test_a_measured_group_counts_all_its_frames(tmp_path: Path) -> None:
    config, sampling = preset("toytable_next_2")
    told, out = tmp_path / "bench.json", tmp_path / "limit.json"
    told.write_text(json.dumps(bench_report(sampling, config.name)))
    CliRunner().invoke(
        app,
        [
            "toytable_next_2",
            "--batch",
            "4",
            "--machine",
            "h100",
            "--measured",
            str(told),
            "-o",
            str(out),
        ],
        catch_exceptions=False,
    )
    (found,) = json.loads(out.read_text())["predictions"]
    assert found["fraction_of_roofline"] == pytest.approx(
        found["frame"]["predicted_ms"] / (2 * 160.0), rel=1e-3
    )


def test_a_context_leaves_dfot_a_frame() -> None:
    config, _ = preset("kinetics600")
    frames = dfot_for(config).frames
    assert limit._baseline(config, frames - 1).predicted == 1
    with pytest.raises(ConfigError, match="leaves none"):
        limit._baseline(config, frames)


def test_a_copy_reads_and_writes_and_the_largest_cache_counts(
    monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr(limit, "_timed", lambda work: 0.5)
    for i, text in enumerate(("32K", "1024K", "M")):
        (tmp_path / f"index{i}").mkdir()
        (tmp_path / f"index{i}" / "size").write_text(f"{text}\n")
    monkeypatch.setattr(limit, "Path", lambda _: tmp_path)
    machine = limit.here()
    assert machine.rate("fp32") == 2 * 1024**3 / 0.5
    assert machine.bandwidth == 2 * 4 * (1 << 26) / 0.5  # read and written
    assert machine.on_chip == 1 << 20


def test_a_name_that_is_both_is_the_packaged_bundle() -> None:
    assert limit._model("toytable") == (
        (manifest := Bundle.open("toytable").manifest).model,
        manifest.sampling,
    )
