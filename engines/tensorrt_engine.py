"""TensorRT on one GPU: prebuilt engines, bound once, on the stream of a rollout's memory."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from canvasmar_rt.bundle import Bundle
from canvasmar_rt.config import SamplingConfig
from canvasmar_rt.engines.base import check_buffers, cuda_index
from canvasmar_rt.engines.component_program import ComponentProgram
from canvasmar_rt.engines.cuda_memory import ALIGNMENT, CudaMemory, gpu
from canvasmar_rt.engines.memory import Buffer, Memory, Run, loading
from canvasmar_rt.engines.tensorrt_build import OPTIONAL, check_dtypes, profiles
from canvasmar_rt.engines.tensorrt_cache import (
    EngineMetadata,
    Profile,
    build_command,
    files_of,
    metadata_path,
    mismatches,
    plan_path,
    read_metadata,
    read_plan,
)
from canvasmar_rt.errors import EngineError

if TYPE_CHECKING:
    import tensorrt as trt  # type: ignore[import-not-found, unused-ignore]


class TensorRTEngine:
    """Engines are read when a component is first bound, and shared by all rollouts. Every binding
    has a context of its own; those of one rollout share their scratch memory, as they run in turn.

    Args:
        device: "cuda" or "cuda:<index>".
        engine_dir: the folder that `canvasmar-rt build` made.
        cuda_graph: capture the work of a frame and launch it as one graph.

    Raises:
        EngineError: no TensorRT, no GPU, or engines that do not fit bundle and machine; every
            difference is named.
    """

    name = "tensorrt"
    OPTIONS = MappingProxyType({"engine_dir": str, "cuda_graph": bool})

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str = "cuda",
        engine_dir: str | Path | None = None,
        threads: int | None = None,
        cuda_graph: bool = True,
    ) -> None:
        if device == "cpu":
            raise EngineError("engine 'tensorrt' runs on cuda or cuda:<index>; got device 'cpu'")
        if threads is not None:
            raise EngineError("engine 'tensorrt' has no CPU threads to set; leave threads out")
        index = cuda_index(self.name, device)
        if engine_dir is None:
            example = build_command(bundle, Path("ENGINES"), f"cuda:{index}")
            raise EngineError(f"engine 'tensorrt' needs engine_dir, the folder made by: {example}")
        from canvasmar_rt.engines.tensorrt_library import started, trt

        self.bundle, self.device = bundle, f"cuda:{index}"
        self._index, self._cuda_graph = index, cuda_graph
        self._directory = Path(engine_dir)
        self._gpu, self._version = gpu(index), trt.__version__
        self._lock = threading.Lock()
        self._runtime = started(trt.Runtime)
        self._engines: dict[str, tuple[trt.ICudaEngine, EngineMetadata]] = {}
        self._scratch: weakref.WeakKeyDictionary[CudaMemory, Buffer] = weakref.WeakKeyDictionary()
        self._memories: weakref.WeakSet[CudaMemory] = weakref.WeakSet()
        batch = bundle.manifest.batch
        needed = [n for n in bundle.manifest.components if profiles(bundle, n, batch) is not None]
        self._require({n: self._differences(n) for n in needed if n != OPTIONAL})

    @property
    def graph_off(self) -> dict[str, str]:
        """By memory in use, why its work is not launched as CUDA graphs; empty where it is."""
        with self._lock:
            reasons = [m.graph_off for m in self._memories]
        return {f"rollout {i}": r for i, r in enumerate(reasons) if r is not None}

    @property
    def omitted(self) -> dict[str, str]:
        manifest, found = self.bundle.manifest, {}
        for name in manifest.components:
            if profiles(self.bundle, name, manifest.batch) is None:
                found[name] = "a frame has one AR step"
            elif name == OPTIONAL and not metadata_path(self._directory, name).exists():
                found[name] = "not built; no rollout runs it"
        return found

    def program(self, *, batch: int, sampling: SamplingConfig) -> ComponentProgram:
        return ComponentProgram(self, batch=batch, sampling=sampling)

    def memory(self) -> CudaMemory:
        memory = CudaMemory(self._index, capture=self._cuda_graph)
        with self._lock:
            self._memories.add(memory)
        return memory

    @loading()
    def bind(
        self,
        component: str,
        inputs: Mapping[str, Buffer],
        outputs: Mapping[str, Buffer],
        memory: Memory,
    ) -> Run:
        check_buffers(self.bundle, component, inputs, outputs)
        assert isinstance(memory, CudaMemory), "this engine's memory() makes it"
        memory.activate()
        engine, metadata = self._engine(component)
        self._check_shapes(component, inputs, metadata.source.profiles)
        from canvasmar_rt.engines.tensorrt_library import log, sizes, trt

        def require(done: object, what: str) -> None:
            if not done:
                raise EngineError(f"{component}: TensorRT failed at {what}: {log.taken()}")

        context = engine.create_execution_context(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if context is None:
            raise EngineError(f"{component}: TensorRT made no context: {log.taken()}")
        try:
            done = context.set_optimization_profile_async(0, memory.stream)
            require(done, "choosing the profile")
            for name in metadata.source.profiles:
                require(context.set_input_shape(name, inputs[name].shape), f"the shape of {name}")
            unknown = context.infer_shapes()
        except RuntimeError as error:  # the bindings of some versions do not return False
            told = log.taken() or error
            raise EngineError(f"{component}: TensorRT failed at the shapes: {told}") from None
        require(not unknown, f"the shapes that {', '.join(unknown)} decide")
        for name, buffer in {**inputs, **outputs}.items():
            shape = sizes(context.get_tensor_shape(name))
            require(shape == buffer.shape, f"{name}: it has {shape}, the buffer {buffer.shape}")
            require(
                buffer.address % ALIGNMENT == 0,
                f"{name}: its address is not a multiple of {ALIGNMENT}",
            )
            on_gpu = engine.get_tensor_location(name) == trt.TensorLocation.DEVICE
            require(on_gpu, f"{name}: it wants it in host memory")
            require(context.set_tensor_address(name, buffer.address), f"the address of {name}")
        # 0 may mean that it failed, too: then what suffices for all shapes
        size = context.update_device_memory_size_for_shapes() or engine.device_memory_size_v2
        scratch = self._scratch_for(memory, size)
        context.set_device_memory(scratch.address, scratch.nbytes)
        memory.synchronize()
        keep = (inputs, outputs, scratch)  # the context holds bare addresses

        def run() -> None:
            _ = keep
            memory.activate()
            require(context.execute_async_v3(memory.stream), "running")

        return run

    def _scratch_for(self, memory: CudaMemory, size: int) -> Buffer:
        """Scratch memory for contexts of one rollout. A larger one is a new one: what was bound,
        and perhaps captured in a graph, keeps its address."""
        with self._lock:
            have = self._scratch.get(memory)
            if have is None or have.nbytes < size:
                group = memory.group({"scratch": ((max(size, 1),), "uint8")}, mirrored=False)
                have = self._scratch[memory] = group.buffers["scratch"]
            return have

    def _engine(self, component: str) -> tuple[trt.ICudaEngine, EngineMetadata]:
        from canvasmar_rt.engines.tensorrt_library import deserialized, io_dtypes

        with self._lock:
            if component not in self._engines:
                self._require({component: self._differences(component)})
                metadata = read_metadata(self._directory, component)
                plan = read_plan(self._directory, component, metadata)
                what = str(plan_path(self._directory, component))
                engine = deserialized(self._runtime, plan, what)
                check_dtypes(self.bundle, component, io_dtypes(engine))
                self._engines[component] = engine, metadata
            return self._engines[component]

    def _differences(self, component: str) -> list[str]:
        """Why the engine on disk is not one of this bundle on this machine."""
        try:
            found = read_metadata(self._directory, component).source
        except EngineError as error:
            return [str(error)]
        graph, weights = files_of(self.bundle, component)
        here = dataclasses.replace(
            found,
            component=component,
            tensorrt=self._version,
            gpu=self._gpu.name,
            compute_capability=self._gpu.compute_capability,
            bundle=self.bundle.fingerprint,
            onnx_sha256=graph,
            weights_sha256=weights,
        )
        return mismatches(found, here)

    def _require(self, differences: Mapping[str, list[str]]) -> None:
        by_line: dict[str, list[str]] = {}
        for component, lines in differences.items():
            for line in lines:
                by_line.setdefault(line, []).append(component)
        if by_line:
            told = [f"[{', '.join(names)}] {line}" for line, names in by_line.items()]
            raise EngineError(
                f"{self._directory}: these engines cannot be used: {'; '.join(told)}. Run: "
                f"{build_command(self.bundle, self._directory, self.device)}"
            )

    def _check_shapes(
        self, component: str, inputs: Mapping[str, Buffer], taken: Mapping[str, Profile]
    ) -> None:
        wrong = [
            f"{name} is {inputs[name].shape}, the engine takes {profile}"
            for name, profile in taken.items()
            if not profile.takes(inputs[name].shape)
        ]
        if wrong:
            command = build_command(self.bundle, self._directory, self.device)
            raise EngineError(
                f"{component}: {'; '.join(wrong)}. Keep to the bundle's sampling options and the "
                "batches the engines were built for; for other batches run: "
                f"{command} --batch-min A --batch-max B"
            )
