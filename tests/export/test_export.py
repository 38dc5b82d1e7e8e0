"""Exports: what is in a bundle, what is refused, and that nothing half-written stays."""

from __future__ import annotations

import copy
import dataclasses
import json
import ntpath
import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

import canvasmar_rt
from canvasmar_rt.bundle import (
    MANIFEST,
    BatchRange,
    Bundle,
    Difference,
    FileEntry,
    Parity,
    component_entries,
    sha256,
    write_manifest,
)
from canvasmar_rt.components import components
from canvasmar_rt.config import SamplingConfig
from canvasmar_rt.engines.program import require_finite
from canvasmar_rt.engines.torch_engine import load_model
from canvasmar_rt.errors import BundleError, ConfigError, EngineError, InputError, ParityError
from canvasmar_rt.export import compose, exporter, parity, tensorrt_ops
from canvasmar_rt.export.exporter import MOVES, ExportOptions, export_bundle
from canvasmar_rt.models.canvasmar import CanvasMAR
from canvasmar_rt.models.families import build
from canvasmar_rt.schedule import solver_inputs
from canvasmar_rt.verify import compare_component, difference, failures, verify
from tests.conftest import least_config

LEAST = least_config()
SAMPLING = SamplingConfig(ar_steps=2, flow_steps=2)


@pytest.fixture(scope="module")
def model() -> CanvasMAR:
    return build(LEAST, seed=1)


@pytest.fixture(scope="module")
def parts() -> list[onnx.ModelProto]:
    """What PyTorch traced of `model`, in order, once `graphs` is there."""
    return []


@pytest.fixture(scope="module")
def graphs(model: CanvasMAR, parts: list[onnx.ModelProto]) -> dict[str, onnx.ModelProto]:
    traced = exporter.to_onnx

    def kept(*arguments: Any) -> onnx.ModelProto:
        parts.append(traced(*arguments))
        return copied(parts[-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "to_onnx", kept)
        return exporter.trace(model, SAMPLING, ExportOptions(), lambda _: None)


def copied(proto: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    return copy


@pytest.fixture
def traced_once(graphs: dict[str, onnx.ModelProto], monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports of `model` reuse one tracing; what a test looks at comes after it."""

    monkeypatch.setattr(exporter, "trace", lambda *_: {n: copied(p) for n, p in graphs.items()})


@pytest.fixture
def bundle(model: CanvasMAR, traced_once: None, tmp_path: Path) -> Bundle:
    return export_bundle(model, SAMPLING, tmp_path / "b", ExportOptions(), source="test")


@pytest.mark.parametrize("variant", ["expert", "mmdit", "no-canvas"])
def test_every_graph_stays_inside_the_operator_table(
    bundles: Callable[[str], Bundle], variant: str
) -> None:
    bundle = bundles(variant)
    for name in components(bundle.manifest.model):
        proto = onnx.load(bundle.file(name), load_external_data=False)
        assert tensorrt_ops.problems(proto) == [], name
        assert proto.opset_import[0].version == 20


def test_graphs_open_by_themselves(bundle: Bundle) -> None:
    """Another program opens a graph by its path alone: external data is found, names and
    dimensions are the manifest's."""
    for name, entry in bundle.manifest.components.items():
        session = onnxruntime.InferenceSession(
            bundle.file(name), providers=["CPUExecutionProvider"]
        )
        for got, want in (
            (session.get_inputs(), entry.inputs),
            (session.get_outputs(), entry.outputs),
        ):
            assert [t.name for t in got] == [t.name for t in want]
            for a, b in zip(got, want, strict=True):
                dims = [SAMPLING.ar_steps if d == "AR" else d for d in b.dims]
                assert list(a.shape) == dims, (name, a.name)


def test_graphs_name_their_weights_with_slashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written on Windows, too: elsewhere a backslash is part of a file's name."""
    monkeypatch.setattr(os.path, "relpath", ntpath.relpath)
    place = exporter.Place("flow/model.safetensors", 8, 4, "F32")
    for folder, location in (("", "flow/model.safetensors"), ("flow", "model.safetensors")):
        weight = onnx.numpy_helper.from_array(np.ones(1, np.float32), "w")
        proto = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], [weight]))
        exporter._externalise(proto, "w", place, PurePosixPath(folder))
        told = {entry.key: entry.value for entry in proto.graph.initializer[0].external_data}
        assert told == {"location": location, "offset": "8", "length": "4"}


