"""Hostile and broken bundles: every one is refused with one line that says what to do.

The bundle here is made by hand; its graphs are dummies, since opening one only hashes them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from canvasmar_rt import bundle
from canvasmar_rt.bundle import (
    MANIFEST,
    SCHEMA_VERSION,
    BatchRange,
    Bundle,
    Difference,
    FileEntry,
    Manifest,
    Parity,
    component_entries,
    resolve,
    sha256,
    write_manifest,
)
from canvasmar_rt.config import (
    AutoencoderConfig,
    ModelConfig,
    SamplingConfig,
    from_dict,
    to_dict,
)
from canvasmar_rt.engines import create
from canvasmar_rt.errors import BundleError, ConfigError
from tests.conftest import least_config

MODEL = least_config(
    "tiny",
    autoencoder=AutoencoderConfig(
        height=16, width=16, temporal_compression=2, latent_channels=4, widths=(8,), blocks=1
    ),
    dim=32,
    action_dim=0,
)
REMEDIES = ("export", "copy", "trust")
"""A message that says what to do holds one of these."""


def write(directory: Path, model: ModelConfig = MODEL, dtype: Any = "float32") -> Manifest:
    """A whole bundle with dummy graphs and one golden file."""
    entries = component_entries(model, dtype)
    contents = {entry.file: f"graph {name}".encode() for name, entry in entries.items()}
    for name, data in contents.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    golden = directory / "golden" / "flow.safetensors"
    golden.parent.mkdir(exist_ok=True)
    save_file({"z_tokens": np.arange(6, dtype=np.float32).reshape(2, 3)}, golden)
    contents["golden/flow.safetensors"] = golden.read_bytes()
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        producer={"canvasmar-rt": "0"},
        source="a test",
        model=model,
        sampling=SamplingConfig(),
        dtype=dtype,
        weights_dtype="float32",
        opset=20,
        batch=BatchRange(),
        latent_mean=(0.0,) * 4,
        latent_std=(1.0,) * 4,
        components=entries,
        files={
            name: FileEntry(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
            for name, data in contents.items()
        },
    )
    write_manifest(directory, manifest)
    return manifest


@pytest.fixture
def made(tmp_path: Path) -> Path:
    directory = tmp_path / "bundle"
    directory.mkdir()
    write(directory)
    return directory


def edit(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest as an attacker would: JSON in, JSON out."""
    path = directory / MANIFEST
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def refused(directory: Path | str) -> str:
    """The message with which a bundle is refused."""
    with pytest.raises(BundleError) as caught:
        Bundle.open(directory)
    message = str(caught.value)
    assert "\n" not in message
    assert any(word in message for word in REMEDIES), f"what to do? {message}"
    assert caught.value.__cause__ is None
    return message


