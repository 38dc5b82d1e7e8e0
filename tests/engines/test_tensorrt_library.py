"""What is asked of TensorRT to build an engine, with a stand-in for it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest

from canvasmar_rt import engines
from canvasmar_rt.engines.tensorrt_cache import Profile

LIBRARY = "canvasmar_rt.engines.tensorrt_library"


class Config:
    """`flags` are those TensorRT sets by itself."""

    def __init__(self) -> None:
        self.flags = {"TF32"}
        self.profiles: list[dict[str, tuple[Any, ...]]] = []

    def clear_flag(self, flag: str) -> None:
        self.flags.discard(flag)

    def create_timing_cache(self, data: bytes) -> bytes:
        return data

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        return not ignore_mismatch

    def get_timing_cache(self) -> Any:
        return SimpleNamespace(serialize=lambda: b"timings")

    def add_optimization_profile(self, profile: Any) -> int:
        self.profiles.append(profile.shapes)
        return 0


class Builder:
    built: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, log: Any) -> None:
        pass

    def create_network(self, flags: int) -> SimpleNamespace:
        return SimpleNamespace(flags=flags)

    def create_builder_config(self) -> Config:
        return Config()

    def create_optimization_profile(self) -> SimpleNamespace:
        shapes: dict[str, tuple[Any, ...]] = {}
        return SimpleNamespace(
            shapes=shapes, set_shape=lambda name, *three: shapes.update({name: three})
        )

    def build_serialized_network(self, network: SimpleNamespace, config: Config) -> bytes:
        kept = {**vars(config), "flags": set(config.flags), "network_flags": network.flags}
        self.built.append(kept)
        return b"plan"


class Runtime:
    def __init__(self, log: Any) -> None:
        pass

    def deserialize_cuda_engine(self, plan: bytes) -> SimpleNamespace:
        return SimpleNamespace(
            num_io_tensors=1,
            get_tensor_name=lambda i: "latent",
            get_tensor_dtype=lambda name: SimpleNamespace(name="FLOAT"),
            create_execution_context=lambda strategy: None,
            create_engine_inspector=lambda: SimpleNamespace(
                get_engine_information=lambda form: '{"Layers": []}'
            ),
        )


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1)
    fake = SimpleNamespace(
        __version__="11.4.0.106",
        ILogger=type("ILogger", (), {"Severity": severity}),
        IProgressMonitor=type("IProgressMonitor", (), {}),
        Builder=Builder,
        Runtime=Runtime,
        OnnxParser=lambda *_: SimpleNamespace(parse_from_file=lambda path: True),
        BuilderFlag=SimpleNamespace(TF32="TF32"),
        NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1),
        ProfilingVerbosity=SimpleNamespace(DETAILED="detailed"),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"),
        LayerInformationFormat=SimpleNamespace(JSON="json"),
        Dims=tuple,
    )
    monkeypatch.setattr(Builder, "built", [])
    monkeypatch.setitem(sys.modules, "tensorrt", fake)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, LIBRARY, ModuleType(LIBRARY))
    del sys.modules[LIBRARY]
    yield importlib.import_module(LIBRARY)
    del engines.tensorrt_library  # or other tests would find it there


def test_float32_stays_float32(library: ModuleType) -> None:
    """TensorRT takes TF32 for it unless told otherwise, in strongly typed networks, too."""
    shape = Profile(minimum=(1, 64), optimum=(2, 64), maximum=(4, 64))
    made = library.compile_graph(
        Path("decoder.onnx"), {"latent": shape}, optimization_level=3, workspace_bytes=None,
        timing_cache=b"", progress=lambda done, total: None,
    )  # fmt: skip
    assert (made.plan, made.io_dtypes) == (b"plan", {"latent": "float32"})
    (built,) = Builder.built
    assert built["flags"] == set()
    assert built["network_flags"] == 1 << 1
    assert built["max_aux_streams"] == 0
    assert built["profiles"] == [{"latent": ((1, 64), (2, 64), (4, 64))}]