def test_weights_are_stored_once(bundle: Bundle, model: CanvasMAR) -> None:
    stored = sum(
        e.bytes for n, e in bundle.manifest.files.items() if n.endswith("model.safetensors")
    )
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert stored < 1.25 * weights
    largest = max(e.bytes for n, e in bundle.manifest.files.items() if n.endswith(".onnx"))
    assert largest < 0.5e6


def test_a_bundle_is_a_checkpoint(bundle: Bundle, model: CanvasMAR) -> None:
    state = load_model(bundle).state_dict()
    for name, want in model.state_dict().items():
        torch.testing.assert_close(state[name], want, rtol=0, atol=0, msg=name)


def test_a_joint_modulation_is_stored_in_the_parts_its_graph_reads(bundle: Bundle) -> None:
    """All but the last shift, which the graph reads multiplied by the output layer."""
    tensors = load_file(bundle.path / "flow" / "model.safetensors")
    found = {name for name in tensors if name.startswith("flow.modulation.weight")}
    shift = 3 * LEAST.flow.blocks
    assert LEAST.flow.modulation == "joint"
    assert found == {
        f"flow.modulation.weight^{i}" + ("^T" if i != shift else "") for i in range(shift + 2)
    }
    (loop,) = (n for n in onnx.load(bundle.file("flow")).graph.node if n.op_type == "Scan")
    kinds = [n.op_type for n in next(a.g for a in loop.attribute if a.name == "body").node]
    assert "Split" not in kinds
    assert kinds.count("MatMul") == (shift + 2) + 2 * LEAST.flow.blocks + 2


@pytest.mark.parametrize("change", ["missing", "narrow"])
def test_parts_that_do_not_make_a_weight_are_refused(bundle: Bundle, change: str) -> None:
    path = bundle.path / "flow" / "model.safetensors"
    tensors = load_file(path)
    part = tensors.pop("flow.modulation.weight^1^T")
    if change == "narrow":
        tensors["flow.modulation.weight^1^T"] = part[1:].copy()
    save_file(tensors, path)
    with pytest.raises(BundleError, match=r"flow\.modulation\.weight"):
        load_model(bundle)


def test_the_certificate_holds_what_was_measured(bundle: Bundle) -> None:
    certificate = bundle.manifest.parity
    assert certificate is not None
    assert set(certificate.components) == set(components(LEAST))
    assert all(0 <= d.relative < 1e-4 for d in certificate.components.values())
    assert all(d.cosine > 0.9999 for d in certificate.components.values())
    assert len(certificate.drift) == 32
    assert max(certificate.drift) < 1e-3
    assert certificate.engine == "onnxruntime"
    assert "| flow |" in (bundle.path / "README.md").read_text()


