"""Build the TensorRT engines of a bundle, each only where the one on disk does not fit any more.

Importing this module needs no TensorRT, nor does a dry run.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from canvasmar_rt.bundle import BatchRange, Bundle
from canvasmar_rt.config import SamplingConfig
from canvasmar_rt.deadline import ladder
from canvasmar_rt.engines.base import cuda_index
from canvasmar_rt.engines.cuda_memory import Gpu, choose_gpu, gpu
from canvasmar_rt.engines.tensorrt_cache import (
    SCHEMA_VERSION,
    EngineMetadata,
    EngineSource,
    Profile,
    files_of,
    layer_dtypes,
    metadata_path,
    mismatches,
    plan_path,
    read_metadata,
    read_plan,
    write_engine,
)
from canvasmar_rt.errors import ConfigError, EngineError, InputError
from canvasmar_rt.files import check_writable, write_file
from canvasmar_rt.schedule import ar_steps, branch_inputs, first_step_branches, flow_plan

Progress = Callable[[str, int, int], None]
"""Component, steps done, steps in all of the phase TensorRT is in."""

OPTIONAL = "frame"
"""The whole frame in one graph, which the frame loop does without."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """
    components: names; all of the bundle's if empty.
    batch: batches the engines take and are tuned for; the bundle's if None.
    optimization_level: 0 (quick build) to 5 (TensorRT tries most kernels).
    workspace_bytes: most scratch memory a kernel may take; None for all there is.
    timing_cache: file that keeps measurements from build to build; none if None.
    force_rebuild: build what would be reused, too.
    dry_run: only say what would be done.

    Raises:
        ConfigError: a value out of range.
    """

    components: tuple[str, ...] = ()
    batch: BatchRange | None = None
    optimization_level: int = 3
    workspace_bytes: int | None = None
    timing_cache: Path | None = None
    force_rebuild: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.optimization_level <= 5:
            raise ConfigError(f"optimization_level must lie in 0..5, got {self.optimization_level}")
        if self.workspace_bytes is not None and self.workspace_bytes < 1:
            raise ConfigError(f"workspace_bytes must be >= 1, got {self.workspace_bytes}")


Action = Literal["built", "reused", "would build", "would reuse", "refused", "not needed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComponentReport:
    """What became of a component and why. `metadata`: of the plan on disk, where it fits."""

    component: str
    action: Action
    reasons: tuple[str, ...] = ()
    seconds: float = 0.0
    metadata: EngineMetadata | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildReport:
    """`notes` are remarks on the whole build, such as what a dry run could not compare."""

    directory: Path
    components: tuple[ComponentReport, ...]
    notes: tuple[str, ...]


def build_engines(
    bundle: Bundle,
    directory: Path,
    options: BuildOptions | None = None,
    progress: Progress = lambda component, done, total: None,
    *,
    device: str = "cuda",
) -> BuildReport:
    """Build engines into `directory` for the GPU `device`, "cuda" or "cuda:<index>"; those that
    still fit are reused. Where one fails the others stay, and so does the plan it was to replace.

    Raises:
        ConfigError: unknown component, or a batch the bundle was not exported for.
        InputError: a folder or file that cannot be written.
        EngineError: no TensorRT or GPU, or a component that TensorRT refuses. A refused `frame` is
            only reported.
    """
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory}: a file, where the engines' folder is to be; give another")
    index = cuda_index("tensorrt", device)
    return _Build(bundle, directory, options or BuildOptions(), progress, index).run()


def profiles(bundle: Bundle, component: str, batch: BatchRange) -> dict[str, Profile] | None:
    """Shapes of a component's inputs, for those whose shape is not fixed, in the sampling a rollout
    takes by default and what the bundle's other profile and deadlines (`ladder`) may take instead;
    None where no frame runs the component (`spatial` where there is one AR step).

    Guidance branches G may be 1 to 3, as guidance scales change; set sizes S, M and K are those of
    the AR steps. Tuned for the default's number of evaluations and its step that draws most
    tokens; the whole frame takes the bundle's sampling and no other."""
    manifest = bundle.manifest
    taken = [manifest.sampling]
    if component != OPTIONAL:
        whole = (manifest.profile(), manifest.sampling)
        taken = [
            rung
            for top in whole
            for rung in ladder(top, unrolled=manifest.unrolled, has_canvas=manifest.model.canvas)
        ]
    default = taken[0]

    def drawn(sampling: SamplingConfig) -> list[dict[str, int]]:
        steps = [
            {"S": step.drawn, "M": step.left, "K": step.known}
            for step in ar_steps(manifest.model.tokens, sampling.ar_steps)
        ]
        at = {"unconditional": slice(1), "spatial_first": slice(1), "spatial": slice(1, None)}
        return steps[at.get(component, slice(None))]

    steps = [step for sampling in taken for step in drawn(sampling)]
    if not steps:
        return None
    busiest = max(drawn(default) or steps, key=lambda step: step["S"])
    branches = branch_inputs(default, has_canvas=manifest.model.canvas)
    usual = len(branches["branch_weight"])
    if component == "spatial_first":
        usual = max(1, first_step_branches(branches, manifest.components))
    evaluations = [len(flow_plan(sampling).time) for sampling in taken]
    ranges = {
        "B": (batch.minimum, batch.optimum, batch.maximum),
        "R": tuple(n * manifest.model.group for n in (batch.minimum, batch.optimum, batch.maximum)),
        "G": (1, usual, 3),
        "E": (min(evaluations), evaluations[0], max(evaluations)),
        "AR": (default.ar_steps,) * 3,
    }
    for symbol in ("S", "M", "K"):
        sizes = [step[symbol] for step in steps]
        ranges[symbol] = (min(sizes), busiest[symbol], max(sizes))

    def shape(dims: tuple[int | str, ...], bound: int) -> tuple[int, ...]:
        return tuple(ranges[d][bound] if isinstance(d, str) else d for d in dims)

    return {
        tensor.name: Profile(
            minimum=shape(tensor.dims, 0),
            optimum=shape(tensor.dims, 1),
            maximum=shape(tensor.dims, 2),
        )
        for tensor in manifest.components[component].inputs
        if any(isinstance(d, str) for d in tensor.dims)
    }


