"""What this machine can run, what is missing, and the command that fixes it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import shutil
import subprocess
from typing import Literal

from canvasmar_rt.bundle import Bundle, packaged_names
from canvasmar_rt.errors import CanvasMarError

Status = Literal["ok", "missing", "problem"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report; `fix` is a command or advice, empty when nothing is to be done."""

    name: str
    status: Status
    detail: str
    fix: str = ""


def examine() -> list[Finding]:
    """All findings, the ones the default engine needs first. Nothing is installed or changed."""
    return [
        _machine(),
        *_onnxruntime(),
        _video(),
        *_bundles(),
        _package("torch", "engine 'torch', export", 'pip install "canvasmar-rt[export]"'),
        _package("onnx", "export", 'pip install "canvasmar-rt[export]"'),
        _package("onnxscript", "export", 'pip install "canvasmar-rt[export]"'),
        _package("fastapi", "serve", 'pip install "canvasmar-rt[serve]"'),
        _package("ray", "several machines", 'pip install "canvasmar-rt[cluster]"'),
        _package("gymnasium", "Gymnasium environments", 'pip install "canvasmar-rt[gym]"'),
        gpu := _nvidia(),
        _cuda_onnxruntime(gpu.status == "ok"),
        _package("cuda-python", "engines on a GPU", 'pip install "cuda-python>=13"'),
        _package("tensorrt", "engine 'tensorrt'", 'pip install "canvasmar-rt[tensorrt]"'),
        _package(
            "onnxruntime-ep-nv-tensorrt-rtx-cu13",
            "TensorRT for RTX in ONNX Runtime, on GeForce cards",
            "pip install onnxruntime-ep-nv-tensorrt-rtx-cu13",
        ),
    ]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine() -> Finding:
    return Finding(
        name="machine",
        status="ok",
        detail=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, "
        f"{os.cpu_count()} CPU threads",
    )


def _onnxruntime() -> list[Finding]:
    builds = {
        name: version
        for name in ("onnxruntime", "onnxruntime-gpu")
        if (version := _version(name)) is not None
    }
    try:
        import onnxruntime
    except ImportError as error:
        return [
            Finding(
                name="onnxruntime",
                status="problem",
                detail=f"cannot be imported ({error})",
                fix="pip install --force-reinstall onnxruntime",
            )
        ]
    providers = ", ".join(onnxruntime.get_available_providers())
    found = [
        Finding(
            name="onnxruntime",
            status="ok",
            detail=f"{onnxruntime.__version__}; providers: {providers}",
        )
    ]
    if len(builds) > 1:
        found.append(
            Finding(
                name="onnxruntime builds",
                status="problem",
                detail="both onnxruntime and onnxruntime-gpu are installed; they share one folder "
                "and the last one installed is the one that runs",
                fix="pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu",
            )
        )
    return found


def _video() -> Finding:
    try:
        import av
    except ImportError as error:
        return Finding(
            name="video",
            status="problem",
            detail=f"PyAV cannot be imported ({error})",
            fix="pip install --force-reinstall av",
        )
    if "libx264" not in av.codecs_available:
        return Finding(
            name="video",
            status="problem",
            detail=f"PyAV {av.__version__} has no H.264 encoder; MP4 output is not possible",
            fix="pip install --force-reinstall --only-binary av av",
        )
    return Finding(name="video", status="ok", detail=f"PyAV {av.__version__} with H.264")


def _bundles() -> list[Finding]:
    found = []
    if not packaged_names():
        found.append(
            Finding(
                name="bundles",
                status="problem",
                detail="no packaged bundle was found: the installation is incomplete",
                fix="pip install --force-reinstall canvasmar-rt",
            )
        )
    for name in packaged_names():
        try:
            manifest = Bundle.open(name).manifest
            detail = f"{manifest.source}; {manifest.dtype}"
            if manifest.quantization != "none":
                detail += f", products {manifest.quantization}"
            found.append(Finding(name=f"bundle {name}", status="ok", detail=detail))
        except CanvasMarError as error:
            found.append(
                Finding(
                    name=f"bundle {name}",
                    status="problem",
                    detail=str(error),
                    fix="pip install --force-reinstall canvasmar-rt",
                )
            )
    return found


def _package(name: str, needed_for: str, fix: str) -> Finding:
    version = _version(name)
    if version is None:
        return Finding(
            name=name, status="missing", detail=f"optional; needed for {needed_for}", fix=fix
        )
    return Finding(name=name, status="ok", detail=version)


def _cuda_onnxruntime(gpu: bool) -> Finding:
    """Whether ONNX Runtime could run on a GPU."""
    name = "onnxruntime on CUDA"
    fix = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
    try:
        import onnxruntime
    except ImportError:
        return Finding(name=name, status="missing", detail="onnxruntime cannot be imported")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        from canvasmar_rt.engines.onnxruntime_engine import GPU_COMMAND, missing_libraries

        if missing := missing_libraries():
            detail = f"this build has the CUDA provider, but not {', '.join(missing)}"
            return Finding(name=name, status="problem", detail=detail, fix=GPU_COMMAND)
        return Finding(name=name, status="ok", detail="this build has the CUDA provider")
    detail = "this build of onnxruntime has no CUDA provider"
    if gpu:
        return Finding(name=name, status="missing", detail=f"{detail}, the GPU is unused", fix=fix)
    return Finding(name=name, status="missing", detail=f"optional; {detail}", fix="")


def _nvidia() -> Finding:
    tool = shutil.which("nvidia-smi")
    query = "--query-gpu=name,driver_version,memory.total,compute_cap"
    if tool is not None:
        try:
            out = subprocess.run(
                [tool, query, "--format=csv,noheader"],
                capture_output=True,
                text=True,
                timeout=20,
                check=True,
            )
            return Finding(name="NVIDIA GPU", status="ok", detail=out.stdout.strip())
        except (OSError, subprocess.SubprocessError) as error:
            return Finding(
                name="NVIDIA GPU",
                status="problem",
                detail=f"nvidia-smi failed ({error})",
                fix="reinstall the NVIDIA driver",
            )
    return Finding(
        name="NVIDIA GPU",
        status="missing",
        detail="optional; nvidia-smi was not found, so GPU engines cannot run here",
    )
