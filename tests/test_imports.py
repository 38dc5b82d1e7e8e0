"""The runtime imports, loads and predicts with torch and onnx out of reach."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

BLOCKED = """
import importlib.abc, pkgutil, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "onnx", "onnxscript", "scipy"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
"""

IMPORT_ALL = """
import canvasmar_rt
import canvasmar_rt.benchmarks.latency, canvasmar_rt.engines.onnxruntime_engine
for module in pkgutil.iter_modules(canvasmar_rt.__path__):
    if module.name not in ("models", "__main__"):
        importlib.import_module(f"canvasmar_rt.{module.name}")
print(*sorted(m for m in sys.modules if m.startswith("canvasmar_rt")))
"""


def run(code: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCKED + code, *arguments],
        cwd=cwd, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_every_runtime_module_imports(tmp_path: Path) -> None:
    done = run("import importlib" + IMPORT_ALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("rollout", "cli", "verify", "video", "predict", "doctor"):
        assert f"canvasmar_rt.{name}" in done.stdout.split()


def test_the_demo_runs(tmp_path: Path) -> None:
    done = run("from canvasmar_rt.cli import main; main()", "demo", "--quiet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made = {p.name for p in tmp_path.iterdir()}
    assert made == {"canvasmar_demo.mp4", "canvasmar_demo_sheet.png"}


def test_nothing_is_kept_of_a_run_and_nobody_is_told(tmp_path: Path) -> None:
    """Of ONNX Runtime's telemetry: no device id in the home directory, no thread that reports."""
    home = tmp_path / "home"
    home.mkdir()
    code = """
import os
import canvasmar_rt
canvasmar_rt.load("toytable-int8", threads=1).start().step()
print(os.environ["ORT_DISABLE_TELEMETRY"], len(os.listdir("/proc/self/task")))
"""
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment | {"HOME": str(home)}, cwd=tmp_path,
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert done.stdout.split()[0] == "1"
    assert not list(home.iterdir())


def test_training_says_what_it_needs() -> None:
    for module in ("training", "training.evaluation"):
        code = f"import runpy; runpy.run_module({module!r}, run_name='__main__')"
        done = run(code, "--help", cwd=Path(__file__).resolve().parents[1])
        assert done.returncode == 2
        assert "torch is blocked" in done.stderr
        assert 'pip install -e ".[train]"' in done.stderr
        assert "Traceback" not in done.stderr


def test_what_needs_torch_says_so(tmp_path: Path) -> None:
    for command in (
        ["demo", "--engine", "torch"],
        ["bench", "--baseline", "eager"],
    ):
        done = run("from canvasmar_rt.cli import main; main()", *command, cwd=tmp_path)
        assert done.returncode == 2
        assert "canvasmar-rt[export]" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_gpu_command_says_what_it_needs(tmp_path: Path) -> None:
    code = "import runpy; runpy.run_module('canvasmar_rt.benchmarks.gpu', run_name='__main__')"
    done = run(code, "--help", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the GPU benchmarks need PyTorch: pip install")
    assert len(done.stderr.strip().splitlines()) == 1


def test_what_needs_ray_says_so(tmp_path: Path) -> None:
    code = (
        "import runpy; sys.modules['ray'] = None; "
        "runpy.run_module('canvasmar_rt.cluster', run_name='__main__')"
    )
    done = run(code, "--help", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert 'pip install "canvasmar-rt[cluster]"' in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