def file_entry(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


# -- a good one


def test_opens(made: Path) -> None:
    seen: list[str] = []
    opened = Bundle.open(made, progress=seen.append)
    assert opened.path == made
    assert opened.manifest.model == MODEL
    assert sorted(opened.manifest.files) == seen
    assert opened.file("flow") == made / "flow/model.onnx"
    np.testing.assert_array_equal(
        opened.tensors("golden/flow.safetensors")["z_tokens"], [[0, 1, 2], [3, 4, 5]]
    )
    assert Bundle.open(made / MANIFEST).path == made
    assert Bundle.open(str(made)) == opened


def test_the_fingerprint_is_of_contents_and_names(made: Path) -> None:
    """Engines built for other weights of the same size must not pass for those of these."""
    opened = Bundle.open(made)
    assert Bundle.open(made).fingerprint == opened.fingerprint
    files = opened.manifest.files

    def other(files: dict[str, FileEntry]) -> str:
        manifest = dataclasses.replace(opened.manifest, files=files)
        return dataclasses.replace(opened, manifest=manifest).fingerprint

    assert other(dict(reversed(files.items()))) == opened.fingerprint
    entry = files["flow/model.onnx"]
    changed = dataclasses.replace(entry, sha256="0" * 64)
    assert other(files | {"flow/model.onnx": changed}) != opened.fingerprint
    renamed = {"flow/other.onnx" if e is entry else n: e for n, e in files.items()}
    assert other(renamed) != opened.fingerprint


def test_manifest_round_trip(made: Path) -> None:
    manifest = dataclasses.replace(
        Bundle.open(made).manifest,
        parity=Parity(
            engine="onnxruntime",
            tolerance=1e-4,
            drift_tolerance=1e-3,
            components={"flow": Difference(max_abs=1e-6, relative=1e-6, cosine=1.0)},
            drift=(1e-6, 2e-6),
            flipped_orders=0,
        ),
    )
    write_manifest(made, manifest)
    assert Bundle.open(made).manifest == manifest
    assert from_dict(Manifest, json.loads(json.dumps(to_dict(manifest)))) == manifest


def test_bundles_may_move_and_hold_links_within(made: Path, tmp_path: Path) -> None:
    moved = made.rename(tmp_path / "moved")
    link = tmp_path / "link"
    link.symlink_to(moved)
    assert Bundle.open(link).path == link
    target = moved / "frame.onnx"
    target.rename(moved / "real.onnx")
    target.symlink_to("real.onnx")
    Bundle.open(link)


def test_dtypes_of_hidden_tensors(made: Path) -> None:
    write(made, dtype="float16")
    opened = Bundle.open(made)
    dtypes = {t.name: t.dtype for t in opened.manifest.components["temporal"].outputs}
    assert set(dtypes.values()) == {"float16"}
    assert {t.dtype for t in opened.manifest.components["decoder"].outputs} == {"uint8", "float16"}
    write(made, dtype="bfloat16")
    with pytest.raises(BundleError, match="--dtype"):
        create("onnxruntime", Bundle.open(made), device="cpu")


def test_unlisted_tensors_are_refused(made: Path) -> None:
    opened = Bundle.open(made)
    for name in ("golden/none.safetensors", "../secret.safetensors", str(made / MANIFEST)):
        with pytest.raises(BundleError, match="not part of this bundle"):
            opened.tensors(name)
    with pytest.raises(BundleError, match="cannot be read") as caught:
        opened.tensors("flow/model.onnx")
    assert "\n" not in str(caught.value)


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(tmp_path / "x") == digest


# -- where is it


def test_no_such_bundle(tmp_path: Path) -> None:
    assert "no such bundle" in refused(tmp_path / "none")
    assert "canvasmar-rt export" in refused("no-such-name")
    assert "bair, ucf101, kinetics600" in refused("kinetic600")  # `info` and the limit take presets


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/", "x\0y", "\ud800", "l" * 300])
def test_odd_names_are_refused(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    refused(name)


@pytest.mark.parametrize("name", bundle.packaged_names())
def test_packaged_bundles_are_as_they_were_exported(name: str) -> None:
    """Every file, the model card too, has the digest that `export` wrote down."""
    assert Bundle.open(name).manifest.files


def test_git_changes_no_line_ending_of_a_packaged_bundle() -> None:
    """As Git for Windows does, unless told not to: the hashes would be others."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists() or shutil.which("git") is None:
        pytest.skip("no checkout, or no git")
    bundles = root / "canvasmar_rt" / "data" / "bundles"
    files = [str(path) for path in bundles.rglob("*") if path.is_file()]
    assert files
    command = ["git", "check-attr", "text", *files]
    told = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    assert [line for line in told.splitlines() if not line.endswith(": text: unset")] == []


def test_packaged_names_are_found(
    made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bundle, "PACKAGED", tmp_path)
    assert bundle.packaged_names() == ["bundle"]
    assert resolve("bundle") == made
    assert "bundle" in refused("bundel")


def test_a_directory_without_a_manifest(tmp_path: Path) -> None:
    assert MANIFEST in refused(tmp_path)
    (tmp_path / MANIFEST).mkdir()
    assert MANIFEST in refused(tmp_path)


# -- manifests that are no manifests


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"not json",
        b'{"schema_version": 1',
        b"\xff\xfe\x00",
        b"\x80\x04\x95pickle",
        b"[" * 100_000,
        b'{"schema_version":' * 100_000,
        b'{"schema_version": ' + b"9" * 5000 + b"}",
    ],
    ids=["empty", "text", "cut", "utf16", "pickle", "deep-list", "deep-object", "digits"],
)
def test_not_json(made: Path, text: bytes) -> None:
    (made / MANIFEST).write_bytes(text)
    assert "not JSON" in refused(made)


def test_a_manifest_of_absurd_size_is_not_parsed(made: Path) -> None:
    os.truncate(made / MANIFEST, bundle.MANIFEST_BYTES + 1)
    assert f"{bundle.MANIFEST_BYTES + 1} bytes" in refused(made)


@pytest.mark.parametrize("text", ["[]", "null", "3", '"x"', "{}", '{"schema_version": null}'])
def test_no_schema_version(made: Path, text: str) -> None:
    (made / MANIFEST).write_text(text)
    assert "schema version None" in refused(made)


@pytest.mark.parametrize(
    "version", [0, SCHEMA_VERSION - 1, SCHEMA_VERSION + 1, -1, "1", [1], 10**30]
)
def test_other_schema_versions(made: Path, version: Any) -> None:
    edit(made, lambda m: m.update(schema_version=version))
    message = refused(made)
    assert repr(version) in message
    assert f"reads {SCHEMA_VERSION}" in message


@pytest.mark.parametrize("version", [True, 1.0])
def test_schema_versions_that_are_nearly_right(made: Path, version: Any) -> None:
    edit(made, lambda m: m.update(schema_version=version))
    assert "schema_version" in refused(made)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(dtype="x" * 10**5),
        lambda m: m.update(latent_mean="x" * 10**5),
        lambda m: m["model"].update(dim=[1] * 10**5),
        lambda m: m.update({f"key {i}": 0 for i in range(10**4)}),
        lambda m: m.update(schema_version="x" * 10**5),
        lambda m: m["files"].update({"../" + "x" * 10**5: m["files"]["frame.onnx"]}),
    ],
)
def test_a_message_does_not_repeat_a_whole_file(made: Path, change: Any) -> None:
    edit(made, change)
    assert len(refused(made)) < 1500


def in_model(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda m: m["model"].update(changes)


def in_parity(**changes: Any) -> Callable[[dict[str, Any]], None]:
    parity = {"engine": "x", "tolerance": 1e-4, "drift_tolerance": 1e-3, "components": {}}
    return lambda m: m.update(parity=parity | {"drift": [], "flipped_orders": 0} | changes)


def in_autoencoder(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda m: m["model"]["autoencoder"].update(changes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.pop("files"), ["'files'", "missing"]),
        (lambda m: m.update(hook="rm"), ["unknown", "'hook'"]),
        (lambda m: m.update(files=[]), ["manifest.files", "object"]),
        (lambda m: m.update(files={"a.onnx": 3}), ["a.onnx", "object"]),
        (lambda m: m.update(files={"a\nb": 3}), ["object"]),
        (lambda m: m["files"]["frame.onnx"].pop("sha256"), ["frame.onnx", "'sha256'", "missing"]),
        (lambda m: m["files"]["frame.onnx"].update(bytes="8"), ["frame.onnx", "bytes", "'8'"]),
        (lambda m: m.update(dtype="int8"), ["manifest.dtype", "'int8'"]),
        (lambda m: m.update(latent_mean=["x"]), ["latent_mean", "'x'"]),
        (lambda m: m.update(producer={"a": 1}), ["manifest.producer"]),
        (lambda m: m["batch"].update(minimum=0), ["batch", "0"]),
        (lambda m: m["batch"].update(maximum=0), ["batch", "0"]),
        (in_model(dim=33), ["dim (33)"]),
        (in_model(dim=0), ["dim"]),
        (in_model(heads=0), ["heads"]),
        (in_model(fps=10**400), ["fps"]),
        (in_model(temporal_layers=-1), ["temporal_layers"]),
        (in_model(temporal_layers=10**9), ["temporal_layers"]),
        (in_autoencoder(blocks=10**9), ["blocks"]),
        (in_autoencoder(patch=0), ["patch"]),
        (in_autoencoder(patch=-1), ["patch"]),
        (in_autoencoder(widths=[]), ["widths"]),
        (in_autoencoder(widths=[8] * 20_000), ["widths"]),
        (lambda m: m["sampling"].update(ar_steps=0), ["ar_steps"]),
        (lambda m: m["sampling"].update(canvas_noise=float("nan")), ["canvas_noise"]),
        (lambda m: m.update(latent_mean=[0.0] * 3), ["latent_mean", "4 finite", "got 3"]),
        (lambda m: m.update(latent_mean=[0.0] * 10**5), ["latent_mean", "got 100000"]),
        (lambda m: m.update(latent_mean=[0, 0, 0, float("nan")]), ["latent_mean", "nan"]),
        (lambda m: m.update(latent_std=[1.0] * 5), ["latent_std", "4 finite", "got 5"]),
        (lambda m: m.update(latent_std=[1, 1, 1, float("inf")]), ["latent_std", "inf"]),
        (lambda m: m.update(latent_std=[1, 1, 1, 0]), ["latent_std", "above 0"]),
        (lambda m: m.update(opset=0), ["opset", "0"]),
        (in_model(fps=float("inf")), ["fps", "inf"]),
        (lambda m: m["sampling"].update(ar_steps=65), ["ar_steps", "1..64", "65"]),
        (lambda m: m.update(fast=m["sampling"] | {"ar_steps": 65}), ["ar_steps", "1..64"]),
        (lambda m: m["batch"].update(maximum=65537), ["batch", "65537"]),
        (in_parity(tolerance=0), ["parity", "tolerance", "0"]),
        (in_parity(tolerance=float("inf")), ["parity", "tolerance", "inf"]),
        (in_parity(drift_tolerance=float("nan")), ["parity", "drift_tolerance", "nan"]),
        (in_parity(frame_tolerance=-1), ["parity", "frame_tolerance", "-1"]),
    ],
)
def test_bad_values_are_named(
    made: Path, change: Callable[[dict[str, Any]], None], words: list[str]
) -> None:
    edit(made, change)
    message = refused(made)
    assert MANIFEST in message
    for word in words:
        assert word in message


# -- tensors


def component(name: str, field: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda m: m["components"][name].update({field: value})


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["components"].pop("flow"),
        lambda m: m["components"].update(extra=m["components"]["flow"]),
        lambda m: m["components"]["flow"]["inputs"].pop(),
        lambda m: m["components"]["flow"]["inputs"].reverse(),
        lambda m: m["components"]["flow"]["outputs"][0].update(name="other"),
        lambda m: m["components"]["flow"]["outputs"][0].update(dtype="float16"),
        lambda m: m["components"]["flow"]["outputs"][0].update(dims=["B", 16, 5]),
        lambda m: m["components"]["flow"]["outputs"][0].update(dims=["B", 16]),
        component("flow", "file", "spatial/model.onnx"),
        component("flow", "file", "../flow/model.onnx"),
        component("flow", "file", "/flow/model.onnx"),
        lambda m: m.update(components={}),
        in_model(context_frames=3),
        in_model(action_dim=2),
        in_model(canvas=False),
        lambda m: m.update(dtype="float16"),
    ],
)
def test_tensors_that_are_not_the_models(made: Path, change: Any) -> None:
    edit(made, change)
    assert "not those of the model" in refused(made)


def test_dimensions_are_whole_numbers_or_names(made: Path) -> None:
    for dims in ([1.0], [None], [["B"]], [True], "B"):

        def change(m: dict[str, Any], dims: Any = dims) -> None:
            m["components"]["flow"]["outputs"][0].update(dims=dims)

        edit(made, change)
        assert "dims" in refused(made)


def test_graphs_that_are_not_listed(made: Path) -> None:
    """A graph without a hash would be run without having been checked."""
    edit(made, lambda m: m["files"].pop("flow/model.onnx"))
    message = refused(made)
    assert "flow/model.onnx" in message
    assert "not a listed file" in message


def test_weights_that_are_not_listed(made: Path) -> None:
    """Nor weights: the graph beside them would read them."""
    (made / "spatial/model.safetensors").write_bytes(b"weights")
    message = refused(made)
    assert "spatial/model.safetensors is not a listed file" in message
    listed = file_entry(made / "spatial/model.safetensors")
    edit(made, lambda m: m["files"].update({"spatial/model.safetensors": listed}))
    Bundle.open(made)
    (made / "spatial/.DS_Store").write_bytes(b"of a file manager")
    (made / "notes.txt").write_text("nobody reads this")
    Bundle.open(made)
    (made / "spatial/more.bin").write_bytes(b"weights")
    assert "spatial/more.bin is not a listed file; remove it" in refused(made)


@pytest.mark.parametrize(
    ("graph", "name"),
    [
        ("spatial/model.onnx", "spatial/.DS_Store"),
        ("spatial/model.onnx", "spatial/.X"),
        ("frame.onnx", "notes.bin"),
        ("frame.onnx", ".notes"),
        ("frame.onnx", "golden/notes.bin"),
    ],
)
def test_nobodys_business_is_one_once_a_graph_names_it(made: Path, graph: str, name: str) -> None:
    """It would be read as weights without a hash."""
    (made / name).parent.mkdir(exist_ok=True)
    (made / name).write_bytes(b"weights")
    Bundle.open(made)
    path = made / graph
    path.write_bytes(path.read_bytes() + b"location\x12" + name.rpartition("spatial/")[2].encode())
    edit(made, lambda m: m["files"].update({graph: file_entry(path)}))
    assert f"{name} is not a listed file; remove it" in refused(made)


def test_folders_may_be_links_to_others_of_the_bundle(made: Path) -> None:
    path = made / "frame.onnx"
    path.write_bytes(path.read_bytes() + b"spatial/model.safetensors")
    edit(made, lambda m: m["files"].update({"frame.onnx": file_entry(path)}))
    (made / "spatial").rename(made / "moved")
    (made / "spatial").symlink_to("moved")
    Bundle.open(made)


# -- files


def test_missing_files(made: Path) -> None:
    (made / "flow/model.onnx").unlink()
    message = refused(made)
    assert "flow/model.onnx is missing" in message
    (made / "flow/model.onnx").mkdir()
    assert "flow/model.onnx is missing" in refused(made)


@pytest.mark.parametrize("data", [b"", b"graph flo", b"graph flow "])
def test_wrong_sizes(made: Path, data: bytes) -> None:
    (made / "flow/model.onnx").write_bytes(data)
    message = refused(made)
    assert f"flow/model.onnx has {len(data)} bytes, expected 10" in message


def test_wrong_hashes(made: Path) -> None:
    (made / "flow/model.onnx").write_bytes(b"graph evil")
    message = refused(made)
    assert "flow/model.onnx" in message
    assert "sha256" in message


def test_changed_golden_files(made: Path) -> None:
    path = made / "golden/flow.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    assert "golden/flow.safetensors" in refused(made)


def test_fifos_and_devices_are_not_read(made: Path) -> None:
    """Hashing a pipe would wait for ever."""
    path = made / "flow/model.onnx"
    path.unlink()
    os.mkfifo(path)
    assert "flow/model.onnx is missing" in refused(made)


# -- names that lead out of the bundle


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "golden/../../secret",
        "golden/../flow/model.onnx",
        "..",
        "/etc/passwd",
        "{outside}/secret",
        "//secret",
        "..\\secret",
        "golden\\x",
    ],
)
def test_names_that_lead_outside(made: Path, tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    name = name.format(outside=tmp_path)
    edit(made, lambda m: m["files"].update({name: file_entry(secret)}))
    message = refused(made)
    assert repr(name) in message
    assert "outside" in message


@pytest.mark.parametrize(
    "name", ["", ".", "x\0y", "x\ny", "\x1b[2Jx", "\u2028x", "\ud800", "l" * 300, "a/" * 3000]
)
def test_names_that_are_no_names(made: Path, name: str) -> None:
    edit(made, lambda m: m["files"].update({name: {"sha256": "0" * 64, "bytes": 1}}))
    assert "\x1b" not in refused(made)


def test_links_that_lead_outside(made: Path, tmp_path: Path) -> None:
    """Also where size and hash are right: a bundle must not read files that are not its own."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"graph flow")
    (made / "flow/model.onnx").unlink()
    (made / "flow/model.onnx").symlink_to(secret)
    assert "outside" in refused(made)
    (made / "flow/model.onnx").unlink()
    (made / "flow").rmdir()
    outside = tmp_path / "flow"
    outside.mkdir()
    (outside / "model.onnx").write_bytes(b"graph flow")
    (made / "flow").symlink_to(outside)
    assert "outside" in refused(made)


def test_links_that_lead_nowhere_or_round(made: Path) -> None:
    path = made / "flow/model.onnx"
    path.unlink()
    path.symlink_to("nothing")
    assert "flow/model.onnx" in refused(made)
    path.unlink()
    path.symlink_to("model.onnx")
    assert "flow/model.onnx" in refused(made)


def test_sibling_directories_with_the_same_prefix(made: Path, tmp_path: Path) -> None:
    evil = tmp_path / "bundle-evil"
    evil.mkdir()
    (evil / "x").write_bytes(b"graph flow")
    (made / "flow/model.onnx").unlink()
    (made / "flow/model.onnx").symlink_to(evil / "x")
    assert "outside" in refused(made)


# -- batch range


@pytest.mark.parametrize(("low", "mid", "high"), [(0, 1, 1), (2, 1, 3), (1, 4, 3), (-1, -1, -1)])
def test_batch_ranges(low: int, mid: int, high: int) -> None:
    with pytest.raises(ConfigError, match="batch"):
        BatchRange(minimum=low, optimum=mid, maximum=high)


def test_a_whole_frame_may_have_a_tolerance_of_its_own() -> None:
    parity = Parity(
        engine="onnxruntime", tolerance=0.2, drift_tolerance=1.0, components={}, drift=(0.0,),
        flipped_orders=0,
    )  # fmt: skip
    assert parity.limit("frame") == parity.limit("flow") == 0.2
    own = dataclasses.replace(parity, frame_tolerance=0.5)
    assert (own.limit("frame"), own.limit("flow")) == (0.5, 0.2)


def test_ties_are_rare_in_float32() -> None:
    exact = Parity(
        engine="onnxruntime", tolerance=1e-4, drift_tolerance=1.0, components={},
        drift=(0.0,) * 32, flipped_orders=0,
    )  # fmt: skip
    assert exact.most_flipped == 8
    assert dataclasses.replace(exact, drift=(0.0,) * 2).most_flipped == 1
    assert dataclasses.replace(exact, tolerance=2e-2).most_flipped == 32


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(source="\x1b[2J"),
        lambda m: m["model"].update(name="a\nb"),
        lambda m: m.update(producer={"torch": "\x1b]0;"}),
    ],
)
def test_control_characters_do_not_reach_the_terminal(made: Path, change: Any) -> None:
    edit(made, change)
    message = refused(made)
    assert "control characters" in message
    assert message.isprintable()


def test_the_profile_is_fast_where_there_is_one() -> None:
    manifest = Bundle.open("toytable-int8").manifest
    assert manifest.fast is not None
    assert manifest.profile() == manifest.profile("fast") == manifest.fast != manifest.sampling
    assert manifest.profile("default") == manifest.sampling
    alone = dataclasses.replace(manifest, fast=None)
    assert alone.profile() == alone.sampling
    with pytest.raises(ConfigError, match="no profile 'fast'; this bundle has default"):
        alone.profile("fast")


def test_fast_takes_as_many_evaluations_as_its_graphs(made: Path) -> None:
    edit(made, lambda m: m.update(unrolled=True, fast=m["sampling"] | {"flow_steps": 2}))
    assert "unrolled for 30 evaluations of the flow head, not 2" in refused(made)
