"""TensorRT engines on disk: `<component>.plan`, and beside it what it was built from.

    <component>.plan                  the serialised engine
    <component>.plan.metadata.json    `EngineMetadata`

A plan is only used where everything it was built from is still the same; otherwise every difference
is named. The hash finds plans that were cut or damaged. It does not make a foreign plan safe, which
holds code for the GPU. Nothing here needs TensorRT.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shlex
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from canvasmar_rt.bundle import Bundle
from canvasmar_rt.config import from_dict, to_dict
from canvasmar_rt.errors import ConfigError, EngineError

SCHEMA_VERSION = 2
"""2: float32 graphs no longer take TF32, which nothing else in the metadata would tell."""
METADATA_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """Shapes of one input that an engine takes: every size lies in minimum..maximum, and kernels
    are chosen for the optimum."""

    minimum: tuple[int, ...]
    optimum: tuple[int, ...]
    maximum: tuple[int, ...]

    def __post_init__(self) -> None:
        same_rank = len(self.minimum) == len(self.optimum) == len(self.maximum)
        sizes = zip(self.minimum, self.optimum, self.maximum, strict=False)
        if not same_rank or not all(1 <= a <= b <= c for a, b, c in sizes):
            raise ConfigError(f"profile: need 1 <= minimum <= optimum <= maximum, got {self}")

    def takes(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == len(self.minimum) and all(
            a <= size <= c for a, size, c in zip(self.minimum, shape, self.maximum, strict=True)
        )

    def __str__(self) -> str:
        return f"{_shape(self.minimum)} to {_shape(self.maximum)} (best at {_shape(self.optimum)})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSource:
    """Everything a plan follows from.

    tensorrt: version of TensorRT.
    gpu, compute_capability: "NVIDIA H200", "9.0".
    bundle: the bundle's fingerprint.
    onnx_sha256, weights_sha256: of the component's graph, and of the files that hold its weights.
    profiles: by input; inputs of fixed shape have none.
    workspace_bytes: most scratch memory a kernel may take; None for all there is.
    """

    component: str
    tensorrt: str
    gpu: str
    compute_capability: str
    bundle: str
    onnx_sha256: str
    weights_sha256: dict[str, str]
    profiles: dict[str, Profile]
    optimization_level: int
    workspace_bytes: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineMetadata:
    """Contents of `<component>.plan.metadata.json`.

    io_dtypes: dtypes the engine's inputs and outputs have, by name.
    layer_dtypes: how many inputs and outputs of its layers have a dtype, as far as it tells.
    built_at: UTC, ISO 8601.
    """

    schema_version: int
    source: EngineSource
    io_dtypes: dict[str, str]
    layer_dtypes: dict[str, int]
    plan_sha256: str
    plan_bytes: int
    built_at: str


def plan_path(directory: Path, component: str) -> Path:
    return directory / f"{component}.plan"


def metadata_path(directory: Path, component: str) -> Path:
    return directory / f"{component}.plan.metadata.json"


def build_command(bundle: Bundle, directory: Path, device: str = "cuda:0") -> str:
    """What a user types to have the engines of a bundle."""
    where, into = shlex.quote(str(bundle.path)), shlex.quote(str(directory))
    other = "" if device == "cuda:0" else f" --device {device}"
    return f"canvasmar-rt build {where} --engine-dir {into}{other}"


def files_of(bundle: Bundle, component: str) -> tuple[str, dict[str, str]]:
    """Hash of a component's graph, and hashes of its weights by file, from the manifest. A graph
    refers to the weights in its own folder; the whole frame's to those of every folder."""
    manifest = bundle.manifest
    graph = manifest.components[component].file
    folder = graph.rpartition("/")[0]
    weights = {
        name: entry.sha256
        for name, entry in sorted(manifest.files.items())
        if name == f"{folder}/model.safetensors"
        or (not folder and name.endswith("/model.safetensors"))
    }
    return manifest.files[graph].sha256, weights


# -- differences

MEANINGS = {
    "component": ("component", "the file was renamed"),
    "tensorrt": ("TensorRT", "a plan runs on the version that wrote it"),
    "gpu": ("GPU", "kernels were chosen by measuring another one"),
    "compute_capability": ("compute capability", "the plan holds code for other hardware"),
    "bundle": ("bundle", "it was built from another export, or files changed since"),
    "onnx_sha256": ("graph", "the component's ONNX file is another one"),
    "optimization_level": ("optimisation level", "other options were asked for"),
    "workspace_bytes": ("workspace", "other options were asked for"),
}


def mismatches(found: EngineSource, wanted: EngineSource) -> list[str]:
    """Every difference in plain words: what it was built from, what is here, what that means."""
    lines = []

    def compare(label: str, meaning: str, built: object, here: object) -> None:
        if built != here:
            lines.append(f"{label}: built for {_text(built)}, here {_text(here)} ({meaning})")

    for field, (label, meaning) in MEANINGS.items():
        compare(label, meaning, getattr(found, field), getattr(wanted, field))
    for name in sorted({**found.weights_sha256, **wanted.weights_sha256}):
        built, here = found.weights_sha256.get(name), wanted.weights_sha256.get(name)
        compare(f"weights {name}", "the component's weights are others", built, here)
    for name in sorted({**found.profiles, **wanted.profiles}):
        takes, asked = found.profiles.get(name), wanted.profiles.get(name)
        compare(f"shape of {name}", "other batches or sampling were asked for", takes, asked)
    return lines


