"""The bundle: a directory that holds everything an engine needs to run a model.

    canvasmar_config.json      manifest: model, sampling defaults, tensors, hashes, parity
    frame.onnx                 the whole latent frame as one graph
    <part>/*.onnx              one graph per component
    <part>/model.safetensors   the weights; the graphs refer to them as ONNX external data
    golden/*.safetensors       inputs and outputs of the PyTorch reference
    README.md                  model card

Reading a bundle parses JSON and safetensors headers and hashes files; nothing in it is executed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from canvasmar_rt.components import Component, components
from canvasmar_rt.config import (
    LARGEST,
    PRESETS,
    ModelConfig,
    SamplingConfig,
    from_dict,
    shown,
    to_dict,
)
from canvasmar_rt.errors import BundleError, ConfigError, EngineError, InputError
from canvasmar_rt.schedule import flow_plan, set_sizes

MANIFEST = "canvasmar_config.json"
MANIFEST_BYTES = 16 << 20
SCHEMA_VERSION = 2
PACKAGED = Path(__file__).parent / "data" / "bundles"
DEMO_CLIP = PACKAGED.parent / "demo_toytable.npz"

DTypeName = Literal["float32", "float16", "bfloat16"]
Quantization = Literal["none", "int8"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorEntry:
    name: str
    dtype: str
    dims: tuple[int | str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComponentEntry:
    """One graph: its file and its tensors, in order (the table in `canvasmar_rt.components`)."""

    file: str
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileEntry:
    sha256: str
    bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """How far outputs are from the reference: largest absolute difference, norm of the difference
    over norm of the reference, cosine similarity; the worst over all outputs."""

    max_abs: float
    relative: float
    cosine: float

    def worse(self, other: Difference) -> Difference:
        """The worse of both in each number: NaN, if either is."""
        return Difference(
            max_abs=float(np.maximum(self.max_abs, other.max_abs)),
            relative=float(np.maximum(self.relative, other.relative)),
            cosine=float(np.minimum(self.cosine, other.cosine)),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parity:
    """The parity certificate, measured at export against PyTorch float32.

    `drift` is the relative difference of the latents of each frame of a rollout under the same
    noise and token order. Tolerances bound `relative` of a component and every drift value, and
    `frame_tolerance`, where given, that of the whole-frame graph."""

    engine: str
    tolerance: float
    drift_tolerance: float
    components: dict[str, Difference]
    drift: tuple[float, ...]
    flipped_orders: int
    frame_tolerance: float | None = None

    def __post_init__(self) -> None:
        for name in ("tolerance", "drift_tolerance", "frame_tolerance"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"parity: {name} must be a number above 0, got {value}")

    def limit(self, component: str) -> float:
        """The largest relative difference of a component that passes."""
        if component == "frame" and self.frame_tolerance is not None:
            return self.frame_tolerance
        return self.tolerance

    @property
    def most_flipped(self) -> int:
        """Frames of the rollout that may put their tokens in another order: ties are rare where
        numbers agree to four digits, elsewhere anything goes."""
        frames = len(self.drift)
        return max(1, frames // 4) if self.tolerance <= 1e-4 else frames


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchRange:
    minimum: int = 1
    optimum: int = 1
    maximum: int = 32

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.optimum <= self.maximum <= LARGEST:
            raise ConfigError(
                f"batch: need 1 <= minimum <= optimum <= maximum <= {LARGEST}, got "
                f"{self.minimum}, {self.optimum}, {self.maximum}"
            )

    def require(self, batch: int, where: str = "") -> None:
        """Raise `InputError` if a bundle of this range does not run at `batch`."""
        if not isinstance(batch, (int, np.integer)):
            raise InputError(f"{where}batch must be an integer, got {batch!r}")
        if batch < 1:
            raise InputError(f"{where}batch must be at least 1, got {batch}")
        if not self.minimum <= batch <= self.maximum:
            raise InputError(
                f"{where}batch {batch} is outside the {self.minimum}..{self.maximum} this bundle "
                "was exported for; export it with another --batch-min or --batch-max"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents of `canvasmar_config.json`. `unrolled`: the graphs hold one copy of the flow head
    for each of the solver's evaluations instead of a loop. `quantization` "int8": the large matrix
    products run in int8; `dtype` and `weights_dtype` are those of everything else. `fast`: sampling
    that costs less, where one was found that loses no quality."""

    schema_version: int
    producer: dict[str, str]
    source: str
    model: ModelConfig
    sampling: SamplingConfig
    dtype: DTypeName
    weights_dtype: DTypeName
    opset: int
    batch: BatchRange
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...]
    components: dict[str, ComponentEntry]
    files: dict[str, FileEntry]
    parity: Parity | None = None
    unrolled: bool = False
    quantization: Quantization = "none"
    fast: SamplingConfig | None = None

    def profile(self, name: str | None = None) -> SamplingConfig:
        """The sampling called "default" or "fast"; by default fast, where there is one.

        Raises:
            ConfigError: if this bundle has no such profile.
        """
        have = {"default": self.sampling} | ({} if self.fast is None else {"fast": self.fast})
        name = list(have)[-1] if name is None else name
        if name not in have:
            raise ConfigError(
                f"{self.model.name}: no profile {name!r}; this bundle has {', '.join(have)}"
            )
        return have[name]

    def require_device(self, device: str) -> None:
        """Raise `EngineError` if the graphs do not run on `device`."""
        if self.quantization == "int8" and device != "cpu":
            raise EngineError(
                f"device {device!r}: int8 bundles run on the CPU only; export this model without "
                "--quantize for a GPU"
            )

    def require_flow(self, sampling: SamplingConfig) -> None:
        """Raise `ConfigError` if the graphs were unrolled for another number of evaluations."""
        wanted, have = len(flow_plan(sampling).time), len(flow_plan(self.sampling).time)
        if self.unrolled and wanted != have:
            raise ConfigError(
                f"sampling: this bundle's graphs are unrolled for {have} evaluations of the flow "
                f"head, not {wanted}; export it without --unroll, or with these flow steps"
            )

    def fixed_dims(self, component: str) -> dict[str, int]:
        """Symbolic dimensions of the component table that its graph fixes."""
        return fixed_dims(component, self.sampling, unrolled=self.unrolled)

    def __post_init__(self) -> None:
        for text in (self.source, self.model.name, *self.producer.values()):
            if not text.isprintable():  # it is shown on terminals
                raise ConfigError(f"manifest: {text!r} holds control characters")
        if self.opset < 1:
            raise ConfigError(f"manifest: opset must be >= 1, got {self.opset}")
        channels = self.model.autoencoder.latent_channels
        for name in ("latent_mean", "latent_std"):
            values = getattr(self, name)
            if len(values) != channels or not all(map(math.isfinite, values)):
                raise ConfigError(
                    f"manifest: {name} must be {channels} finite numbers, one for each latent "
                    f"channel, got {_brief(values)}"
                )
        if min(self.latent_std) <= 0:
            raise ConfigError(
                f"manifest: latent_std must be above 0, got {_brief(self.latent_std)}"
            )
        for sampling in (self.sampling, self.fast):
            if sampling is not None:
                set_sizes(self.model.tokens, sampling.ar_steps)
                self.require_flow(sampling)


