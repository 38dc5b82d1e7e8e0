"""The C++ host draws Python's frames, and docs/embedding.md says what both do."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from filelock import FileLock

import canvasmar_rt
from canvasmar_rt.bundle import MANIFEST, PACKAGED
from canvasmar_rt.components import components
from canvasmar_rt.config import AutoencoderConfig, FlowConfig, ModelConfig
from canvasmar_rt.noise import fill_gumbel, fill_normal
from canvasmar_rt.schedule import set_sizes

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "embedding.md").read_text()
BUNDLE = "toytable-int8"
CONTEXT = 5  # pictures: three latent frames
SEED, STREAM = 2**64 - 7, 3

Run = Callable[..., subprocess.CompletedProcess[str]]


# -- the page


def rows(heading: str) -> list[list[str]]:
    """Cells of the first table after a line that starts with `heading`."""
    after = PAGE[PAGE.index(f"\n{heading}") :]
    table = re.findall(r"^\|[-|]+\|\n((?:\|.*\n)+)", after, re.M)[0]
    return [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()]


VECTORS = re.findall(r"^seed (\d+), stream (\d+), frame (\d+), purpose (\d+):$", PAGE, re.M)


@pytest.mark.parametrize("key", VECTORS)
def test_the_pages_vectors_are_the_generators(key: tuple[str, str, str, str]) -> None:
    seed, stream, frame, purpose = map(int, key)
    table = rows("seed {}, stream {}, frame {}, purpose {}:".format(*key))
    counter = np.array([0, 0, purpose, frame], np.uint64)
    words = np.random.Philox(counter=counter, key=np.array([seed, stream], np.uint64)).random_raw(6)
    assert [row[0] for row in table] == [f"`{word:016x}`" for word in words]
    for column, fill in ((1, fill_normal), (2, fill_gumbel)):
        out = np.empty((1, 6), np.float32)
        fill(out, seed=seed, streams=[stream], frame=frame, purpose=purpose)
        np.testing.assert_allclose([float(row[column]) for row in table], out[0], rtol=3e-7)


def test_the_pages_set_sizes_are_the_schedules() -> None:
    table = rows("**Sizes**")
    assert len(table) == 4
    for tokens, steps, sizes in table:
        assert sizes == ", ".join(map(str, set_sizes(int(tokens), int(steps))))


def listed(heading: str) -> dict[str, tuple[str, str]]:
    """Dtype and dimensions by name, from a table of the page."""
    return {
        name.strip("`"): (dtype, dims)
        for names, dtype, dims, _ in rows(heading)
        for name in names.split(", ")
    }


def test_the_page_lists_every_tensor() -> None:
    config = ModelConfig(
        name="letters",
        autoencoder=AutoencoderConfig(
            height=24, width=40, temporal_compression=5, latent_channels=7, widths=(8, 16), patch=1
        ),
        flow=FlowConfig(width=32), dim=176, heads=2, temporal_layers=1, canvas_layers=1,
        spatial_layers=2, encoder_layers=1, context_frames=6, action_dim=4,
    )  # fmt: skip
    letters = {24: "H", 40: "W", 5: "t", 240: "N", 60: "P", 7: "C", 176: "D", 6: "F", 4: "A"}
    letters[config.time_rotary_pairs] = "R"
    assert len(letters) == 10
    inputs, outputs = dict[str, tuple[str, str]](), dict[str, tuple[str, str]]()
    for attention in ("all", "isolated"):
        variant = dataclasses.replace(config, condition_attention=attention)
        for component in components(variant).values():
            for table, specs in ((inputs, component.inputs), (outputs, component.outputs)):
                for spec in specs:
                    name = re.sub(r"_\d+$", "_j", spec.name)
                    dims = ", ".join(letters.get(d, str(d)) for d in spec.dims)  # type: ignore
                    table[name] = spec.dtype, "in the manifest" if "state_" in name else dims
    assert listed("### Inputs") == inputs
    assert listed("### Outputs") == {k: v for k, v in outputs.items() if k not in inputs}


# -- the host


def ppm(pictures: np.ndarray) -> bytes:
    """uint8 (T, H, W, 3) as PPM images, one after the other."""
    _, height, width, _ = pictures.shape
    return b"".join(b"P6\n%d %d\n255\n" % (width, height) + x.tobytes() for x in pictures)


def pictures(data: bytes, height: int, width: int) -> np.ndarray:
    """The other way."""
    header = b"P6\n%d %d\n255\n" % (width, height)
    size = len(header) + height * width * 3
    parts = [data[i : i + size] for i in range(0, len(data), size)]
    assert all(p.startswith(header) and len(p) == size for p in parts)
    return np.stack(
        [np.frombuffer(p[len(header) :], np.uint8).reshape(height, width, 3) for p in parts]
    )


def require_toolchain(root: Path) -> None:
    """Skip where the host cannot be built; what is there but broken is for the build to tell."""
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    given = root / "include"
    places = [f"-I{p / s}" for p in (given, Path("/usr/include")) for s in ("", "onnxruntime")]
    for header, package in (
        ("onnxruntime_cxx_api.h", "libonnxruntime-dev, or set ONNXRUNTIME_ROOT to a release"),
        ("nlohmann/json.hpp", "nlohmann-json3-dev"),
        ("openssl/evp.h", "libssl-dev"),
    ):
        found = subprocess.run(
            ["c++", "-std=c++17", "-M", "-x", "c++", *places, "-"],
            input=f"#include <{header}>\n", text=True, capture_output=True, check=False,
        )  # fmt: skip
        if found.returncode:
            pytest.skip(f"{header} was not found: install {package}")


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs the host, built against the ONNX Runtime that Python has."""
    root = Path(os.environ.get("ONNXRUNTIME_ROOT", "/usr/local"))
    require_toolchain(root)
    capi = Path(onnxruntime.__file__).parent / "capi"
    libraries = list(capi.glob("libonnxruntime.so.*"))
    if not libraries:
        pytest.skip(f"{capi} holds no libonnxruntime.so: another system's onnxruntime")
    work = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        work = work.parent  # all workers share the build; the second finds nothing left to do
    work = work / "native_host"
    configure = [
        "cmake", "-S", str(ROOT / "examples" / "cpp_host"), "-B", str(work / "build"),
        f"-DONNXRUNTIME_ROOT={root}", f"-DONNXRUNTIME_LIBRARY={work / 'libonnxruntime.so'}",
        "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON",
    ]  # fmt: skip
    with FileLock(f"{work}.lock"):
        if not work.exists():
            work.mkdir()
            for name in ("libonnxruntime.so", "libonnxruntime.so.1"):  # for linker and loader
                (work / name).symlink_to(libraries[0])
        for command in (configure, ["cmake", "--build", str(work / "build")]):
            made = subprocess.run(command, capture_output=True, text=True, check=False)
            assert made.returncode == 0, made.stdout + made.stderr

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [str(work / "build" / "canvasmar_host"), *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=120, check=False
        )

    return run


