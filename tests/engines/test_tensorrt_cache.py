"""What lies on disk beside a TensorRT plan, and when the plan may be used. No TensorRT needed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shlex
from pathlib import Path

import pytest

from canvasmar_rt.bundle import Bundle, sha256
from canvasmar_rt.config import to_dict
from canvasmar_rt.engines import tensorrt_cache
from canvasmar_rt.engines.tensorrt_cache import (
    SCHEMA_VERSION,
    EngineMetadata,
    EngineSource,
    Profile,
    build_command,
    files_of,
    layer_dtypes,
    metadata_path,
    mismatches,
    plan_path,
    read_metadata,
    read_plan,
    write_engine,
)
from canvasmar_rt.errors import ConfigError, EngineError

PROFILE = Profile(minimum=(1, 8), optimum=(2, 8), maximum=(4, 8))
SOURCE = EngineSource(
    component="flow",
    tensorrt="11.4.0.106",
    gpu="NVIDIA H200",
    compute_capability="9.0",
    bundle="b" * 64,
    onnx_sha256="a" * 64,
    weights_sha256={"flow/model.safetensors": "c" * 64},
    profiles={"latent": PROFILE},
    optimization_level=3,
    workspace_bytes=None,
)
PLAN = bytes(range(256)) * 4


def metadata(plan: bytes = PLAN, **changes: object) -> EngineMetadata:
    return EngineMetadata(
        schema_version=SCHEMA_VERSION,
        source=dataclasses.replace(SOURCE, **changes),  # type: ignore[arg-type]
        io_dtypes={"latent": "float32"},
        layer_dtypes={"float16": 12},
        plan_sha256=hashlib.sha256(plan).hexdigest(),
        plan_bytes=len(plan),
        built_at="2026-01-01T00:00:00+00:00",
    )


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_engine(tmp_path, PLAN, metadata())
    return tmp_path


def test_what_was_written_is_read(directory: Path) -> None:
    found = read_metadata(directory, "flow")
    assert found == metadata()
    assert read_plan(directory, "flow", found) == PLAN
    assert {p.name for p in directory.iterdir()} == {"flow.plan", "flow.plan.metadata.json"}


DIFFERENT = {
    "component": ("spatial", ["component: built for flow, here spatial", "renamed"]),
    "tensorrt": ("10.16.1.11", ["TensorRT: built for 11.4.0.106, here 10.16.1.11", "version"]),
    "gpu": ("NVIDIA L4", ["GPU: built for NVIDIA H200, here NVIDIA L4", "measuring"]),
    "compute_capability": ("8.9", ["compute capability: built for 9.0, here 8.9", "hardware"]),
    "bundle": ("d" * 64, ["bundle: built for bbbbbbbbbbbb..., here dddddddddddd...", "export"]),
    "onnx_sha256": ("e" * 64, ["graph: built for aaaaaaaaaaaa..., here eeeeeeeeeeee...", "ONNX"]),
    "weights_sha256": (
        {"flow/model.safetensors": "f" * 64},
        ["weights flow/model.safetensors: built for cccccccccccc..., here ffffffffffff..."],
    ),
    "profiles": (
        {"latent": Profile(minimum=(1, 8), optimum=(2, 8), maximum=(8, 8))},
        ["shape of latent: built for 1x8 to 4x8 (best at 2x8), here 1x8 to 8x8 (best at 2x8)"],
    ),
    "optimization_level": (5, ["optimisation level: built for 3, here 5"]),
    "workspace_bytes": (1 << 30, ["workspace: built for none, here 1073741824"]),
}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(EngineSource)])
def test_every_difference_is_named(field: str) -> None:
    value, words = DIFFERENT[field]
    lines = mismatches(SOURCE, dataclasses.replace(SOURCE, **{field: value}))  # type: ignore[arg-type]
    assert len(lines) == 1
    assert all(word in lines[0] for word in words)


def test_all_differences_are_named_at_once() -> None:
    other = EngineSource(**{field: value for field, (value, _) in DIFFERENT.items()})  # type: ignore[arg-type]
    assert len(mismatches(SOURCE, other)) == len(DIFFERENT)
    assert mismatches(SOURCE, SOURCE) == []


def test_an_input_more_or_less_is_a_difference() -> None:
    more = dataclasses.replace(SOURCE, profiles={"latent": PROFILE, "noise": PROFILE})
    assert mismatches(SOURCE, more)[0].startswith("shape of noise: built for none, here 1x8")
    assert mismatches(more, SOURCE)[0].startswith("shape of noise: built for 1x8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.write_bytes(PLAN[:-1]), "1023 bytes, expected 1024: it was cut"),
        (lambda p: p.write_bytes(b"\1" + PLAN[1:]), "does not match its sha256"),
        (lambda p: p.unlink(), "is missing"),
        (lambda p: (p.unlink(), p.mkdir()), "bytes, expected 1024|cannot be read"),
    ],
    ids=["cut", "tampered", "missing", "folder"],
)
def test_a_damaged_plan_is_refused(directory: Path, change: object, message: str) -> None:
    change(plan_path(directory, "flow"))  # type: ignore[operator]
    with pytest.raises(EngineError, match=message):
        read_plan(directory, "flow", metadata())


def changed(**changes: object) -> bytes:
    return json.dumps({**to_dict(metadata()), **changes}).encode()


HOSTILE = {
    "empty": (b"", "not JSON"),
    "cut": (changed()[:-5], "not JSON"),
    "not text": (b"\xff\xfe\xff", "not JSON"),
    "deep": (b"[" * 200_000, "not JSON"),
    "a list": (b"[]", "schema version None"),
    "another schema": (changed(schema_version=1), "schema version 1, this program reads 2"),
    "an unknown key": (changed(run="rm -rf /"), "unknown keys"),
    "a missing key": (json.dumps({"schema_version": 2}).encode(), "key 'source' is missing"),
    "a wrong type": (changed(plan_bytes="1024"), "plan_bytes: expected int"),
    "a boolean": (changed(plan_bytes=True), "plan_bytes: expected int"),
    "a huge number": (b'{"schema_version": ' + b"9" * 5000 + b"}", "not JSON"),
    "control characters": (changed(built_at="\x1b[2J"), "control characters"),
    "control keys": (changed(io_dtypes={"\x1b[2J": "float32"}), "control characters"),
    "upside down": (
        changed(
            source={
                **to_dict(SOURCE),
                "profiles": {"x": {"minimum": [2], "optimum": [1], "maximum": [1]}},
            }
        ),
        "need 1 <= minimum",
    ),
    "large": (b" " * (5 << 20), "too many"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_metadata_is_refused(directory: Path, name: str) -> None:
    text, message = HOSTILE[name]
    metadata_path(directory, "flow").write_bytes(text)
    with pytest.raises(EngineError, match=message) as raised:
        read_metadata(directory, "flow")
    assert str(raised.value).isprintable()


def test_missing_metadata_is_named(directory: Path) -> None:
    with pytest.raises(EngineError, match=r"spatial\.plan\.metadata\.json is missing"):
        read_metadata(directory, "spatial")


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_failed_write_leaves_what_was_there(
    directory: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """Each of the three steps that put the new files in place fails once."""
    replace, calls = os.replace, iter(range(10))

    def full(source: object, target: object) -> None:
        if next(calls) == failing:
            raise OSError(28, "No space left on device")
        replace(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(EngineError, match="No space left"):
        write_engine(directory, b"new", metadata(b"new"))
    monkeypatch.undo()
    assert read_plan(directory, "flow", read_metadata(directory, "flow")) == PLAN
    assert len(list(directory.iterdir())) == 2


def test_a_full_disk_leaves_what_was_there(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensorrt_cache, "_write", full)
    with pytest.raises(EngineError, match="No space left"):
        write_engine(directory, b"new", metadata(b"new"))
    assert read_plan(directory, "flow", read_metadata(directory, "flow")) == PLAN
    assert len(list(directory.iterdir())) == 2


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match="cannot be written"):
        write_engine(tmp_path / "file", PLAN, metadata())


@pytest.mark.parametrize(
    ("minimum", "optimum", "maximum"),
    [((0,), (1,), (1,)), ((2,), (1,), (3,)), ((1,), (4,), (3,)), ((1, 1), (1,), (1,))],
)
def test_profiles_are_checked(minimum: tuple, optimum: tuple, maximum: tuple) -> None:
    with pytest.raises(ConfigError, match="minimum <= optimum <= maximum"):
        Profile(minimum=minimum, optimum=optimum, maximum=maximum)


def test_a_profile_knows_what_it_takes() -> None:
    assert [PROFILE.takes(s) for s in ((1, 8), (4, 8), (5, 8), (0, 8), (1, 7), (1,))] == [
        True, True, False, False, False, False,
    ]  # fmt: skip


def test_hashes_are_those_of_the_files() -> None:
    bundle = Bundle.open("toytable")
    for component, entry in bundle.manifest.components.items():
        graph, weights = files_of(bundle, component)
        assert graph == sha256(bundle.path / entry.file)
        assert weights == {name: sha256(bundle.path / name) for name in weights}
    assert list(files_of(bundle, "condition")[1]) == ["spatial/model.safetensors"]
    assert len(files_of(bundle, "frame")[1]) == 6


def test_the_command_survives_a_shell() -> None:
    command = build_command(Bundle.open("toytable"), Path("my engines"))
    assert shlex.split(command)[-2:] == ["--engine-dir", "my engines"]


def test_dtypes_are_found_in_what_an_inspector_says() -> None:
    """In the form of both versions, by their documentation."""
    ten = {
        "Layers": [
            {
                "Name": "a",
                "Inputs": [{"Name": "x", "Format/Datatype": "Row major linear FP16 format"}],
                "Outputs": [{"Format/Datatype": "Thirty-two wide channel Int8 format."}],
            },
            "a layer that is only a name",
            {"Outputs": [{"Format/Datatype": "N/A due to dynamic shapes"}]},
        ],
        "Bindings": ["x"],
    }
    eleven = {
        "Layers": [{"Outputs": [{"Format": "Row major linear", "DataType": "Half"}] * 2}],
        "I/O Tensors": [{"Name": "x", "DataType": "Float"}],
    }
    assert layer_dtypes(json.dumps(ten)) == {
        "N/A due to dynamic shapes": 1, "float16": 1, "int8": 1,
    }  # fmt: skip
    assert layer_dtypes(json.dumps(eleven)) == {"float16": 2}
    assert layer_dtypes("no JSON") == layer_dtypes("[]") == {}


def test_weights_more_or_less_are_a_difference() -> None:
    more = dataclasses.replace(SOURCE, weights_sha256={**SOURCE.weights_sha256, "a": "d" * 64})
    assert mismatches(SOURCE, more)[0].startswith("weights a: built for none, here dddd")
    assert mismatches(more, SOURCE)[0].startswith("weights a: built for dddd")


def test_the_command_names_another_gpu() -> None:
    bundle = Bundle.open("toytable")
    assert build_command(bundle, Path("e"), "cuda:1").endswith(" --device cuda:1")
    assert "--device" not in build_command(bundle, Path("e"))


def test_the_first_word_that_is_a_dtype_counts() -> None:
    told = {"Layers": [{"Format/Datatype": "FP16 format, reordered from FP32"}]}
    assert layer_dtypes(json.dumps(told)) == {"float16": 1}