def _brief(values: tuple[float, ...]) -> str:
    """The numbers, the first few where there are many."""
    shown = ", ".join(f"{v:g}" for v in values[:8])
    return f"{len(values)}: {shown}" + (", .." if len(values) > 8 else "")


def fixed_dims(component: str, sampling: SamplingConfig, *, unrolled: bool) -> dict[str, int]:
    """Symbolic dimensions of the component table that a component's graph fixes."""
    fixed = {"AR": sampling.ar_steps} if component == "frame" else {}
    if unrolled and component in ("flow", "frame"):
        fixed["E"] = len(flow_plan(sampling).time)
    return fixed


def component_entries(config: ModelConfig, dtype: str) -> dict[str, ComponentEntry]:
    """The component table with the dtypes a bundle of `dtype` has."""

    def entry(component: Component) -> ComponentEntry:
        def tensors(specs: tuple[Any, ...]) -> tuple[TensorEntry, ...]:
            return tuple(
                TensorEntry(
                    name=s.name, dtype=dtype if s.dtype == "hidden" else s.dtype, dims=s.dims
                )
                for s in specs
            )

        return ComponentEntry(
            file=component.file,
            inputs=tensors(component.inputs),
            outputs=tensors(component.outputs),
        )

    return {name: entry(component) for name, component in components(config).items()}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(directory: Path, manifest: Manifest) -> None:
    (directory / MANIFEST).write_text(json.dumps(to_dict(manifest), indent=1) + "\n")


