"""Which engines are built, for which shapes, and what becomes of the old ones. TensorRT itself is a
stand-in, except in the last test."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import canvasmar_rt
from canvasmar_rt.bundle import BatchRange, Bundle
from canvasmar_rt.deadline import ladder
from canvasmar_rt.engines import tensorrt_build
from canvasmar_rt.engines.cuda_memory import Gpu
from canvasmar_rt.engines.tensorrt_build import BuildOptions, build_engines, profiles
from canvasmar_rt.engines.tensorrt_cache import Profile, plan_path, read_metadata, read_plan
from canvasmar_rt.errors import ConfigError, EngineError, InputError
from canvasmar_rt.schedule import ar_steps, flow_plan

LIBRARY = "canvasmar_rt.engines.tensorrt_library"
BATCH = BatchRange(minimum=1, optimum=2, maximum=8)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open("toytable")


def with_sampling(bundle: Bundle, **changes: object) -> Bundle:
    sampling = dataclasses.replace(bundle.manifest.sampling, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(
        bundle, manifest=dataclasses.replace(bundle.manifest, sampling=sampling, fast=None)
    )


class Library:
    """In place of `tensorrt_library`: refuses the components in `refusing`."""

    def __init__(self) -> None:
        self.trt = SimpleNamespace(__version__="11.4.0.106")
        self.refusing: set[str] = set()
        self.compiled: list[str] = []
        self.chosen: list[int] = []
        self.caches: list[bytes] = []
        self.bundle = Bundle.open("toytable")
        self.wrong: dict[str, str] = {}

    def compile_graph(
        self,
        onnx: Path,
        shapes: Mapping[str, Profile],
        *,
        timing_cache: bytes,
        progress,
        **_: object,
    ) -> SimpleNamespace:
        name = next(n for n in self.bundle.manifest.components if self.bundle.file(n) == onnx)
        if name in self.refusing:
            raise EngineError(f"{onnx}: TensorRT cannot parse it: Scan loop: no")
        self.compiled.append(name)
        self.caches.append(timing_cache)
        progress(1, 2)
        entry = self.bundle.manifest.components[name]
        return SimpleNamespace(
            plan=name.encode() * 100,
            information='{"Layers": [{"Outputs": [{"Datatype": "Float"}]}]}',
            io_dtypes={t.name: t.dtype for t in (*entry.inputs, *entry.outputs)} | self.wrong,
            timing_cache=timing_cache + b".",
            cache_refused=timing_cache == b"foreign",
        )


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    fake = Library()
    monkeypatch.setitem(sys.modules, LIBRARY, fake)  # type: ignore[arg-type]
    h200 = Gpu(name="NVIDIA H200", compute_capability="9.0")
    cards = [h200, Gpu(name="NVIDIA RTX A4000", compute_capability="8.6")]
    monkeypatch.setattr(tensorrt_build, "gpu", lambda index=0: cards[index])
    monkeypatch.setattr(tensorrt_build, "choose_gpu", fake.chosen.append)
    return fake


@pytest.fixture
def without_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.delitem(sys.modules, LIBRARY, raising=False)


# -- shapes


def test_profiles_hold_every_call_of_a_frame(bundle: Bundle) -> None:
    """Known after step k of K are 64 - floor(64 cos(pi/2 k/K)), by hand: 5, 19, 40 and 64 tokens of
    four steps, 19 and 64 of two, which deadlines come to; `fast` has one."""
    drawn, known = [64, 5, 14, 21, 24, 19, 45], [0, 0, 5, 19, 40, 0, 19]
    spatial, first = (profiles(bundle, n, BATCH) for n in ("spatial", "spatial_first"))
    flow = profiles(bundle, "flow", BATCH)
    assert spatial is not None
    assert first is not None
    assert flow is not None
    for batch, (s, k) in itertools.product((1, 8), zip(drawn, known, strict=True)):
        assert flow["select_index"].takes((batch, s))
        for g in (1, 2, 3):
            assert flow["z_tokens"].takes((g, batch, s, 256))
        if k:
            assert spatial["known_index"].takes((batch, k))
            assert spatial["mask_index"].takes((batch, 64 - k))
    assert flow["select_index"] == Profile(minimum=(1, 5), optimum=(2, 64), maximum=(8, 64))
    assert first["select_index"] == Profile(minimum=(1, 5), optimum=(2, 64), maximum=(8, 64))
    assert spatial["known_index"] == Profile(minimum=(1, 5), optimum=(2, 19), maximum=(8, 40))
    assert spatial["mask_index"] == Profile(minimum=(1, 24), optimum=(2, 45), maximum=(8, 59))
    assert flow["flow_time"] == Profile(minimum=(3,), optimum=(4,), maximum=(30,))
    assert flow["branch_weight"] == Profile(minimum=(1,), optimum=(3,), maximum=(3,))


@pytest.mark.parametrize("profile", ["default", "fast"])
def test_a_rollout_with_deadlines_finds_its_shapes(bundle: Bundle, profile: str) -> None:
    flow = profiles(bundle, "flow", BATCH)
    assert flow is not None
    for rung in ladder(bundle.manifest.profile(profile)):
        assert flow["flow_time"].takes((len(flow_plan(rung).time),))
        for step in ar_steps(bundle.manifest.model.tokens, rung.ar_steps):
            assert flow["select_index"].takes((1, step.drawn))


def test_every_input_of_changing_shape_has_a_profile(bundle: Bundle) -> None:
    for name, entry in bundle.manifest.components.items():
        found = profiles(bundle, name, BATCH)
        assert found is not None
        changing = {t.name for t in entry.inputs if any(isinstance(d, str) for d in t.dims)}
        assert set(found) == changing
        for tensor in entry.inputs:
            if "B" in tensor.dims:
                axis = tensor.dims.index("B")
                p = found[tensor.name]
                assert (p.minimum[axis], p.optimum[axis], p.maximum[axis]) == (1, 2, 8)
    frame = profiles(bundle, "frame", BATCH)
    assert frame is not None
    assert frame["order_noise"].maximum == (8, 4, 64)
    assert "frame_noise_level" not in frame  # a scalar


def test_the_solver_decides_how_often_the_flow_head_runs(bundle: Bundle) -> None:
    heun = profiles(with_sampling(bundle, solver="heun", flow_steps=10), "flow", BATCH)
    assert heun is not None
    assert heun["step_new"] == Profile(minimum=(6,), optimum=(20,), maximum=(20,))


def test_one_ar_step_needs_no_further_one(bundle: Bundle, tmp_path: Path) -> None:
    single = with_sampling(bundle, ar_steps=1)
    assert profiles(single, "spatial", BATCH) is None
    report = build_engines(single, tmp_path, BuildOptions(dry_run=True, components=("spatial",)))
    assert report.components[0].action == "not needed"


# -- options


@pytest.mark.parametrize(
    ("option", "value"),
    [("optimization_level", 6), ("optimization_level", -1), ("workspace_bytes", 0)],
)
def test_options_out_of_range(option: str, value: int) -> None:
    with pytest.raises(ConfigError, match=option):
        BuildOptions(**{option: value})  # type: ignore[arg-type]


def test_a_batch_or_component_the_bundle_lacks(bundle: Bundle, tmp_path: Path) -> None:
    large = BatchRange(minimum=1, optimum=1, maximum=33)
    with pytest.raises(ConfigError, match=r"batch 1\.\.33 is outside the 1\.\.32"):
        build_engines(bundle, tmp_path, BuildOptions(dry_run=True, batch=large))
    with pytest.raises(ConfigError, match="no component flows; there are encoder, temporal"):
        build_engines(bundle, tmp_path, BuildOptions(dry_run=True, components=("flows",)))


def test_a_file_is_no_folder_for_engines(bundle: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "engines"
    file.touch()
    with pytest.raises(InputError, match="engines: a file, where"):
        build_engines(bundle, file, BuildOptions(dry_run=True))


# -- without TensorRT


@pytest.mark.usefixtures("without_tensorrt")
def test_building_without_tensorrt_names_the_command(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r'pip install "canvasmar-rt\[tensorrt\]"'):
        build_engines(bundle, tmp_path / "engines")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("without_tensorrt")
def test_a_dry_run_needs_no_tensorrt_and_writes_nothing(bundle: Bundle, tmp_path: Path) -> None:
    report = build_engines(bundle, tmp_path / "engines", BuildOptions(dry_run=True))
    assert [c.component for c in report.components] == list(bundle.manifest.components)
    assert {c.action for c in report.components} == {"would build"}
    assert {c.reasons for c in report.components} == {("not built yet",)}
    assert "TensorRT version could not be compared" in report.notes[0]
    assert not list(tmp_path.iterdir())


# -- building


def test_built_once_then_reused(bundle: Bundle, tmp_path: Path, library: Library) -> None:
    told: list[tuple[str, int, int]] = []
    first = build_engines(bundle, tmp_path, progress=lambda *line: told.append(line))
    names = list(bundle.manifest.components)
    assert {c.action for c in first.components} == {"built"}
    assert told == [(name, 1, 2) for name in names]
    for name in names:
        found = read_metadata(tmp_path, name)
        assert read_plan(tmp_path, name, found) == name.encode() * 100
        assert found.source.gpu == "NVIDIA H200"
        assert found.source.bundle == bundle.fingerprint
        assert found.layer_dtypes == {"float32": 1}
        assert json.loads((tmp_path / f"{name}.plan.metadata.json").read_text())
    again = build_engines(bundle, tmp_path)
    assert {c.action for c in again.components} == {"reused"}
    assert library.compiled == names
    dry = build_engines(bundle, tmp_path, BuildOptions(dry_run=True))
    assert {c.action for c in dry.components} == {"would reuse"}


def test_engines_are_built_for_the_gpu_that_is_named(
    bundle: Bundle, tmp_path: Path, library: Library
) -> None:
    only = BuildOptions(components=("decoder",))
    build_engines(bundle, tmp_path, only)
    again = build_engines(bundle, tmp_path, only, device="cuda:1").components[0]
    assert again.action == "built"
    assert any("H200" in reason and "A4000" in reason for reason in again.reasons)
    assert read_metadata(tmp_path, "decoder").source.gpu == "NVIDIA RTX A4000"
    assert library.chosen == [0, 1]
    with pytest.raises(EngineError, match="knows no device 'cpu'"):
        build_engines(bundle, tmp_path, only, device="cpu")


def test_what_does_not_fit_is_rebuilt_and_why(
    bundle: Bundle, tmp_path: Path, library: Library
) -> None:
    one = BuildOptions(components=("flow",))
    build_engines(bundle, tmp_path, one)

    def why(**changes: object) -> str:
        options = dataclasses.replace(one, dry_run=True, **changes)  # type: ignore[arg-type]
        (component,) = build_engines(bundle, tmp_path, options).components
        assert component.action == "would build"
        return "; ".join(component.reasons)

    assert "a rebuild was asked for" in why(force_rebuild=True)
    assert "optimisation level: built for 3, here 5" in why(optimization_level=5)
    assert "workspace: built for none, here 64" in why(workspace_bytes=64)
    assert "shape of select_index" in why(batch=BATCH)
    library.trt.__version__ = "10.16.1.11"
    assert "TensorRT: built for 11.4.0.106, here 10.16.1.11" in why()
    library.trt.__version__ = "11.4.0.106"
    plan_path(tmp_path, "flow").unlink()
    assert "flow.plan is missing" in why()
    plan_path(tmp_path, "flow").write_bytes(b"cut")
    assert "it was cut" in why()
    (made,) = build_engines(bundle, tmp_path, one).components
    assert made.action == "built"
    assert "it was cut" in made.reasons[0]


def test_only_the_whole_frame_may_be_refused(
    bundle: Bundle, tmp_path: Path, library: Library
) -> None:
    library.refusing = {"frame"}
    report = build_engines(bundle, tmp_path)
    refused = report.components[-1]
    assert (refused.component, refused.action) == ("frame", "refused")
    assert "cannot parse it: Scan loop" in refused.reasons[0]
    library.refusing = {"flow"}
    before = read_metadata(tmp_path, "flow")
    with pytest.raises(EngineError, match=r"flow: .*cannot parse it: Scan loop"):
        build_engines(bundle, tmp_path, BuildOptions(force_rebuild=True))
    assert read_metadata(tmp_path, "flow") == before
    assert read_plan(tmp_path, "flow", before)


def test_an_engine_with_other_tensors_is_refused(
    bundle: Bundle, tmp_path: Path, library: Library
) -> None:
    library.wrong = {"select_index": "int32"}
    with pytest.raises(EngineError, match="select_index is int32, expected int64"):
        build_engines(bundle, tmp_path, BuildOptions(components=("flow",)))
    assert not list(tmp_path.iterdir())


def test_measurements_are_kept(bundle: Bundle, tmp_path: Path, library: Library) -> None:
    cache = tmp_path / "timings"
    options = BuildOptions(components=("flow", "canvas"), timing_cache=cache)
    build_engines(bundle, tmp_path / "engines", options)
    assert library.caches == [b"", b"."]
    assert cache.read_bytes() == b".."
    cache.write_bytes(b"foreign")
    again = dataclasses.replace(options, force_rebuild=True)
    report = build_engines(bundle, tmp_path / "engines", again)
    assert "of another TensorRT or GPU" in report.notes[0]


@pytest.mark.tensorrt
def test_on_a_gpu_engines_predict_what_onnxruntime_predicts(bundle: Bundle, tmp_path: Path) -> None:
    try:
        from canvasmar_rt.engines import tensorrt_library  # noqa: F401

        tensorrt_build.gpu()
    except EngineError as error:
        pytest.skip(str(error))
    needed = tuple(n for n in bundle.manifest.components if n != "frame")
    batch = BatchRange(minimum=1, optimum=1, maximum=2)
    options = BuildOptions(components=needed, batch=batch, timing_cache=tmp_path / "timings")
    build_engines(bundle, tmp_path, options)
    for name in needed:
        assert set(read_metadata(tmp_path, name).io_dtypes.values()) <= {
            "float32",
            "int64",
            "uint8",
        }
    found = canvasmar_rt.load("toytable", engine="tensorrt", device="cuda", engine_dir=tmp_path)
    ours, theirs = (p.start(seed=3, batch=2) for p in (found, canvasmar_rt.load("toytable")))
    for _ in range(8):  # past the point where the ring wraps, and graphs are replayed
        got, want = ours.step(), theirs.step()
        np.testing.assert_array_equal(got.order, want.order)
        assert np.linalg.norm(got.latent - want.latent) < 1e-3 * np.linalg.norm(want.latent)
