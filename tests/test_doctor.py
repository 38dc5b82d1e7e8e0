"""What `doctor` finds where a GPU build of ONNX Runtime is installed without its libraries."""

from __future__ import annotations

import onnxruntime
import pytest
from onnxruntime.capi import build_and_package_info

from canvasmar_rt import doctor
from canvasmar_rt.engines import onnxruntime_engine
from canvasmar_rt.engines.onnxruntime_engine import missing_libraries

NEEDED = [
    "libcublasLt.so.13", "libcublas.so.13", "libcudart.so.13", "libcurand.so.10", "libcudnn.so.9",
]  # fmt: skip


@pytest.fixture
def gpu_build(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """A build for CUDA 13.0; the set is of the libraries that the system has."""
    have: set[str] = set()
    monkeypatch.setattr(build_and_package_info, "cuda_version", "13.0", raising=False)
    monkeypatch.setattr(onnxruntime_engine, "_found", have.__contains__)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime_engine.sys, "platform", "linux")
    return have


def test_libraries_that_are_missing_are_named(
    gpu_build: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert missing_libraries() == NEEDED
    gpu_build.update(NEEDED[:-1])
    found = doctor._cuda_onnxruntime(gpu=True)
    assert (found.status, found.fix) == ("problem", 'pip install "canvasmar-rt[gpu]"')
    assert found.detail.endswith("but not libcudnn.so.9")
    assert "libcudnn.so.9 cannot be found: pip install" in onnxruntime_engine._advice()
    gpu_build.update(NEEDED)
    assert doctor._cuda_onnxruntime(gpu=True).status == "ok"
    assert onnxruntime_engine._advice() == "see what canvasmar-rt doctor says of the GPU"
    assert capsys.readouterr() == ("", "")  # ONNX Runtime would print them


def test_a_build_for_the_cpu_needs_none() -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this is a GPU build")
    assert missing_libraries() == []


def test_fixes_can_be_pasted_into_any_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    """To cmd.exe a single quote is a letter, and > within two of them a redirection."""
    monkeypatch.setattr(doctor, "_version", lambda distribution: None)
    fixes = [finding.fix for finding in doctor.examine()]
    assert 'pip install "canvasmar-rt[export]"' in fixes
    assert not [fix for fix in fixes if "'" in fix]