def resolve(path_or_name: str | Path) -> Path:
    """Directory of a bundle given by path, or by the name of one that ships with the package.

    Raises:
        BundleError: if there is neither; the message lists the packaged names.
    """
    path = Path(path_or_name)
    # not Path.is_dir, which raises on names too long for the file system
    if os.path.isdir(path):
        return path
    if os.path.isfile(path) and path.name == MANIFEST:
        return path.parent
    packaged = packaged_names()
    if str(path_or_name) in packaged:
        return PACKAGED / str(path_or_name)
    raise BundleError(
        f"{path_or_name}: no such bundle directory, and not the name of a packaged one "
        f"({', '.join(packaged) or 'none are packaged'}); make one with "
        f"'canvasmar-rt export PRESET --output DIR' (presets: {', '.join(PRESETS)})"
    )


def packaged_names() -> list[str]:
    """Names that `canvasmar_rt.load` takes besides paths."""
    return sorted(p.parent.name for p in PACKAGED.glob(f"*/{MANIFEST}"))


@dataclasses.dataclass(frozen=True)
class Bundle:
    """An opened bundle: every file it lists has been checked against its hash."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(
        cls, path_or_name: str | Path, progress: Callable[[str], None] = lambda _: None
    ) -> Bundle:
        """Read and check a bundle.

        Raises:
            BundleError: missing, cut or changed file, a path that leaves the directory, another
                schema version, or tensors that are not those of the model. The message says which
                file and what to do.
        """
        directory = Path(os.path.abspath(resolve(path_or_name)))
        try:
            manifest = _read_manifest(directory)
            _check_files(directory, manifest, progress)
        except OSError as error:
            raise BundleError(
                f"{directory}: cannot be read ({error}); check its permissions"
            ) from None
        return cls(directory, manifest)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identifies the graphs and weights: a hash over the hashes of all files."""
        listed = sorted((name, entry.sha256) for name, entry in self.manifest.files.items())
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def file(self, component: str) -> Path:
        """Path of a component's graph."""
        return self.path / self.manifest.components[component].file

    def tensors(self, name: str) -> dict[str, np.ndarray]:
        """Tensors of a listed safetensors file, such as `golden/flow.safetensors`."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: {name} is not part of this bundle; export it again")
        try:
            return load_file(_inside(self.path, name))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BundleError(
                f"{self.path}: {name} cannot be read ({error}); export or copy it again"
            ) from None


def _read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST
    if not path.is_file():
        source = directory if (directory / "config.json").is_file() else "PRESET"  # a checkpoint
        raise BundleError(
            f"{directory}: no {MANIFEST}: this is not a bundle directory; make one with "
            f"'canvasmar-rt export {source} --output DIR'"
        )
    if path.stat().st_size > MANIFEST_BYTES:
        raise BundleError(
            f"{path}: {path.stat().st_size} bytes are too many for a manifest; export or copy it "
            "again"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: not JSON ({error}); export or copy it again") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{path}: schema version {shown(version)}, this program reads {SCHEMA_VERSION}; export "
            "the bundle again with this version of canvasmar-rt"
        )
    try:
        manifest = from_dict(Manifest, data, "manifest")
    except ConfigError as error:
        raise BundleError(f"{path}: {error}; export or copy it again") from None
    if manifest.components != component_entries(manifest.model, manifest.dtype):
        raise BundleError(
            f"{path}: the tensors listed are not those of the model it describes; export the "
            "bundle again with this version of canvasmar-rt"
        )
    return manifest


def _check_files(directory: Path, manifest: Manifest, progress: Callable[[str], None]) -> None:
    """Every listed file is there, of its size and hash; every graph, and the weights beside it, are
    listed."""
    for name, entry in sorted(manifest.files.items()):
        path = _inside(directory, name)
        progress(name)
        if not os.path.isfile(path):
            raise BundleError(f"{directory}: {name} is missing; export or copy it again")
        size = path.stat().st_size
        if size != entry.bytes:
            raise BundleError(
                f"{directory}: {name} has {size} bytes, expected {entry.bytes}: the copy is "
                "incomplete or was changed; export or copy it again"
            )
        if sha256(path) != entry.sha256:
            raise BundleError(
                f"{directory}: {name} does not match its sha256: it was changed after export; "
                "export or copy it again"
            )
    listed = manifest.files
    for name, component in manifest.components.items():
        folder, graph = PurePosixPath(component.file).parent, directory / component.file
        used = [component.file]
        if component.file in listed:
            unlisted = [file for file in _within(directory, folder, listed) if file not in listed]
            # some file systems know no capitals
            held = graph.read_bytes().lower() if unlisted else b""
            used = [file for file in unlisted if _may_read(held, folder, file)]
        if used:
            raise BundleError(
                f"{directory}: {name}: {min(used)} is not a listed file; remove it, or export or "
                "copy the bundle again"
            )


def _within(directory: Path, folder: PurePosixPath, listed: Collection[str]) -> Iterator[str]:
    """What lies in a component's folder; for the bundle's own, whatever a path in it leads to."""

    def beside(inside: PurePosixPath) -> Iterator[str]:
        return (str(inside / entry.name) for entry in os.scandir(directory / inside))

    if folder.parts:
        yield from beside(folder)
        return
    for parent, within, files in os.walk(directory):
        inside = PurePosixPath(Path(parent).relative_to(directory).as_posix())
        yield from (str(inside / name) for name in files)
        for name in within:
            path = inside / name
            if os.path.islink(directory / path):
                parts = any(PurePosixPath(other).is_relative_to(path) for other in listed)
                yield from beside(path) if parts else (str(path),)


def _may_read(graph: bytes, folder: PurePosixPath, path: str) -> bool:
    """Whether a graph, in small letters, may read an unlisted file as weights. What file managers
    leave, or what lies in other folders, it reads only if it names it."""
    parts = PurePosixPath(path).relative_to(folder).parts
    if folder.parts and not parts[-1].startswith("."):
        return True
    return all(os.fsencode(part.lower()) in graph for part in parts)


def _inside(directory: Path, name: str) -> Path:
    """Path of a listed file, refused if it would leave the bundle."""
    parts = PurePosixPath(name)
    path = directory / parts
    plain = not parts.is_absolute() and ".." not in parts.parts and "\\" not in name
    # control characters would reach the terminal, and NUL or half a surrogate pair the system calls
    plain = plain and name.isprintable()
    if not plain or not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(directory)):
        raise BundleError(
            f"{directory}: listed file {shown(name)} lies outside the bundle; refused: a link? "
            "copy the bundle with links followed (cp -rL), or get it again from a source you trust"
        )
    return path
