"""What is asked of TensorRT besides running: parsing, building, and what an engine says of itself.

Importing this module imports TensorRT and raises `EngineError` where that is not installed, so it
is imported inside the functions that need it. The same code is for TensorRT 10.16 and 11: networks
are strongly typed, all precision lies in the ONNX graph.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import SupportsInt, TypeVar

from canvasmar_rt.engines.tensorrt_cache import DTYPE_WORDS, Profile
from canvasmar_rt.errors import EngineError
from canvasmar_rt.signals import kept_signals

try:
    import tensorrt as trt  # type: ignore[import-not-found, unused-ignore]
except (ImportError, OSError) as error:
    raise EngineError(
        f'TensorRT cannot be imported ({error}): pip install "canvasmar-rt[tensorrt]"'
    ) from None

__all__ = [
    "Compiled", "compile_graph", "deserialized", "io_dtypes", "log", "sizes", "started", "trt",
]  # fmt: skip


class _Log(trt.ILogger):  # type: ignore[misc, unused-ignore]
    """Keeps the latest errors, which say why a call of TensorRT returned nothing."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self._errors: deque[str] = deque(maxlen=8)

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
            self._errors.append(" ".join(msg.split()))

    def taken(self) -> str:
        """The errors since they were last taken."""
        text = "; ".join(self._errors)
        self._errors.clear()
        return text or "it gave no reason"


log = _Log()
"""One for the process: TensorRT keeps the first it is given."""


Started = TypeVar("Started")


def started(kind: Callable[[trt.ILogger], Started]) -> Started:
    """A `trt.Builder` or `trt.Runtime`.

    Raises:
        EngineError: if TensorRT does not start, as on a machine whose driver is too old for it.
    """
    try:
        return kind(log)
    except TypeError:  # what the bindings make of a null pointer
        raise EngineError(f"TensorRT {trt.__version__} does not start: {log.taken()}") from None


class _Monitor(trt.IProgressMonitor):  # type: ignore[misc, unused-ignore]
    """Tells `progress` steps done and steps in all of the outermost phase. What it raises cancels
    the build and is kept in `raised`: it must not travel through C++, nor may an interrupt, for
    which `stopped` is asked."""

    def __init__(self, progress: Callable[[int, int], None], stopped: Callable[[], bool]) -> None:
        trt.IProgressMonitor.__init__(self)
        self.raised: BaseException | None = None
        self._progress, self._stopped = progress, stopped
        self._steps: dict[str, int] = {}

    def phase_start(
        self, phase_name: str, parent_phase: str | None, num_steps: SupportsInt
    ) -> None:
        if not parent_phase:
            self._steps[phase_name] = int(num_steps)

    def step_complete(self, phase_name: str, step: SupportsInt) -> bool:
        if phase_name in self._steps and self.raised is None:
            try:
                self._progress(int(step) + 1, self._steps[phase_name])
            except BaseException as error:
                self.raised = error
        return self.raised is None and not self._stopped()

    def phase_finish(self, phase_name: str) -> None:
        self._steps.pop(phase_name, None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """A plan, what an `EngineInspector` says of it as JSON, its I/O dtypes, and the timing cache
    after building it. `cache_refused`: the cache given was of another TensorRT or GPU."""

    plan: bytes
    information: str
    io_dtypes: dict[str, str]
    timing_cache: bytes
    cache_refused: bool


def compile_graph(
    onnx: Path,
    profiles: Mapping[str, Profile],
    *,
    optimization_level: int,
    workspace_bytes: int | None,
    timing_cache: bytes,
    progress: Callable[[int, int], None],
) -> Compiled:
    """Build the plan of an ONNX file for the current GPU.

    Raises:
        EngineError: the parser or the builder refused the graph; with every error they gave.
        KeyboardInterrupt: a signal came; TensorRT calls back from C++, where none may be raised.
    """
    with kept_signals() as stopped:
        log.taken()
        builder, runtime = started(trt.Builder), started(trt.Runtime)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, log)  # owns the weights: it has to outlive the build
        if not parser.parse_from_file(str(onnx)):
            errors = [parser.get_error(i) for i in range(parser.num_errors)]
            told = [f"{e.node_operator()} {e.node_name()}: {e.desc()}" for e in errors]
            raise EngineError(f"{onnx}: TensorRT cannot parse it: {'; '.join(told) or log.taken()}")
        config = builder.create_builder_config()
        config.builder_optimization_level = optimization_level
        config.max_aux_streams = 0  # contexts run on the one stream they are given
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default; float32 graphs are to be float32
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if workspace_bytes is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
        cache_refused = not _use_timing_cache(config, timing_cache)
        if cache_refused:
            _use_timing_cache(config, b"")
        profile = builder.create_optimization_profile()
        for name, p in profiles.items():
            profile.set_shape(name, trt.Dims(p.minimum), trt.Dims(p.optimum), trt.Dims(p.maximum))
        if config.add_optimization_profile(profile) < 0:
            raise EngineError(f"{onnx}: TensorRT refused the shapes: {log.taken()}")
        monitor = _Monitor(progress, stopped)
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
        if monitor.raised is not None:
            raise monitor.raised
        if stopped():
            raise KeyboardInterrupt
        if plan is None:
            raise EngineError(f"{onnx}: TensorRT cannot build it: {log.taken()}")
        made = bytes(plan)
        cache = config.get_timing_cache()
        engine = deserialized(runtime, made, str(onnx))
        compiled = Compiled(
            plan=made,
            information=_inspected(engine, profiles),
            io_dtypes=io_dtypes(engine),
            timing_cache=b"" if cache is None else bytes(cache.serialize()),
            cache_refused=cache_refused,
        )
    if stopped():
        raise KeyboardInterrupt
    return compiled


def _inspected(engine: trt.ICudaEngine, profiles: Mapping[str, Profile]) -> str:
    """What the inspector says at the optimum: without shapes it does not know what will run."""
    inspector = engine.create_engine_inspector()
    context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    if context is not None:
        for name, profile in profiles.items():
            context.set_input_shape(name, profile.optimum)
        inspector.execution_context = context
    told: str = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    return told


def _use_timing_cache(config: trt.IBuilderConfig, data: bytes) -> bool:
    cache = config.create_timing_cache(data)
    return cache is not None and config.set_timing_cache(cache, ignore_mismatch=False)


def deserialized(runtime: trt.Runtime, plan: bytes, what: str) -> trt.ICudaEngine:
    """
    Raises:
        EngineError: if TensorRT refuses the plan.
    """
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError(f"{what}: TensorRT refused the plan: {log.taken()}")
    return engine


def io_dtypes(engine: trt.ICudaEngine) -> dict[str, str]:
    """Dtypes of an engine's inputs and outputs, as the bundle names them."""
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    words = {name: engine.get_tensor_dtype(name).name.lower() for name in names}
    return {name: DTYPE_WORDS.get(word, word) for name, word in words.items()}


def sizes(dims: trt.Dims) -> tuple[int, ...]:
    """A shape as Python has it."""
    return tuple(dims[i] for i in range(len(dims)))