class _Build:
    def __init__(
        self,
        bundle: Bundle,
        directory: Path,
        options: BuildOptions,
        progress: Progress,
        index: int,
    ) -> None:
        bundle.manifest.require_device("cuda")
        self._index = index
        self._bundle, self._directory, self._options = bundle, directory, options
        self._progress = progress
        self._notes: list[str] = []
        self._names = options.components or tuple(bundle.manifest.components)
        if unknown := sorted(set(self._names) - set(bundle.manifest.components)):
            raise ConfigError(
                f"{bundle.path}: no component {', '.join(unknown)}; there are "
                f"{', '.join(bundle.manifest.components)}"
            )
        whole = bundle.manifest.batch
        self._batch = options.batch or whole
        if not whole.minimum <= self._batch.minimum <= self._batch.maximum <= whole.maximum:
            raise ConfigError(
                f"batch {self._batch.minimum}..{self._batch.maximum} is outside the "
                f"{whole.minimum}..{whole.maximum} this bundle was exported for; export it with "
                "another --batch-min or --batch-max"
            )

    def run(self) -> BuildReport:
        version, here = self._machine()
        self._timings = self._read_timings()
        reports = [self._component(name, version, here) for name in self._names]
        return BuildReport(
            directory=self._directory, components=tuple(reports), notes=tuple(self._notes)
        )

    def _machine(self) -> tuple[str | None, Gpu | None]:
        """Version of TensorRT, and the GPU; None for what is not here, in a dry run."""
        version = here = None
        try:
            from canvasmar_rt.engines.tensorrt_library import trt

            version = trt.__version__
        except EngineError as error:
            self._unless_dry(error, "the TensorRT version")
        try:
            here = gpu(self._index)
            if not self._options.dry_run:
                choose_gpu(self._index)  # the one TensorRT builds for
        except EngineError as error:
            self._unless_dry(error, "the GPU")
        return version, here

    def _unless_dry(self, error: EngineError, what: str) -> None:
        if not self._options.dry_run:
            raise error
        self._notes.append(f"{what} could not be compared: {error}")

    def _component(self, name: str, version: str | None, here: Gpu | None) -> ComponentReport:
        shapes = profiles(self._bundle, name, self._batch)
        if shapes is None:
            return ComponentReport(
                component=name, action="not needed", reasons=("a frame has one AR step",)
            )
        graph, weights = files_of(self._bundle, name)
        wanted = EngineSource(
            component=name,
            tensorrt=version or "",
            gpu=here.name if here else "",
            compute_capability=here.compute_capability if here else "",
            bundle=self._bundle.fingerprint,
            onnx_sha256=graph,
            weights_sha256=weights,
            profiles=shapes,
            optimization_level=self._options.optimization_level,
            workspace_bytes=self._options.workspace_bytes,
        )
        found, reasons = self._present(wanted)
        if self._options.force_rebuild:
            reasons.append("a rebuild was asked for")
        if not reasons:
            action: Action = "would reuse" if self._options.dry_run else "reused"
            return ComponentReport(component=name, action=action, metadata=found)
        if self._options.dry_run:
            return ComponentReport(component=name, action="would build", reasons=tuple(reasons))
        started = time.perf_counter()
        try:
            metadata = self._built(wanted)
        except EngineError as error:
            if name != OPTIONAL:
                raise EngineError(f"{name}: {error}") from None
            return ComponentReport(component=name, action="refused", reasons=(str(error),))
        return ComponentReport(
            component=name,
            action="built",
            reasons=tuple(reasons),
            seconds=time.perf_counter() - started,
            metadata=metadata,
        )

    def _present(self, wanted: EngineSource) -> tuple[EngineMetadata | None, list[str]]:
        """The metadata on disk, and why its plan cannot be used."""
        name = wanted.component
        paths = plan_path(self._directory, name), metadata_path(self._directory, name)
        if not any(path.exists() for path in paths):
            return None, ["not built yet"]
        try:
            found = read_metadata(self._directory, name)
            # what a dry run cannot know here is not compared
            unknown = {
                field: getattr(found.source, field)
                for field in ("tensorrt", "gpu", "compute_capability")
                if not getattr(wanted, field)
            }
            reasons = mismatches(found.source, dataclasses.replace(wanted, **unknown))
            if not reasons:
                read_plan(self._directory, name, found)
        except EngineError as error:
            return None, [str(error)]
        return found, reasons

    def _built(self, source: EngineSource) -> EngineMetadata:
        from canvasmar_rt.engines.tensorrt_library import compile_graph

        name = source.component
        check_writable(plan_path(self._directory, name))  # before the minutes a build takes
        if self._options.timing_cache is not None:
            check_writable(self._options.timing_cache)
        made = compile_graph(
            self._bundle.file(name),
            source.profiles,
            optimization_level=source.optimization_level,
            workspace_bytes=source.workspace_bytes,
            timing_cache=self._timings,
            progress=lambda done, total: self._progress(name, done, total),
        )
        check_dtypes(self._bundle, name, made.io_dtypes)
        if made.cache_refused:
            self._notes.append(
                f"{self._options.timing_cache}: the measurements are of another TensorRT or GPU; "
                "started anew"
            )
        if self._options.timing_cache is not None:
            self._timings = made.timing_cache
            write_file(self._options.timing_cache, self._timings)
        now = datetime.datetime.now(datetime.UTC)
        metadata = EngineMetadata(
            schema_version=SCHEMA_VERSION,
            source=source,
            io_dtypes=made.io_dtypes,
            layer_dtypes=layer_dtypes(made.information),
            plan_sha256=hashlib.sha256(made.plan).hexdigest(),
            plan_bytes=len(made.plan),
            built_at=now.isoformat(timespec="seconds"),
        )
        write_engine(self._directory, made.plan, metadata)
        return metadata

    def _read_timings(self) -> bytes:
        path = self._options.timing_cache
        if path is None or not path.exists() or self._options.dry_run:
            return b""
        try:
            return path.read_bytes()
        except OSError as error:
            raise EngineError(f"{path}: cannot be read ({error})") from None


def check_dtypes(bundle: Bundle, component: str, found: dict[str, str]) -> None:
    """
    Raises:
        EngineError: if an engine's inputs and outputs are not those of the bundle.
    """
    entry = bundle.manifest.components[component]
    wanted = {t.name: t.dtype for t in (*entry.inputs, *entry.outputs)}
    wrong = [
        f"{name} is {found.get(name, 'missing')}, expected {wanted.get(name, 'no such tensor')}"
        for name in sorted({**wanted, **found})
        if found.get(name) != wanted.get(name)
    ]
    if wrong:
        raise EngineError(
            f"{component}: the engine's tensors are not the bundle's: {'; '.join(wrong)}"
        )
