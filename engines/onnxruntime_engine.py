"""ONNX Runtime on the CPU and on CUDA, with every buffer bound once and no copies between runs."""

from __future__ import annotations

import contextlib
import ctypes
import io
import itertools
import sys
import threading
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import onnxruntime as ort

from canvasmar_rt.bundle import Bundle
from canvasmar_rt.config import SamplingConfig
from canvasmar_rt.engines.base import check_buffers, cuda_index
from canvasmar_rt.engines.component_program import ComponentProgram
from canvasmar_rt.engines.memory import (
    STORAGE,
    UNDISTURBED,
    Buffer,
    HostMemory,
    Memory,
    Run,
    capturing,
    loading,
)
from canvasmar_rt.errors import BundleError, EngineError

if TYPE_CHECKING:
    from canvasmar_rt.engines.cuda_memory import CudaMemory

BFLOAT16 = 16
"""TensorProto.BFLOAT16, which NumPy has no type for."""

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}

WORK = frozenset(
    "Attention AveragePool Conv DepthToSpace Gelu Gemm LayerNormalization Loop MatMul Resize Scan "
    "Sigmoid Softmax TopK Transpose".split()
)
"""Operators whose inputs are never shapes alone. On a GPU no such node may be left to the CPU."""


class OnnxRuntimeEngine:
    """Sessions are shared by all rollouts.

    On a GPU they run on one stream in device memory, through ONNX Runtime's CUDA kernels or, with
    `provider="tensorrt-rtx"`, NVIDIA's plugin for GeForce cards. With `cuda_graph` every bound run
    of a graph without loops is captured at its first call on a thread and replayed from then on
    (CUDA kernels only). ONNX Runtime keeps what was captured as long as the engine lives, and can
    neither capture nor replay on two threads at once: rollouts on several take turns."""

    name = "onnxruntime"
    OPTIONS = MappingProxyType({"cuda_graph": bool, "provider": str})

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str = "cpu",
        threads: int | None = None,
        cuda_graph: bool = True,
        provider: str = "",
    ) -> None:
        self.bundle, self._threads, self._kind = bundle, threads, provider
        self._graph_off: dict[str, str] = {}
        index = 0 if device == "cpu" else cuda_index(self.name, device)
        self.device = device if device == "cpu" else f"cuda:{index}"
        usable = ("cpu",) if device == "cpu" else ("cuda", "tensorrt-rtx")
        kind = provider or usable[0]
        if kind not in usable:
            raise EngineError(
                f"provider must be {' or '.join(usable)} on {device}, got {provider!r}"
            )
        self._provider = PROVIDERS[kind]
        if device != "cpu":
            preload()
        elif bundle.manifest.dtype == "bfloat16":
            raise BundleError(
                f"{bundle.path}: a bfloat16 bundle runs on a GPU engine only; export with "
                "--dtype fp32 or fp16 for this engine"
            )
        self._plugin = _rtx_device(index) if kind == "tensorrt-rtx" else None
        if self._plugin is None and self._provider not in ort.get_available_providers():
            raise EngineError(
                f"device {device!r} needs {self._provider}; this onnxruntime ({ort.__version__}) "
                f"has only {', '.join(ort.get_available_providers())}"
                + ("" if device == "cpu" else "; docs/install.md says how to get the GPU build")
            )
        self._cuda: CudaMemory | None = None
        if device != "cpu":
            from canvasmar_rt.engines.cuda_memory import CudaMemory

            self._cuda = CudaMemory(index, capture=False, shared=True)
        self._cuda_graph = cuda_graph
        self._graph_ids = itertools.count(1)
        self._lock = threading.Lock()
        # all but the whole frame, which the loop does not use, are read now: what was hashed is
        # what runs
        names = [n for n in bundle.manifest.components if n != "frame"]
        self._sessions = {name: self._load(name) for name in names}

    def like(self, bundle: Bundle) -> OnnxRuntimeEngine:
        """Another bundle on an engine with this one's device and options."""
        return OnnxRuntimeEngine(
            bundle,
            device=self.device,
            threads=self._threads,
            cuda_graph=self._cuda_graph,
            provider=self._kind,
        )

    @property
    def graph_off(self) -> Mapping[str, str]:
        return self._graph_off

    @property
    def omitted(self) -> Mapping[str, str]:
        return {}

    def program(self, *, batch: int, sampling: SamplingConfig) -> ComponentProgram:
        return ComponentProgram(self, batch=batch, sampling=sampling)

    def memory(self) -> Memory:
        return HostMemory() if self._cuda is None else self._cuda

    def session(self, component: str) -> ort.InferenceSession:
        """The session of a component.

        Raises:
            EngineError: if ONNX Runtime refuses the graph, or leaves work to the CPU that was
                asked of a GPU.
        """
        with self._lock:
            if component not in self._sessions:
                self._sessions[component] = self._load(component)
            return self._sessions[component]

    def _load(self, component: str) -> ort.InferenceSession:
        if self._cuda is None:
            session = self._open(component, {})
        else:
            with loading():
                session = self._open(component, self._settings(component))
            session.stream = self._cuda  # it frees memory on it when it ends
            if left := left_to_the_cpu(session):
                raise EngineError(
                    f"{self.bundle.path}: {component}: {self._provider} has no kernels for "
                    f"{', '.join(left)} of this bundle ({self.bundle.manifest.dtype}) and leaves "
                    "them to the CPU; take the torch or tensorrt engine, or export with another "
                    "--dtype"
                )
        self._check_tensors(component, session)
        return session

    def _settings(self, component: str) -> dict[str, str]:
        """Options of the GPU providers."""
        assert self._cuda is not None
        stream = str(self._cuda.stream)
        if self._plugin is not None:
            self._graph_off[component] = "not used with tensorrt-rtx"
            return {"has_user_compute_stream": "1", "user_compute_stream": stream}
        settings = {
            "device_id": str(self._cuda.device_index),
            "user_compute_stream": stream,
            "use_tf32": "0",
        }
        if not self._cuda_graph:
            self._graph_off[component] = "switched off"
        elif component in ("flow", "frame") and not self.bundle.manifest.unrolled:
            self._graph_off[component] = (
                "the flow steps are a loop inside the graph; export with --unroll"
            )
        else:
            settings["enable_cuda_graph"] = "1"
        return settings

    def _open(self, component: str, settings: Mapping[str, str]) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.log_severity_level = 4  # what is refused is said in our own error
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        # Sessions of one frame run in turn: a pool that spins after its run takes the cores from
        # the next one.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self._cuda is not None:
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        elif component == "frame":
            # every AR step is a copy of the same nodes, and each would pack the weights for itself
            options.add_session_config_entry("session.disable_prepacking", "1")
        chosen: dict[str, Any] = {"providers": [(self._provider, dict(settings))]}
        chosen["enable_fallback"] = 0  # it would say what failed on stdout, and go on on the CPU
        if self._plugin is not None:
            options.add_provider_for_devices([self._plugin], dict(settings))
            chosen = {}
        try:
            session = ort.InferenceSession(str(self.bundle.file(component)), options, **chosen)
        except Exception as error:  # onnxruntime's exceptions share no base class
            told = _told(error)
            then = "copy or export the bundle again" if self._cuda is None else _advice()
            raise EngineError(
                f"{self.bundle.path}: {component}: ONNX Runtime refused the graph: {told}; {then}"
            ) from None
        if session.get_providers()[0] != self._provider:
            raise EngineError(
                f"{component}: asked ONNX Runtime for {self._provider}, got "
                f"{session.get_providers()}; {_advice()}"
            )
        return session

    def _check_tensors(self, component: str, session: ort.InferenceSession) -> None:
        entry = self.bundle.manifest.components[component]
        fixed = self.bundle.manifest.fixed_dims(component)
        for got, want in (
            (session.get_inputs(), entry.inputs),
            (session.get_outputs(), entry.outputs),
        ):
            found = [(t.name, t.type, list(t.shape)) for t in got]
            listed = []
            for t in want:
                kind = "float" if t.dtype == "float32" else t.dtype
                listed.append((t.name, f"tensor({kind})", [fixed.get(str(d), d) for d in t.dims]))
            if found != listed:
                raise BundleError(
                    f"{self.bundle.path}: {component}: the graph's tensors are not those the "
                    "manifest lists; export the bundle again"
                )

    def bind(
        self,
        component: str,
        inputs: Mapping[str, Buffer],
        outputs: Mapping[str, Buffer],
        memory: Memory,
    ) -> Run:
        check_buffers(self.bundle, component, inputs, outputs)
        session = self.session(component)
        binding = session.io_binding()
        kind, _, index = self.device.partition(":")
        for buffers, bind in ((inputs, binding.bind_input), (outputs, binding.bind_output)):
            for name, x in buffers.items():
                element: Any = BFLOAT16 if x.dtype == "bfloat16" else STORAGE[x.dtype].type
                bind(name, kind, int(index or 0), element, x.shape, x.address)
        # it holds bare addresses, and the session, which frees memory on the stream when it ends
        binding.keep = (inputs, outputs, memory)
        options = None
        if self._cuda is not None:
            options = ort.RunOptions()
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
            graph = -1 if component in self._graph_off else next(self._graph_ids)
            options.add_run_config_entry("gpu_graph_id", str(graph))

        def run() -> None:
            try:
                session.run_with_iobinding(binding, options)
            except Exception as error:  # onnxruntime's exceptions share no base class
                then = "" if self._cuda is None else f"; {_advice()}"
                raise EngineError(
                    f"{component}: ONNX Runtime failed: {_told(error)}{then}"
                ) from None

        if self._cuda is None:
            return run
        captured = threading.local()  # what ONNX Runtime captured belongs to a thread

        def run_in_turn() -> None:
            with UNDISTURBED if hasattr(captured, "done") else capturing():
                run()
            captured.done = True

        return run_in_turn