@pytest.fixture(scope="session")
def demo() -> tuple[np.ndarray, np.ndarray]:
    """Pictures (33, 64, 64, 3) and the actions (16, 4) between their latent frames."""
    with np.load(ROOT / "canvasmar_rt" / "data" / "demo_toytable.npz") as data:
        return data["frames"], data["actions"].reshape(16, 4)


@pytest.fixture
def context(demo: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> Path:
    path = tmp_path / "context.ppm"
    path.write_bytes(ppm(demo[0][:CONTEXT]))
    return path


@pytest.mark.parametrize("key", VECTORS)
def test_the_hosts_noise_is_the_pages(host: Run, key: tuple[str, str, str, str]) -> None:
    table = rows("seed {}, stream {}, frame {}, purpose {}:".format(*key))
    printed = [line.split() for line in host("noise", *key).stdout.splitlines()]
    assert [row[0] for row in printed] == [row[0].strip("`") for row in table]
    np.testing.assert_allclose(
        [[float(x) for x in row[1:]] for row in printed],
        [[float(x) for x in row[1:]] for row in table],
        rtol=3e-7,
    )


@pytest.mark.parametrize(
    ("profile", "frames", "acting"),
    [
        pytest.param("default", 3, True, id="default: the whole frame as one graph"),
        pytest.param("fast", 9, True, id="fast: component graphs, past the ring's end"),
        pytest.param("fast", 2, False, id="without actions"),
    ],
)
def test_frames_are_pythons(
    host: Run, demo: tuple[np.ndarray, np.ndarray], context: Path, tmp_path: Path,
    profile: str, frames: int, acting: bool,
) -> None:  # fmt: skip
    known = (CONTEXT - 1) // 2
    actions = demo[1][: known + frames]
    more: list[object] = []
    if acting:
        np.savetxt(tmp_path / "actions.txt", actions, fmt="%.9g")
        more = ["--actions", tmp_path / "actions.txt"]
    made = {}
    for seed in (SEED, SEED + 1):
        out = tmp_path / f"{seed}.ppm"
        done = host(
            PACKAGED / BUNDLE, context, out, "--frames", frames, "--profile", profile,
            "--seed", seed, "--stream", STREAM, *more,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        made[seed] = pictures(out.read_bytes(), 64, 64).astype(int)
    rollout = canvasmar_rt.load(BUNDLE, profile=profile).start(
        demo[0][:CONTEXT], seed=SEED, stream=STREAM, actions=actions[:known] if acting else None
    )
    steps = [rollout.step(actions[known + i] if acting else None) for i in range(frames)]
    want = np.concatenate([step.frames[0] for step in steps]).astype(int)
    difference = np.abs(made[SEED] - want).reshape(2 * frames, -1)
    report = f"{profile}: largest of each picture {difference.max(1)}, mean {difference.mean():.5f}"
    print(report)
    assert difference.max() <= 1, report
    assert np.abs(made[SEED + 1] - want).max() > 20


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A bundle to spoil."""
    return shutil.copytree(PACKAGED / BUNDLE, tmp_path / "bundle")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda b: shutil.rmtree(b), "canvasmar_config.json: not found; give the folder"),
        (lambda b: edit(b, '"schema_version": 2', '"schema_version": 1'), "schema version 1"),
        (lambda b: edit(b, "{", "", 1), "canvasmar_host: manifest: "),
        (lambda b: edit(b, '"README.md"', '"../README.md"'), "../README.md lies outside"),
        (lambda b: (b / "frame.onnx").unlink(), "frame.onnx is missing; copy or export"),
        (lambda b: (b / "README.md").write_text("?"), "README.md does not match its hash"),
        (lambda b: flip(b / "flow" / "model.safetensors"), "model.safetensors does not match its"),
        (
            lambda b: edit(b, '"family": "canvasmar"', '"family": "unified"'),
            "draws single frames of CanvasMAR",
        ),
        (lambda b: options(b, solver="rk4"), "solver must be euler, heun or ab2, got \"rk4\""),
        (lambda b: options(b, order="raster"), "order must be motion, maskgit or random"),
        (lambda b: options(b, ar_steps=0), "ar_steps must be a whole number from 1 to 1000, got 0"),
        (lambda b: options(b, ar_steps=1.5), "ar_steps must be a whole number"),
        (lambda b: options(b, ar_steps=2**40), "ar_steps must be a whole number"),
        (lambda b: options(b, ar_steps=65), "ar_steps must be at most the tokens of a frame, 64"),
        (lambda b: options(b, flow_steps=0), "flow_steps must be a whole number"),
        (lambda b: options(b, flow_temperature=[1, 0.5]), "flow_temperature must be [1, 1]"),
        (lambda b: options(b, frame_noise=-1), "frame_noise must be a number from 0 to 1, got -1"),
        (lambda b: options(b, canvas_guidance=1e5), "canvas_guidance must be a number from 0 to"),
        (lambda b: dims(b, "flow", "flow_noise", ["B", 128, 32]), "tensors of flow are not its"),
        (lambda b: dims(b, "temporal", "time", [2, 2**40]), "tensors of temporal are not its"),
        (lambda b: unlist(b, "canvas", "staticness"), "tensors of canvas are not its graph's"),
        (lambda b: unlist(b, "temporal", "new_key_0"), "tensors of temporal are not its graph's"),
        (lambda b: unlist(b, "frame", "new_key_0", fast=None), "tensors of frame are not its"),
        (lambda b: edit(b, '"dtype": "float32"', '"dtype": "float64"', 1), "float32 or float16"),
        (lambda b: dims(b, "encoder", "frames", ["B"]), "shape of encoder's frames makes no sense"),
        (lambda b: dims(b, "flow", "flow_noise", ["B"]), "shape of flow's flow_noise"),
        (lambda b: dims(b, "temporal", "cache_bias", ["B", 0]), "shape of temporal's cache_bias"),
    ],
)  # fmt: skip
def test_a_spoilt_bundle_is_refused(
    host: Run,
    copy: Path,
    context: Path,
    tmp_path: Path,
    spoil: Callable[[Path], None],
    message: str,
) -> None:
    spoil(copy)
    done = host(copy, context, tmp_path / "out.ppm", "--frames", 1)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def options(bundle: Path, **changed: object) -> None:
    """The profile that is taken, with other options."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["fast"] |= changed
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def dims(bundle: Path, component: str, name: str, wanted: list[object]) -> None:
    """An input of another shape."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    inputs = manifest["components"][component]["inputs"]
    next(entry for entry in inputs if entry["name"] == name)["dims"] = wanted
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def unlist(bundle: Path, component: str, name: str, **changed: object) -> None:
    """An output that is not listed."""
    manifest = json.loads((bundle / MANIFEST).read_text()) | changed
    outputs = manifest["components"][component]["outputs"]
    outputs.remove(next(entry for entry in outputs if entry["name"] == name))
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def edit(bundle: Path, old: str, new: str, count: int = -1) -> None:
    text = (bundle / MANIFEST).read_text()
    assert old in text
    (bundle / MANIFEST).write_text(text.replace(old, new, count))


def flip(path: Path) -> None:
    """Change one byte and keep the size."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--profile", "slow"), "no profile slow; this bundle has default and fast"),
        (("--seed", "-1"), "--seed: expected a whole number, got '-1'"),
        (("--frames", "2", "--actions", "actions.txt"), "2 for the context and 2 for the predict"),
        (("--actions", "nowhere.txt"), "nowhere.txt: cannot be read"),
        (("--threads", "0"), "--threads: expected 1 to 1024, got 0; leave it out"),
        (("--threads", "1025"), "--threads: expected 1 to 1024, got 1025"),
        (("--threads", "-1"), "--threads: expected a whole number, got '-1'"),
        (("--threads", "two"), "--threads: expected a whole number, got 'two'"),
        (("--frames", str(2**64 - 1), "--actions", "actions.txt"), "2 for the context and 1844"),
        (("--frames", "1", "--actions", "endless.txt"), "endless.txt: line 2 should hold 4"),
        (("--frames", "1", "--actions", "words.txt"), "words.txt: line 1 should hold 4"),
        (("--frames", "1", "--actions", "nul.txt"), "nul.txt: line 1 should hold 4"),
        (("--frames", "1", "--actions", "gap.txt"), "gap.txt: line 2 should hold 4"),
    ],
)
def test_a_mistake_is_named(
    host: Run, context: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    change: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("actions.txt").write_text("0 0 0 0\n")
    Path("endless.txt").write_text("0 0 0 0\n0 0 0 1e999\n0 0 0 0\n")
    Path("words.txt").write_text("0 0 0 0 -\n" * 3)
    Path("nul.txt").write_text("0 0 0 \0\n" * 3)
    Path("gap.txt").write_text("0 0 0 0\n\n0 0 0 0\n0 0 0 0\n")
    Path("out.ppm").write_text("before")
    done = host(PACKAGED / BUNDLE, context, "out.ppm", *change)
    assert done.returncode == 1
    assert message in done.stderr
    assert Path("out.ppm").read_text() == "before"
    assert not list(tmp_path.glob("*.part"))


def test_an_output_is_refused_before_the_work(host: Run, context: Path, copy: Path) -> None:
    """Where it cannot be written, or would take a place in the bundle."""
    weights = copy / "flow" / "model.safetensors"
    before = weights.read_bytes()
    for out, message in (
        (weights, "model.safetensors: lies in the bundle"),
        (copy / "new.ppm", "new.ppm: lies in the bundle"),
        (copy.parent / "nowhere" / "x.ppm", "x.ppm: cannot be written"),
    ):
        done = host(copy, context, out, "--frames", 10**9)
        assert (done.returncode, message in done.stderr) == (1, True), done.stderr
    assert weights.read_bytes() == before


def test_pictures_go_through_a_pipe(host: Run, context: Path, tmp_path: Path) -> None:
    pipe, made = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: made.append(pipe.read_bytes()))
    reader.start()
    done = host(PACKAGED / BUNDLE, context, pipe, "--frames", 1)
    reader.join(timeout=30)
    assert done.returncode == 0, done.stderr
    assert pictures(made[0], 64, 64).shape == (2, 64, 64, 3)
    done = host(PACKAGED / BUNDLE, context, "/dev/stdout", "--frames", 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("P6\n64 64\n255\n")
    assert "1 latent frames" in done.stderr


def test_a_link_stays_one(host: Run, context: Path, tmp_path: Path) -> None:
    real, link = tmp_path / "real.ppm", tmp_path / "link.ppm"
    real.touch()
    link.symlink_to(real)
    done = host(PACKAGED / BUNDLE, context, link, "--frames", 1)
    assert done.returncode == 0, done.stderr
    assert link.is_symlink()
    assert pictures(real.read_bytes(), 64, 64).shape == (2, 64, 64, 3)


def test_empty_lines_may_end_the_actions(host: Run, context: Path, tmp_path: Path) -> None:
    (tmp_path / "actions.txt").write_text("0 0 0 0\n" * 3 + "\n \n")
    more = ("--frames", 1, "--actions", tmp_path / "actions.txt")
    done = host(PACKAGED / BUNDLE, context, tmp_path / "out.ppm", *more)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("same", ["context.ppm", "./context.ppm", "linked.ppm", "actions.txt"])
def test_an_input_is_never_overwritten(
    host: Run, context: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("actions.txt").write_text("0 0 0 0\n" * 3)
    Path("linked.ppm").symlink_to(context)
    before = Path(same).read_bytes()
    more = ("--frames", 1, "--actions", "actions.txt")
    done = host(PACKAGED / BUNDLE, "context.ppm", same, *more)
    assert done.returncode == 1
    assert f"{same}: is an input; give another output" in done.stderr
    assert Path(same).read_bytes() == before
    context.rename("out.ppm.part")
    done = host(PACKAGED / BUNDLE, "out.ppm.part", "out.ppm")
    assert done.returncode == 1
    assert "out.ppm.part: is an input" in done.stderr


def test_threads_reach_the_graphs(host: Run, context: Path, tmp_path: Path) -> None:
    """As many as Linux counts in the process, of which each graph has some of its own."""
    most = {}
    for threads in (1, 3):
        command = (PACKAGED / BUNDLE, context, tmp_path / "out.ppm", "--frames", 8)
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(host, *command, "--threads", threads)
            counts = {0}
            while not done.done():
                counts.add(threads_of_host())
                time.sleep(0.005)
        assert done.result().returncode == 0, done.result().stderr
        most[threads] = max(counts)
    if not any(most.values()):
        pytest.skip("this system does not tell a process's threads")
    assert most[3] - most[1] >= 3 * 2  # of encoder, temporal and decoder at least


def threads_of_host() -> int:
    """Threads of the host that this process has started; 0 where there is nothing to be seen."""
    with contextlib.suppress(OSError):  # it may end meanwhile
        for task in Path("/proc/self/task").iterdir():
            for child in (task / "children").read_text().split():
                if Path("/proc", child, "comm").read_text() == "canvasmar_host\n":
                    return len(os.listdir(f"/proc/{child}/task"))
    return 0


@pytest.mark.parametrize(
    ("shape", "message"),
    [((4, 64, 64, 3), "holds 4 images; 1 + n*2 are needed"), ((1, 32, 64, 3), "images of 64x64")],
)
def test_a_wrong_context_is_named(
    host: Run, tmp_path: Path, shape: tuple[int, ...], message: str
) -> None:
    (tmp_path / "context.ppm").write_bytes(ppm(np.zeros(shape, np.uint8)))
    done = host(PACKAGED / BUNDLE, tmp_path / "context.ppm", tmp_path / "out.ppm")
    assert done.returncode == 1
    assert message in done.stderr
