"""Write type stubs of TensorRT's Python API, on a machine with neither TensorRT nor a GPU.

    python scripts/tensorrt_stubs.py VERSION FOLDER

The wheel `tensorrt-cu13-bindings` on PyPI holds the compiled bindings without the libraries behind
them. They load when libraries of the right names define the functions they name; then their
docstrings say every signature. The wheel is NVIDIA's: the stubs belong in a temporary folder, not
in a repository. Needs pip with a package index, and cc, nm and readelf. Fails with a message rather
than write stubs that lack anything.
"""

from __future__ import annotations

import ast
import ctypes
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

NEEDED = {
    "Builder",
    "OnnxParser",
    "Runtime",
    "ICudaEngine",
    "IExecutionContext",
    "IProgressMonitor",
}

MAY_FAIL = {
    "build_serialized_network", "create_execution_context", "create_timing_cache",
    "deserialize_cuda_engine", "get_timing_cache",
}  # fmt: skip
"""Methods that return None where there is nothing to return, which the signatures do not say."""


def fail(message: str) -> NoReturn:
    sys.exit(f"tensorrt_stubs: {message}")


def output(*command: str, **environment: str) -> str:
    """Standard output of a command that has to succeed."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, **environment}, check=False
        )
    except FileNotFoundError:
        fail(f"{command[0]} is not installed")
    if done.returncode:
        fail(f"{' '.join(command)}\n{done.stderr.strip()}")
    return done.stdout


def install(folder: Path, *packages: str) -> Path:
    output(sys.executable, "-m", "pip", "install", "-q", "--target", str(folder), *packages)
    return folder


def hollow_libraries(bindings: Path, folder: Path) -> Path:
    """Libraries that define what the bindings want from TensorRT and do nothing."""
    here = ctypes.CDLL(None)
    undefined = re.findall(r" U (\w+)$", output("nm", "-D", str(bindings)), re.MULTILINE)
    missing = [name for name in undefined if not hasattr(here, name)]
    wanted = re.findall(r"\[(libnv\w+\.so\.\d+)\]", output("readelf", "-d", str(bindings)))
    if not missing or not wanted:
        fail(f"{bindings.name} is not built as expected: no libraries or functions it lacks")
    folder.mkdir()
    source = folder / "hollow.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in missing))
    for library in wanted:
        output("cc", "-w", "-shared", "-fPIC", "-o", str(folder / library), str(source))
    return folder


class Tidy(ast.NodeTransformer):
    """What stubgen writes, as mypy can read it."""

    def visit_Module(self, node: ast.Module) -> ast.Module:
        self.generic_visit(node)
        # constants named like Python's own types, `bool` above all, would hide those
        node.body = [n for n in node.body if not isinstance(n, ast.AnnAssign)]
        if missing := NEEDED - {n.name for n in node.body if isinstance(n, ast.ClassDef)}:
            fail(f"the bindings do not have {', '.join(sorted(missing))}")
        node.body += ast.parse("__version__: str").body
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        self.generic_visit(node)
        if node.name == "IHostMemory":  # the buffer protocol does not show in docstrings
            node.body += ast.parse("def __buffer__(self, f: int, /) -> memoryview: ...").body
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            if argument.arg == "self":
                argument.annotation = None
            elif argument.annotation is not None:
                argument.annotation = unknown_is_any(argument.annotation)
        if node.returns is not None:
            node.returns = unknown_is_any(node.returns)
            if node.name in MAY_FAIL:
                node.returns = ast.BinOp(node.returns, ast.BitOr(), ast.Constant(None))
        node.body = [ast.Expr(ast.Constant(...))]
        return node


def unknown_is_any(annotation: ast.expr) -> ast.expr:
    """C++ types that have no Python name come out as an ellipsis."""
    if isinstance(annotation, ast.Constant) and annotation.value is ...:
        return ast.parse("typing.Any", mode="eval").body
    return annotation


def parsed(text: str) -> ast.Module:
    """Signatures that are not Python (an argument called `in`) become ones that take anything."""
    lines = text.splitlines()
    while True:
        try:
            return ast.parse("\n".join(lines))
        except SyntaxError as error:
            line = lines[(error.lineno or 1) - 1]
            head = re.match(r"\s*def \w+(?=\()", line)
            if head is None or "**_" in line:
                fail(f"cannot read {line!r}: {error}")
            anything = "(*_: typing.Any, **__: typing.Any) -> typing.Any:"
            lines[(error.lineno or 1) - 1] = head.group() + anything


def main(version: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        wheel = f"tensorrt-cu13-bindings=={version}"
        package = install(work / "bindings", "--no-deps", wheel)
        tools = install(work / "tools", "pybind11-stubgen")
        found = list(package.glob("*/tensorrt.so"))
        if len(found) != 1:
            fail(f"{wheel} holds {len(found)} files tensorrt.so instead of one")
        module = f"{found[0].parent.name}.tensorrt"
        output(
            sys.executable, "-m", "pybind11_stubgen", "--ignore-all-errors",
            "-o", str(work / "raw"), module,
            PYTHONPATH=f"{package}{os.pathsep}{tools}",
            LD_LIBRARY_PATH=str(hollow_libraries(found[0], work / "libraries")),
        )  # fmt: skip
        raw = work / "raw" / f"{module.replace('.', '/')}.pyi"
        if not raw.is_file():
            fail(f"pybind11-stubgen wrote no {raw.name}")
        text = raw.read_text().replace(f"{module}.", "")
    stubs = ast.unparse(ast.fix_missing_locations(Tidy().visit(parsed(text))))
    target = folder / "tensorrt"
    target.mkdir(parents=True, exist_ok=True)
    # the stubs themselves are not strictly typed; only code that uses them is to be checked
    (target / "__init__.pyi").write_text(f"# mypy: ignore-errors\n{stubs}\n")
    (target / "py.typed").touch()
    print(f"stubs of TensorRT {version} in {target}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        fail("python scripts/tensorrt_stubs.py VERSION FOLDER")
    main(sys.argv[1], Path(sys.argv[2]))
