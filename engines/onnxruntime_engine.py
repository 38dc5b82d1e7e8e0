"""ONNX Runtime on the CPU, with every buffer bound once and no copies in the frame path."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import onnxruntime as ort

from canvasmar_rt.bundle import Bundle
from canvasmar_rt.engines.base import Array, Run, check_arrays
from canvasmar_rt.errors import BundleError, EngineError

PROVIDERS = {"cpu": "CPUExecutionProvider"}


class OnnxRuntimeEngine:
    """Sessions are made when a component is first bound, and shared by all rollouts."""

    name = "onnxruntime"

    def __init__(self, bundle: Bundle, *, device: str = "cpu", threads: int | None = None) -> None:
        if device not in PROVIDERS:
            raise EngineError(
                f"engine 'onnxruntime' runs on {', '.join(PROVIDERS)}; got device {device!r}"
            )
        if PROVIDERS[device] not in ort.get_available_providers():
            raise EngineError(
                f"this onnxruntime ({ort.__version__}) has no {PROVIDERS[device]}, only "
                f"{', '.join(ort.get_available_providers())}"
            )
        _ = bundle.hidden_dtype  # bfloat16 has no CPU kernels
        self.bundle, self.device, self._threads = bundle, device, threads
        self._lock = threading.Lock()
        # all but the whole frame, which the loop does not use, are read now: what was hashed is
        # what runs
        names = [n for n in bundle.manifest.components if n != "frame"]
        self._sessions = {name: self._load(name) for name in names}

    def session(self, component: str) -> ort.InferenceSession:
        """The session of a component.

        Raises:
            EngineError: if ONNX Runtime refuses the graph.
        """
        with self._lock:
            if component not in self._sessions:
                self._sessions[component] = self._load(component)
            return self._sessions[component]

    def _load(self, component: str) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        # Sessions of one frame run in turn: a pool that spins after its run takes the cores from
        # the next one.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if component == "frame":
            # every AR step is a copy of the same nodes, and each would pack the weights for itself
            options.add_session_config_entry("session.disable_prepacking", "1")
        provider = PROVIDERS[self.device]
        try:
            session = ort.InferenceSession(
                str(self.bundle.file(component)), options, providers=[provider]
            )
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise EngineError(
                f"{self.bundle.path}: {component}: ONNX Runtime refused the graph: {error}"
            ) from None
        if session.get_providers()[0] != provider:
            raise EngineError(
                f"{component}: asked ONNX Runtime for {provider}, got {session.get_providers()}"
            )
        entry = self.bundle.manifest.components[component]
        steps = self.bundle.manifest.sampling.ar_steps
        for got, want in (
            (session.get_inputs(), entry.inputs),
            (session.get_outputs(), entry.outputs),
        ):
            found = [(t.name, list(t.shape)) for t in got]
            listed = [(t.name, [steps if d == "AR" else d for d in t.dims]) for t in want]
            if found != listed:
                raise BundleError(
                    f"{self.bundle.path}: {component}: the graph's tensors are not those the "
                    "manifest lists; export the bundle again"
                )
        return session

    def bind(
        self, component: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]
    ) -> Run:
        check_arrays(self.bundle, component, inputs, outputs)
        session = self.session(component)
        binding = session.io_binding()
        for arrays, bind in ((inputs, binding.bind_input), (outputs, binding.bind_output)):
            for name, array in arrays.items():
                bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        keep = (inputs, outputs)  # the binding holds bare addresses

        def run() -> None:
            _ = keep
            try:
                session.run_with_iobinding(binding)
            except Exception as error:  # onnxruntime's exceptions share no base class
                raise EngineError(f"{component}: ONNX Runtime failed: {error}") from None

        return run