def left_to_the_cpu(session: ort.InferenceSession) -> list[str]:
    """Operators among `WORK` that a session made with `record_ep_graph_assignment_info` runs on the
    CPU, sorted. ONNX Runtime gives it what its provider has no kernel for without a word, and keeps
    arithmetic on shapes there on purpose."""
    parts = session.get_provider_graph_assignment_info()
    there = (part for part in parts if part.ep_name == PROVIDERS["cpu"])
    return sorted(WORK & {node.op_type for part in there for node in part.get_nodes()})


def _told(error: Exception) -> str:
    """What ONNX Runtime says, as one line; it repeats names of the graph, whatever is in them."""
    line = " ".join(str(error).split())
    return "".join(c if c.isprintable() else "?" for c in line)


def preload() -> None:
    """Load CUDA's libraries from pip packages, where there are any. ONNX Runtime prints which it
    does not find, also where the system has them elsewhere."""
    with contextlib.redirect_stdout(io.StringIO()):
        ort.preload_dlls()


def missing_libraries() -> list[str]:
    """Shared libraries that the CUDA kernels of this ONNX Runtime need and that are not found, so
    that it would take the CPU, or fail at its first convolution. None where it has no such kernels.
    """
    from onnxruntime.capi import build_and_package_info as built

    major = (getattr(built, "cuda_version", "") or "").partition(".")[0]
    if not major or sys.platform != "linux":
        return []
    preload()
    wanted = [f"lib{name}.so.{major}" for name in ("cublasLt", "cublas", "cudart")]
    return [name for name in (*wanted, "libcurand.so.10", "libcudnn.so.9") if not _found(name)]