def test_the_certificate_holds_the_worst_of_two_batches(
    model: CanvasMAR, traced_once: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of one would not see what a graph mixes up between rows; and the manifest holds what
    the options say."""
    compare = parity.compare_component
    seen = []

    def measured(engine: Any, name: str, inputs: Any, outputs: Any) -> Difference:
        found = compare(engine, name, inputs, outputs)
        if name == "decoder":
            seen.append(len(inputs["latent"]))
            found = dataclasses.replace(found, relative=9e-5 if seen[-1] > 1 else 0.0)
        return found

    monkeypatch.setattr(parity, "compare_component", measured)
    fast = dataclasses.replace(SAMPLING, ar_steps=1)
    options = ExportOptions(seed=7, drift_frames=2, fast=fast)
    bundle = export_bundle(model, SAMPLING, tmp_path / "b", options, source="test")
    certificate = bundle.manifest.parity
    assert certificate is not None
    assert seen == [2, 1]
    assert certificate.components["decoder"].relative == 9e-5
    assert (certificate.tolerance, certificate.drift_tolerance) == (1e-4, 1e-3)
    assert certificate.frame_tolerance is None
    assert load_file(bundle.path / "golden" / "decoder.safetensors")["in.latent"].shape[0] == 1
    assert load_file(bundle.path / "golden" / "rollout.safetensors")["seed"] == 7
    assert bundle.manifest.fast == fast
    assert "README.md" in bundle.manifest.files
    beginnings = load_file(bundle.path / "golden" / "temporal.safetensors")
    assert (beginnings["in.cache_bias"] < 0).any(), "a slot that may not be seen"


@pytest.mark.parametrize("solver", ["heun", "ab2"])
@pytest.mark.parametrize("unroll", [False, True], ids=["loop", "unrolled"])
def test_every_solver_is_pytorchs(
    solver: str,
    unroll: bool,
    model: CanvasMAR,
    graphs: dict[str, onnx.ModelProto],
    parts: list[onnx.ModelProto],
) -> None:
    """Euler's steps, all that the certificate of this bundle has seen, never look at the last
    velocity."""
    sampling = dataclasses.replace(SAMPLING, flow_steps=3, solver=solver)
    plan = solver_inputs(sampling)
    made = graphs["flow"]
    if unroll:
        made = compose.flow(*parts[-2:], LEAST, "float32", 20, evaluations=len(plan["flow_time"]))
    n, c = LEAST.tokens, LEAST.autoencoder.latent_channels
    rng = np.random.default_rng(0)
    inputs: dict[str, np.ndarray] = {
        "z_tokens": rng.standard_normal((3, 2, 5, LEAST.dim), np.float32),
        "branch_weight": np.array([2.0, -1.5, 0.5], np.float32),
        "select_index": np.stack([rng.permutation(n)[:5] for _ in range(2)]),
        "flow_noise": rng.standard_normal((2, n, c), np.float32),
        **{name: plan[name] for name in ("flow_time", "step_new", "step_old")},
        "partial": rng.standard_normal((2, n, c), np.float32),
    }
    assert plan["step_old"].any()
    session = onnxruntime.InferenceSession(
        made.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    want = parity._run(model, "flow", inputs)["next_partial"]
    np.testing.assert_allclose(session.run(None, inputs)[0], want, atol=1e-5)


def test_a_card_joins_the_model_card(model: CanvasMAR, traced_once: None, tmp_path: Path) -> None:
    options = ExportOptions(card="## Training\n\nTwo hours of a toaster.\n")
    bundle = export_bundle(model, SAMPLING, tmp_path / "b", options, source="test")
    card = (bundle.path / "README.md").read_text()
    assert card.startswith(f"# {model.config.name}\n")
    assert card.endswith("\n\n## Training\n\nTwo hours of a toaster.\n")


def test_a_wrong_weight_is_caught(bundle: Bundle) -> None:
    """Hashes made to fit a changed weight do not help: verify compares outputs."""
    path = bundle.path / "flow" / "model.safetensors"
    data = bytearray(path.read_bytes())
    end = 8 + int.from_bytes(data[:8], "little")
    weights = np.frombuffer(data, np.float32, offset=end).copy()
    weights[: len(weights) // 2] += 0.01
    path.write_bytes(bytes(data[:end]) + weights.tobytes())
    files = dict(bundle.manifest.files)
    files["flow/model.safetensors"] = FileEntry(sha256=sha256(path), bytes=path.stat().st_size)
    write_manifest(bundle.path, dataclasses.replace(bundle.manifest, files=files))
    with pytest.raises(ParityError, match=r"flow differs by .*rollout drifts by"):
        verify(bundle.path)


@pytest.mark.parametrize("change", ["flipped", "cut", "missing"])
def test_tampering_is_one_clear_error(bundle: Bundle, change: str) -> None:
    path = bundle.path / "spatial" / "model.onnx"
    data = bytearray(path.read_bytes())
    if change == "flipped":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif change == "cut":
        path.write_bytes(data[:-10])
    else:
        path.unlink()
    with pytest.raises(BundleError, match=r"spatial/model.onnx .*export or copy it again"):
        canvasmar_rt.load(bundle.path)


def test_an_export_that_fails_parity_leaves_nothing(
    model: CanvasMAR, traced_once: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(parity.TOLERANCE, "float32", (1e-12, None, 1e-12))
    with pytest.raises(ParityError, match=r"export refused: .*\(tolerance 1e-12\)"):
        export_bundle(model, SAMPLING, tmp_path / "b", ExportOptions(), source="test")
    assert list(tmp_path.iterdir()) == []


def test_a_graph_tensorrt_refuses_leaves_nothing(
    model: CanvasMAR, traced_once: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_ops, "PLAIN", tensorrt_ops.PLAIN - {"Scan"})
    with pytest.raises(BundleError, match=r"flow: TensorRT would refuse .*Scan"):
        export_bundle(model, SAMPLING, tmp_path / "b", ExportOptions(), source="test")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("off", "by", "relative"), [(4, 1, 0.0), (5, 1, 5**0.5 / 2000), (1, 2, 1e-3)]
)
def test_pixels_rounded_the_other_way_make_no_difference(
    off: int, by: int, relative: float
) -> None:
    want = np.full(400, 100, np.uint8)
    got = want.copy()
    got[:off] += by
    found = difference({"frames": got}, {"frames": want})
    assert found.max_abs == by
    assert found.relative == pytest.approx(relative)
    values = {"latent": want.astype(np.float32)}
    assert difference({"latent": got}, values).relative > 0


def test_replacing_needs_force_and_is_all_or_nothing(bundle: Bundle, model: CanvasMAR) -> None:
    def stop(what: str) -> None:
        if what.startswith("golden rollout"):
            raise KeyboardInterrupt

    before = (bundle.path / MANIFEST).read_text()
    options = ExportOptions(seed=7)
    with pytest.raises(BundleError, match="--force"):
        export_bundle(model, SAMPLING, bundle.path, options, source="new")
    with pytest.raises(KeyboardInterrupt):
        export_bundle(
            model, SAMPLING, bundle.path, options, source="new", force=True, progress=stop
        )
    assert (bundle.path / MANIFEST).read_text() == before
    export_bundle(model, SAMPLING, bundle.path, options, source="new", force=True)
    assert json.loads((bundle.path / MANIFEST).read_text())["source"] == "new"
    assert [p.name for p in bundle.path.parent.iterdir()] == ["b"]


def test_what_came_while_it_ran_is_kept(
    model: CanvasMAR, traced_once: None, tmp_path: Path
) -> None:
    thesis = tmp_path / "b" / "thesis.txt"

    def come(what: str) -> None:
        if what.startswith("golden rollout"):
            thesis.parent.mkdir(exist_ok=True)
            thesis.write_text("years of work")

    with pytest.raises(BundleError, match="not a bundle"):
        export_bundle(
            model, SAMPLING, tmp_path / "b", ExportOptions(), source="test", progress=come
        )
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
    assert thesis.read_text() == "years of work"


def test_an_empty_folder_is_filled(model: CanvasMAR, traced_once: None, tmp_path: Path) -> None:
    export_bundle(model, SAMPLING, tmp_path, ExportOptions(drift_frames=1), source="test")
    assert Bundle.open(tmp_path).manifest.source == "test"


def test_files_are_readable_as_the_user_has_it(
    model: CanvasMAR, traced_once: None, tmp_path: Path
) -> None:
    before = os.umask(0o077)
    try:
        made = export_bundle(
            model, SAMPLING, tmp_path / "b", ExportOptions(drift_frames=1), source="test"
        ).path
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in (made, *made.rglob("*"))} == {0o700, 0o600}


def test_fast_takes_as_many_evaluations_as_are_unrolled(model: CanvasMAR, tmp_path: Path) -> None:
    options = ExportOptions(unroll=True, fast=dataclasses.replace(SAMPLING, flow_steps=1))
    with pytest.raises(ConfigError, match="unroll fixes the evaluations"):
        export_bundle(model, SAMPLING, tmp_path / "b", options, source="test")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("profile", ["default", "fast"])
def test_more_steps_than_tokens_are_refused_before_tracing(
    model: CanvasMAR, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: str
) -> None:
    monkeypatch.setattr(exporter, "trace", lambda *_: pytest.fail("was traced"))
    many = dataclasses.replace(SAMPLING, ar_steps=LEAST.tokens + 1)
    sampling, fast = (many, None) if profile == "default" else (SAMPLING, many)
    with pytest.raises(ConfigError, match=r"ar_steps must lie in 1\.\.16"):
        export_bundle(model, sampling, tmp_path / "b", ExportOptions(fast=fast), source="test")
    assert list(tmp_path.iterdir()) == []


def test_a_model_too_small_for_int8_is_refused(
    model: CanvasMAR, traced_once: None, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="no product of this model is large enough"):
        export_bundle(
            model, SAMPLING, tmp_path / "b", ExportOptions(quantize="int8"), source="test"
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("frame", [0, 2])
def test_a_rollout_that_is_not_finite_is_refused(bundle: Bundle, frame: int) -> None:
    """In whichever frame it begins to be."""
    golden = load_file(bundle.path / "golden" / "rollout.safetensors")
    golden["latents"][frame] = np.nan
    change_golden(bundle, "rollout", golden)
    with pytest.raises(ParityError, match="the rollout drifts by nan"):
        verify(bundle.path)


@pytest.mark.parametrize(
    ("weights", "advice"), [("", "look at the weights"), ("fp16", "float16 ends at 65504")]
)
def test_a_weight_that_is_not_finite_is_named_before_tracing(
    weights: str,
    advice: str,
    model: CanvasMAR,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exporter, "trace", lambda *_: pytest.fail("it was traced"))
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.flow.out.bias[0] = 1e5 if weights else torch.nan
    with pytest.raises(ParityError, match=rf"weight flow\.out\.bias is not finite.*{advice}"):
        export_bundle(
            broken, SAMPLING, tmp_path / "b", ExportOptions(weights=weights), source="test"
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("weights", "advice"), [("", "look at the weights"), ("fp16", "float16 ends at 65504")]
)
def test_an_export_that_overflows_says_what_to_do(
    weights: str,
    advice: str,
    model: CanvasMAR,
    traced_once: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody has a bundle yet to verify, or a rollout to reset."""

    def overflow(*_: object) -> None:
        require_finite("onnxruntime", "flow", np.array([np.inf], np.float32))

    monkeypatch.setattr(parity, "compare_rollout", overflow)
    with pytest.raises(ParityError, match=f"not finite: {advice}"):
        export_bundle(
            model, SAMPLING, tmp_path / "b", ExportOptions(weights=weights), source="test"
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("order", [1, -1])
def test_a_difference_that_is_not_finite_is_the_worse(order: int) -> None:
    near = Difference(max_abs=1.0, relative=1e-7, cosine=1.0)
    bad = Difference(max_abs=np.nan, relative=np.nan, cosine=np.nan)
    found = Difference.worse(*(near, bad)[::order])
    assert np.isnan([found.max_abs, found.relative, found.cosine]).all()


def test_a_full_disk_is_said(
    model: CanvasMAR, traced_once: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(exporter, "save_file", fail)
    with pytest.raises(InputError, match=r"/b: cannot be written \(No space left on device\)$"):
        export_bundle(model, SAMPLING, tmp_path / "b", ExportOptions(), source="test")
    assert list(tmp_path.iterdir()) == []


def test_half_precision_weights_halve_the_files(
    bundle: Bundle, model: CanvasMAR, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # trace again: the weights in the graphs are others
    small = export_bundle(
        model, SAMPLING, tmp_path / "half", ExportOptions(weights="fp16"), source="test"
    )

    def stored(b: Bundle) -> int:
        return sum(e.bytes for n, e in b.manifest.files.items() if n.endswith("safetensors")
                   and not n.startswith("golden"))  # fmt: skip

    assert stored(small) < 0.75 * stored(bundle)
    assert small.manifest.weights_dtype == "float16"
    assert max(verify(small.path)["drift"]) < 1e-3
    rounded = load_model(small).state_dict()
    exact = model.state_dict()
    assert any(not torch.equal(rounded[n], exact[n]) for n in exact)
    for name, value in exact.items():
        torch.testing.assert_close(rounded[name], value, rtol=1e-3, atol=1e-6)


def test_float16_runs_and_stays_close(model: CanvasMAR, tmp_path: Path) -> None:
    bundle = export_bundle(
        model, SAMPLING, tmp_path / "h", ExportOptions(dtype="fp16", opset=23), source="test"
    )
    kinds = {n.op_type for n in onnx.load(bundle.file("spatial")).graph.node}
    assert "Attention" in kinds
    for name in components(LEAST):
        assert tensorrt_ops.problems(onnx.load(bundle.file(name))) == []
    certificate = bundle.manifest.parity
    assert certificate is not None
    assert 1e-5 < certificate.components["spatial"].relative < 2e-2
    prediction = canvasmar_rt.load(bundle.path).start(seed=1).step()
    assert prediction.latent.dtype == np.float32
    assert np.isfinite(prediction.latent).all()


def test_unrolled_graphs_hold_no_loop(
    bundle: Bundle,
    model: CanvasMAR,
    parts: list[onnx.ModelProto],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CUDA graphs take no loops; the price is that the solver is fixed."""
    monkeypatch.undo()  # compose again, of the same parts
    again = map(copied, parts)
    monkeypatch.setattr(exporter, "to_onnx", lambda *_: next(again))
    unrolled = export_bundle(
        model, SAMPLING, tmp_path / "u", ExportOptions(unroll=True), source="test"
    )
    for name in ("flow", "frame"):
        proto = onnx.load(unrolled.file(name), load_external_data=False)
        kinds = {n.op_type for n in proto.graph.node}
        assert not kinds & {"Scan", "Loop", "If"}
        assert tensorrt_ops.problems(proto) == []
    ours, theirs = (canvasmar_rt.load(b.path).start(seed=1).step() for b in (unrolled, bundle))
    np.testing.assert_allclose(ours.latent, theirs.latent, atol=1e-5)
    other = dataclasses.replace(SAMPLING, flow_steps=5)
    with pytest.raises(ConfigError, match="unrolled for 2 evaluations"):
        canvasmar_rt.load(unrolled.path).start(sampling=other)
    canvasmar_rt.load(bundle.path).start(sampling=other)


@pytest.mark.parametrize("mistake", ["inverted", "ignored"])
def test_an_order_that_does_not_follow_the_staticness_is_caught(
    mistake: str,
    model: CanvasMAR,
    graphs: dict[str, onnx.ModelProto],
    parts: list[onnx.ModelProto],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The loop orders tokens on the host: only this looks at what the whole frame's graph does."""
    right, again = compose._order, map(copied, parts)

    def wrong(b: Any, staticness: str | None, *rest: Any) -> list[str]:
        if mistake == "ignored":
            return right(b, None, *rest)
        return right(b, b.op("Sub", [b.constant(np.float32(1), "one"), staticness]), *rest)

    monkeypatch.setattr(exporter, "to_onnx", lambda *_: next(again))
    monkeypatch.setattr(compose, "_order", wrong)
    with pytest.raises(ParityError, match="frame differs by"):
        export_bundle(model, SAMPLING, tmp_path / "w", ExportOptions(), source="test")


@pytest.mark.parametrize(
    ("changes", "first", "last"),
    [
        ({}, False, False),
        ({"order": "maskgit"}, False, True),
        ({"temperature": 0.0}, True, True),
    ],
)
def test_ties_in_a_set_that_no_noise_ranks_are_no_difference(
    changes: dict, first: bool, last: bool, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = load_file(bundle.path / "golden" / "frame.safetensors")
    outputs = {k.removeprefix("out."): v for k, v in golden.items() if k.startswith("out.")}
    sampling = dataclasses.replace(SAMPLING, **changes)
    engine = SimpleNamespace(
        bundle=SimpleNamespace(manifest=dataclasses.replace(bundle.manifest, sampling=sampling))
    )

    def same(*places: int) -> bool:
        """Whether nothing differs after an exchange of two places in the order."""
        swapped = {**outputs, "order": outputs["order"].copy()}
        swapped["order"][:, places] = swapped["order"][:, places[::-1]]
        monkeypatch.setattr(canvasmar_rt.verify, "run_component", lambda *_: swapped)
        return compare_component(engine, "frame", {}, outputs).relative == 0

    assert (same(0, 1), same(-2, -1), same(0, -1)) == (first, last, False)


@pytest.mark.parametrize("parameter", ["bos", "no_action"])
def test_what_only_beginnings_and_untold_actions_take_is_certified(
    parameter: str, model: CanvasMAR, traced_once: None, tmp_path: Path
) -> None:
    other = copy.deepcopy(model)
    (name,) = [n for n, _ in other.temporal.named_parameters() if n.endswith(parameter)]
    with torch.no_grad():
        other.temporal.get_parameter(name).neg_()
    with pytest.raises(ParityError, match="temporal differs by"):
        export_bundle(other, SAMPLING, tmp_path / "w", ExportOptions(), source="test")


def test_an_order_that_differs_in_every_frame_is_no_tie(bundle: Bundle) -> None:
    certificate = bundle.manifest.parity
    assert certificate is not None
    assert failures(certificate) == []
    every = dataclasses.replace(certificate, flipped_orders=len(certificate.drift))
    assert "frames put their tokens in another order" in failures(every)[0]
    rough = dataclasses.replace(every, tolerance=2e-1)  # as int8's is
    assert failures(rough) == []


def test_bfloat16_says_where_it_runs(model: CanvasMAR, tmp_path: Path) -> None:
    bundle = export_bundle(
        model, SAMPLING, tmp_path / "b", ExportOptions(dtype="bf16", opset=23), source="test"
    )
    certificate = bundle.manifest.parity
    assert certificate is not None
    assert certificate.engine == "torch"
    assert 1e-4 < certificate.components["spatial"].relative < 1e-1
    report = verify(bundle.path, engine="torch")
    worst = certificate.components["spatial"].relative  # of two batch sizes
    assert 1e-4 < report["components"]["spatial"]["relative"] <= worst
    with pytest.raises(BundleError, match=r"GPU engine only.*fp32"):
        canvasmar_rt.load(bundle.path)
    seen = set()
    for name in ("encoder", "decoder"):
        graph = onnx.shape_inference.infer_shapes(onnx.load(bundle.file(name))).graph
        types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info)}
        seen |= {(n.op_type, types[n.input[0]]) for n in graph.node if n.op_type in MOVES}
    # ONNX Runtime has no kernels of these for bfloat16
    assert seen == {("DepthToSpace", onnx.TensorProto.FLOAT)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp8"}, "fp32, fp16, bf16"),
        ({"opset": 26}, "20, 23, 24"),
        ({"opset": 23}, "opset 20"),
        ({"dtype": "fp16", "opset": 23, "weights": "bf16"}, "fp16 under an fp32 graph"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"drift_frames": 0}, "drift_frames"),
    ],
)
def test_options_are_checked(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExportOptions(**options)


def test_the_opset_goes_by_the_dtype() -> None:
    """Attention is one node where TensorRT takes it."""
    assert [ExportOptions(dtype=d).opset for d in ("fp32", "fp16", "bf16")] == [20, 23, 23]
    assert ExportOptions(quantize="int8").opset == 20


def test_a_bundle_that_cannot_be_replaced_stays(
    model: CanvasMAR, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old one has made room by the time the new one fails to take its place."""
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / MANIFEST).write_text("the old one")
    replace, calls = os.replace, iter(range(10))

    def fails(*arguments: Any) -> None:
        if next(calls) == 1:
            raise OSError("Input/output error")
        replace(*arguments)

    monkeypatch.setattr(exporter, "_write", lambda *_: None)
    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(InputError, match="Input/output error"):
        export_bundle(model, SAMPLING, tmp_path / "b", ExportOptions(), source="test", force=True)
    assert next(calls) == 3
    assert [p.name for p in tmp_path.rglob("*")] == ["b", MANIFEST]
    assert (tmp_path / "b" / MANIFEST).read_text() == "the old one"


def test_force_replaces_only_bundles(model: CanvasMAR, traced_once: None, tmp_path: Path) -> None:
    thesis = tmp_path / "precious" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    with pytest.raises(BundleError, match="not a bundle"):
        export_bundle(model, SAMPLING, thesis.parent, ExportOptions(), source="test", force=True)
    assert thesis.read_text() == "years of work"


def test_the_smallest_batch_may_be_more_than_one(
    model: CanvasMAR, traced_once: None, tmp_path: Path
) -> None:
    options = ExportOptions(batch=BatchRange(minimum=3, optimum=3, maximum=4), drift_frames=2)
    bundle = export_bundle(model, SAMPLING, tmp_path / "b", options, source="test")
    assert len(verify(bundle.path)["drift"]) == 2
    with pytest.raises(InputError, match=r"3\.\.4"):
        canvasmar_rt.load(bundle.path).start()
    assert canvasmar_rt.load(bundle.path).start(batch=4).step().frames.shape[0] == 4


def test_golden_tensors_that_do_not_fit_are_one_error(bundle: Bundle) -> None:
    tensors = load_file(bundle.path / "golden" / "flow.safetensors")
    del tensors["in.flow_noise"]
    change_golden(bundle, "flow", tensors)
    with pytest.raises(BundleError, match="golden tensors do not fit"):
        verify(bundle.path)


def change_golden(bundle: Bundle, name: str, tensors: dict[str, np.ndarray]) -> None:
    """Golden tensors with a manifest that knows them."""
    path = bundle.path / "golden" / f"{name}.safetensors"
    save_file(tensors, path)
    files = dict(bundle.manifest.files)
    files[f"golden/{name}.safetensors"] = FileEntry(sha256=sha256(path), bytes=path.stat().st_size)
    write_manifest(bundle.path, dataclasses.replace(bundle.manifest, files=files))


def test_a_golden_seed_that_is_no_number_is_one_error(bundle: Bundle) -> None:
    golden = load_file(bundle.path / "golden" / "rollout.safetensors")
    change_golden(bundle, "rollout", golden | {"seed": np.array([np.inf])})
    with pytest.raises(BundleError, match="golden tensors do not fit"):
        verify(bundle.path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("seed", lambda x: np.zeros((2, 2))),
        ("latents", lambda x: x[:, :1]),
        ("orders", lambda x: x + 1000),
        ("orders", lambda x: np.zeros_like(x)),
        ("orders", lambda x: x * np.nan),
        ("orders", lambda x: x[:, :2]),
    ],
)
def test_a_golden_rollout_that_is_none_is_one_error(
    bundle: Bundle, name: str, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    golden = load_file(bundle.path / "golden" / "rollout.safetensors")
    change_golden(bundle, "rollout", golden | {name: change(golden[name])})
    with pytest.raises(BundleError, match="golden tensors do not fit"):
        verify(bundle.path)


def test_golden_latents_of_nothing_are_one_error(bundle: Bundle) -> None:
    """They have no norm to divide by."""
    golden = load_file(bundle.path / "golden" / "rollout.safetensors")
    change_golden(bundle, "rollout", golden | {"latents": np.zeros_like(golden["latents"])})
    with pytest.raises(ParityError, match="rollout drifts"):
        verify(bundle.path)


def test_weights_that_are_no_safetensors_are_one_error(bundle: Bundle) -> None:
    (bundle.path / "flow" / "model.safetensors").write_bytes(b"garbage" * 9)
    with pytest.raises(BundleError, match=r"flow/model.safetensors cannot be read"):
        load_model(bundle)


def test_a_manifest_of_another_model_is_refused(bundle: Bundle) -> None:
    """Tensors are compared with those the graphs really have."""
    config = dataclasses.replace(LEAST, context_frames=4)
    changed = dataclasses.replace(
        bundle.manifest, model=config, components=component_entries(config, "float32")
    )
    write_manifest(bundle.path, changed)
    with pytest.raises(BundleError, match="temporal: the graph's tensors"):
        canvasmar_rt.load(bundle.path)


def change_graph(bundle: Bundle, name: str, model: onnx.ModelProto) -> None:
    """A graph with a manifest that knows it."""
    path = bundle.path / name
    path.write_bytes(model.SerializeToString())
    entry = FileEntry(sha256=sha256(path), bytes=path.stat().st_size)
    files = bundle.manifest.files | {name: entry}
    write_manifest(bundle.path, dataclasses.replace(bundle.manifest, files=files))


def test_a_graph_of_other_dtypes_is_refused(bundle: Bundle) -> None:
    """When it is loaded, not at its first run."""
    graph = onnx.load(bundle.path / "canvas" / "model.onnx", load_external_data=False)
    output = graph.graph.output[0]
    for node in graph.graph.node:
        for i, name in enumerate(node.output):
            if name == output.name:
                node.output[i] = "as it was"
    double = onnx.TensorProto.DOUBLE
    cast = onnx.helper.make_node("Cast", ["as it was"], [output.name], to=double)
    graph.graph.node.append(cast)
    output.type.tensor_type.elem_type = double
    change_graph(bundle, "canvas/model.onnx", graph)
    with pytest.raises(BundleError, match="canvas: the graph's tensors"):
        canvasmar_rt.load(bundle.path)


def test_names_in_a_graph_do_not_reach_the_terminal_as_they_are(bundle: Bundle) -> None:
    graph = onnx.load(bundle.path / "canvas" / "model.onnx", load_external_data=False)
    graph.graph.node[0].op_type = "Nothing\x1b[2J\n"
    change_graph(bundle, "canvas/model.onnx", graph)
    with pytest.raises(EngineError, match="canvas: ONNX Runtime refused the graph") as caught:
        canvasmar_rt.load(bundle.path)
    assert str(caught.value).isprintable()


def test_a_component_that_is_not_finite_is_refused(bundle: Bundle) -> None:
    golden = load_file(bundle.path / "golden" / "decoder.safetensors")
    name = next(n for n in golden if n.startswith("out.") and golden[n].dtype == np.float32)
    golden[name].fill(np.nan)
    change_golden(bundle, "decoder", golden)
    with pytest.raises(ParityError, match="decoder differs by nan"):
        verify(bundle.path)


def test_no_export_passes_that_is_not_finite() -> None:
    bad = Difference(max_abs=np.nan, relative=np.nan, cosine=np.nan)
    found = Parity(
        engine="onnxruntime", tolerance=1e-4, drift_tolerance=1e-3, components={"flow": bad},
        drift=(0.0, np.nan), flipped_orders=0,
    )  # fmt: skip
    assert [line.split(" by ")[0] for line in failures(found)] == [
        "flow differs",
        "the rollout drifts",
    ]