def _text(value: object) -> str:
    if value is None:
        return "none"
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 and text.isalnum() else text


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


# -- reading


def read_metadata(directory: Path, component: str) -> EngineMetadata:
    """
    Raises:
        EngineError: missing, not JSON, not of this schema, or with values that cannot be.
    """
    path = metadata_path(directory, component)
    try:
        with path.open("rb") as file:
            text = file.read(METADATA_BYTES + 1)
    except FileNotFoundError:
        raise EngineError(f"{path} is missing") from None
    except OSError as error:
        raise EngineError(f"{path}: cannot be read ({error})") from None
    if len(text) > METADATA_BYTES:
        raise EngineError(f"{path}: more than {METADATA_BYTES} bytes are too many for metadata")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EngineError(f"{path}: not JSON ({error})") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise EngineError(
            f"{path}: schema version {version!r}, this program reads {SCHEMA_VERSION}"
        )
    try:
        metadata = from_dict(EngineMetadata, data, "metadata")
    except ConfigError as error:
        raise EngineError(f"{path}: {error}") from None
    if not all(string.isprintable() for string in _strings(data)):
        raise EngineError(f"{path}: holds control characters")  # it is shown on terminals
    return metadata


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [s for pair in value.items() for part in pair for s in _strings(part)]
    if isinstance(value, list):
        return [s for part in value for s in _strings(part)]
    return [value] if isinstance(value, str) else []


def read_plan(directory: Path, component: str, metadata: EngineMetadata) -> bytes:
    """The plan, once it is known to be the one the metadata is about.

    Raises:
        EngineError: missing, cut, or changed.
    """
    path = plan_path(directory, component)
    try:
        size = path.stat().st_size
        if size != metadata.plan_bytes:
            raise EngineError(
                f"{path}: {size} bytes, expected {metadata.plan_bytes}: it was cut or replaced"
            )
        plan = path.read_bytes()
    except FileNotFoundError:
        raise EngineError(f"{path} is missing") from None
    except OSError as error:
        raise EngineError(f"{path}: cannot be read ({error})") from None
    if hashlib.sha256(plan).hexdigest() != metadata.plan_sha256:
        raise EngineError(f"{path}: does not match its sha256: it was changed after it was built")
    return plan


# -- writing


def write_engine(directory: Path, plan: bytes, metadata: EngineMetadata) -> None:
    """Write a plan and its metadata; until both are there, those from before stay.

    Raises:
        EngineError: if they cannot be written.
    """
    component = metadata.source.component
    target, beside = plan_path(directory, component), metadata_path(directory, component)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{component}.", dir=directory) as name:
            new_plan, new_metadata, old_plan = (Path(name) / n for n in ("plan", "metadata", "old"))
            _write(new_plan, plan)
            _write(new_metadata, json.dumps(to_dict(metadata), indent=1).encode() + b"\n")
            if target.exists():
                os.replace(target, old_plan)
            try:
                os.replace(new_plan, target)
                os.replace(new_metadata, beside)
            except BaseException:
                if old_plan.exists():
                    os.replace(old_plan, target)
                raise
    except OSError as error:
        raise EngineError(f"{target}: cannot be written ({error})") from None


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


# -- what an engine says of itself

DTYPE_WORDS = {
    "float": "float32", "fp32": "float32", "float32": "float32",
    "half": "float16", "fp16": "float16", "float16": "float16",
    "bf16": "bfloat16", "bfloat16": "bfloat16",
    "fp8": "fp8", "fp4": "fp4", "int4": "int4", "int8": "int8", "uint8": "uint8",
    "int32": "int32", "int64": "int64", "bool": "bool",
}  # fmt: skip


def layer_dtypes(information: str) -> dict[str, int]:
    """How many inputs and outputs of layers have which dtype, in the JSON of an `EngineInspector`.

    TensorRT 10 writes {"Format/Datatype": "Row major linear FP16 format"}, TensorRT 11 {"DataType":
    "Half"}. What names no dtype known here is counted as it is written; {} where there is no list
    of layers."""
    counts: Counter[str] = Counter()

    def visit(value: Any) -> None:
        if isinstance(value, list):
            for part in value:
                visit(part)
        elif isinstance(value, dict):
            for key, part in value.items():
                if "datatype" in key.lower() and isinstance(part, str):
                    words = re.findall(r"\w+", part.lower())
                    known = [DTYPE_WORDS[w] for w in words if w in DTYPE_WORDS]
                    counts[known[0] if known else part] += 1
                else:
                    visit(part)

    try:
        told = json.loads(information)
        visit(told.get("Layers") if isinstance(told, dict) else None)
    except (ValueError, RecursionError):
        return {}
    return dict(sorted(counts.items()))