def _found(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


GPU_COMMAND = 'pip install "canvasmar-rt[gpu]"'


def _advice() -> str:
    missing = missing_libraries()
    if missing:
        return f"{', '.join(missing)} cannot be found: {GPU_COMMAND}"
    return "see what canvasmar-rt doctor says of the GPU"


RTX_SINCE = (1, 30)
"""ONNX Runtime from which on a binding says that device memory is NVIDIA's. Before, builds without
CUDA kernels said nobody's, and at the first run the plugin refused to take its inputs from there.
"""


def _rtx_device(index: int) -> Any:
    """The GPU as the TensorRT-RTX plugin offers it.

    Raises:
        EngineError: if the plugin is not installed, or offers no such GPU, or ONNX Runtime is too
            old for it.
    """
    try:
        import onnxruntime_ep_nv_tensorrt_rtx as plugin
    except ImportError:
        raise EngineError(
            "provider 'tensorrt-rtx' needs its plugin: pip install "
            "onnxruntime-ep-nv-tensorrt-rtx-cu13"
        ) from None
    if tuple(map(int, ort.__version__.split(".")[:2])) < RTX_SINCE:
        raise EngineError(
            f"provider 'tensorrt-rtx' needs ONNX Runtime 1.30 or newer, this is {ort.__version__}: "
            'pip install "onnxruntime>=1.30"'
        )
    name = PROVIDERS["tensorrt-rtx"]

    def offered() -> list[Any]:
        return [d for d in ort.get_ep_devices() if d.ep_name == name]

    with _registering:
        if not offered():
            try:
                ort.register_execution_provider_library(name, plugin.get_library_path())
            except Exception as error:  # onnxruntime's exceptions share no base class
                raise EngineError(
                    f"ONNX Runtime refused the TensorRT-RTX plugin: {error}"
                ) from None
        devices = offered()
    if index >= len(devices):
        raise EngineError(
            f"the TensorRT-RTX plugin offers {len(devices)} GPUs, cuda:{index} is not among them"
        )
    return devices[index]


_registering = threading.Lock()
