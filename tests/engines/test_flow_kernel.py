"""The flow kernel against `FlowGraph`, in Triton's interpreter.

Triton decides for its interpreter when it is imported. So as not to change it for other tests,
this file's tests of results run in a pytest of their own, which `test_in_the_interpreter` starts.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import canvasmar_rt
from canvasmar_rt.bundle import Bundle
from canvasmar_rt.config import FlowConfig, SamplingConfig
from canvasmar_rt.errors import EngineError
from canvasmar_rt.models.canvasmar import CanvasMAR
from canvasmar_rt.models.families import build, cast
from canvasmar_rt.models.graphs import FlowGraph
from canvasmar_rt.schedule import flow_plan
from tests.conftest import small_config

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BUNDLE = "CANVASMAR_RT_TEST_BUNDLE"
"""Names the bundle for the tests in the interpreter."""

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="run by test_in_the_interpreter, in a process of its own"
)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def make(*, channels: int = 4, **flow: Any) -> CanvasMAR:
    """A small model whose biases and norm weights are not their initial zeros and ones."""
    config = small_config(flow=FlowConfig(**{"width": 32, "blocks": 2, **flow}))
    ae = dataclasses.replace(config.autoencoder, latent_channels=channels)
    model = build(dataclasses.replace(config, autoencoder=ae), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.flow.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def inputs(
    model: CanvasMAR,
    *,
    solver: str = "euler",
    steps: int = 2,
    branches: int = 3,
    batch: int = 2,
    tokens: int = 3,
) -> dict[str, torch.Tensor]:
    """Random inputs of the flow component for sets of `tokens` tokens."""
    plan = flow_plan(SamplingConfig(flow_steps=steps, solver=solver))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(tokens)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    n, c = model.config.tokens, model.config.autoencoder.latent_channels
    order = torch.stack([torch.randperm(n, generator=generator) for _ in range(batch)])
    return {
        "z_tokens": random(branches, batch, tokens, model.config.dim),
        "select_index": order[:, :tokens],
        "flow_noise": random(batch, n, c),
        "partial": random(batch, n, c),
        "flow_time": torch.from_numpy(plan.time),
        "step_new": torch.from_numpy(plan.step_new),
        "step_old": torch.from_numpy(plan.step_old),
        "branch_weight": torch.tensor([-0.2, -0.3, 1.5])[-branches:],
    }


def plain(model: CanvasMAR, t: dict[str, torch.Tensor]) -> torch.Tensor:
    graph = FlowGraph(model)
    with torch.inference_mode():
        return graph(*(t[s.name] for s in graph.component.inputs))[0]


def kernel(model: CanvasMAR, t: dict[str, torch.Tensor], **options: Any) -> Any:
    """A flow kernel whose scratch has never been written."""
    from canvasmar_rt.engines.flow_kernel import FlowKernel

    branches, batch, tokens, _ = t["z_tokens"].shape
    sizes = {"tokens": batch * tokens, "branches": branches, "evaluations": len(t["flow_time"])}
    made = FlowKernel(model.flow, **{**sizes, **options})
    for value in vars(made).values():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value.fill_(torch.nan)
    return made


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "joint, euler": ({}, {}),
    "additive, ab2, one branch": (
        {"modulation": "additive"}, {"solver": "ab2", "steps": 3, "branches": 1, "tokens": 5},
    ),
    "joint, heun, one token": ({}, {"solver": "heun", "batch": 1, "tokens": 1}),
    "additive, one block": ({"modulation": "additive", "blocks": 1}, {"steps": 3}),
    "width and channels not powers of two": ({"width": 40, "channels": 5}, {"tokens": 7}),
    "wider than a tile": ({"width": 72, "modulation": "additive"}, {"batch": 1}),
}  # fmt: skip


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_float32_equals_the_component(case: str) -> None:
    model = make(**CASES[case][0])
    t = inputs(model, **CASES[case][1])
    with torch.inference_mode():
        got = kernel(model, t).component(t)
    want = plain(model, t)
    assert relative(got, want) < 1e-6
    assert relative(got - t["partial"], want - t["partial"]) < 2e-6


@interpreted
def test_rollouts_share_the_packed_weights() -> None:
    """And they go with the model."""
    model = make()
    t = inputs(model)
    one, two = kernel(model, t), kernel(model, t)
    assert one.weights is two.weights
    assert kernel(make(), t).weights is not one.weights
    gone = weakref.ref(model.flow)
    del model, one, two
    gc.collect()
    assert gone() is None


@interpreted
def test_sets_share_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller set after a larger one, a table that holds two evaluations of the larger one, and
    fewer programs than tiles."""
    from canvasmar_rt.engines import flow_kernel

    model = make()
    large, small = (inputs(model, tokens=s, steps=3, batch=1, branches=2) for s in (5, 2))
    monkeypatch.setattr(flow_kernel, "TABLE_BYTES", 2 * 2 * 5 * (3 * 2 + 2) * 32 * 4)
    flow = kernel(model, large, programs=2)
    for t in (large, small, large):
        with torch.inference_mode():
            assert relative(flow.component(t), plain(model, t)) < 1e-6


@interpreted
@pytest.mark.parametrize("modulation", ["joint", "additive"])
def test_a_persistent_launch_is_the_same(modulation: str) -> None:
    """One program does all tiles of all stages."""
    model = make(modulation=modulation, width=40)
    t = inputs(model, solver="ab2", batch=1, branches=2)
    with torch.inference_mode():
        staged, persistent = (
            kernel(model, t, mode=mode).component(t) for mode in ("staged", "persistent")
        )
    assert relative(persistent, plain(model, t)) < 1e-6
    torch.testing.assert_close(persistent, staged, rtol=0, atol=0)


@interpreted
def test_small_tiles_fit_together() -> None:
    from canvasmar_rt.engines.flow_kernel import Tiles

    model = make(width=40)
    t = inputs(model, batch=1, tokens=7)  # 21 rows in tiles of 16, 40 columns in three
    flow = kernel(model, t)
    index = t["select_index"]
    x = torch.gather(t["flow_noise"], 1, index[..., None].expand(-1, -1, 4))
    with torch.inference_mode():
        flow.flow_tokens(
            x,
            model.flow.embed_condition(t["z_tokens"]),
            model.flow.embed_time(t["flow_time"]),
            t["step_new"],
            t["step_old"],
            t["branch_weight"],
            out=x,
            using=Tiles(rows=16, columns=16, depth=16),
        )
    want = torch.gather(plain(model, t), 1, index[..., None].expand(-1, -1, 4))
    assert relative(x, want) < 1e-6


@interpreted
def test_its_figures_say_how_far_it_is_from_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    from canvasmar_rt.benchmarks import gpu

    model, sampling = make(blocks=1), SamplingConfig(ar_steps=3, flow_steps=2)
    monkeypatch.setattr(gpu, "network", lambda *_: model)
    monkeypatch.setattr(gpu, "preset", lambda _: (model.config, sampling))
    monkeypatch.setattr(gpu, "TILES", ((16, 16, 4, 2),))
    found = gpu.flow_heads(torch.device("cpu"), lambda: 60.0, ["small"])
    assert [report["tokens"] for report in found] == [3, 8]
    for report in found:
        assert report["rows"] == 3 * report["tokens"]
        assert len(report["us_an_evaluation"]) == 4
        assert min(report["us_an_evaluation"].values()) > 0
        assert 0 < max(report["difference"].values()) < 1e-6
    (late, _) = gpu.flow_heads(torch.device("cpu"), lambda: -1.0, ["small"])
    assert late["us_an_evaluation"] == {}
    assert "time" in late["skipped"]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("modulation", ["joint", "additive"])
def test_half_precision_is_as_near_as_the_component(
    dtype: torch.dtype, modulation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the same rounded weights computed in float32."""
    if dtype == torch.bfloat16:
        multiply_bfloat16(monkeypatch)
    half = cast(make(modulation=modulation), dtype)
    exact = cast(make(modulation=modulation), dtype).float()
    t = inputs(half, batch=1)
    t["z_tokens"] = t["z_tokens"].to(dtype)
    want = plain(exact, t | {"z_tokens": t["z_tokens"].float()})
    with torch.inference_mode():
        got = kernel(half, t).component(t)
    drawn = (want != t["partial"]).any(-1)
    error = relative(got[drawn], want[drawn])
    assert error < {torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
    assert error < 2 * relative(plain(half, t)[drawn], want[drawn])


def multiply_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter (3.7 to 3.9) keeps bfloat16 as uint16 and multiplies matrices of these
    bits as if they were numbers: give it a product of the values."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def values(handle: Any) -> np.ndarray:
        assert handle.dtype.scalar == tl.bfloat16
        bits: np.ndarray = handle.data.astype(np.uint32) << 16
        return bits.view(np.float32)

    def dot(_: object, a: Any, b: Any, total: Any, *rest: object) -> Any:
        return TensorHandle(values(a) @ values(b) + total.data, total.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)


@interpreted
def test_a_rollout_with_the_kernel_is_the_same() -> None:
    sampling = SamplingConfig(ar_steps=2, flow_steps=2)
    with_kernel, without = (
        canvasmar_rt.load(os.environ[BUNDLE], engine="torch", flow_kernel=on).start(
            seed=11, sampling=sampling
        )
        for on in (True, False)
    )
    for _ in range(2):  # the first without a canvas, the second with every branch
        got, want = with_kernel.step(), without.step()
        np.testing.assert_array_equal(got.order, want.order)
        assert relative(torch.from_numpy(got.latent), torch.from_numpy(want.latent)) < 1e-4
    assert want.canvas is not None


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter(bundles: Callable[[str], Bundle]) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", BUNDLE: str(bundles("expert").path)}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "17 passed" in done.stdout, done.stdout


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("additive", [False, True])
def test_compiles_for_hopper(
    additive: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensor core instructions for the products and a barrier that orders memory; Triton brings
    the assembler, so this needs no GPU."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from canvasmar_rt.engines.flow_kernel import _stages

    constants = {
        "ADDITIVE": additive, "WIDTH": 128, "BLOCKS": 2, "CHANNELS": 16, "BRANCHES": 3,
        "ROW": 128, "GROUP": 16, "BM": 64, "BN": 64, "BK": 64, "LOADS": 3,
        "PRODUCTS": True, "ROWS": True,
    }  # fmt: skip
    half = ("ua", "table", "time", "embed", "mlps", "out")
    integers = ("first", "last", "evaluations", "tokens")
    kinds = dict.fromkeys(half, "*bf16") | dict.fromkeys(integers, "i32") | {"barrier": "*i32"}
    kinds |= dict.fromkeys(constants, "constexpr")
    names = _stages.arg_names
    source = ASTSource(
        fn=_stages,
        signature={name: kinds.get(name, "*fp32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if kinds.get(name, "*").startswith("*")
        },
    )
    made = triton.compile(
        source,
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 4, "enable_fp_fusion": True, "launch_cooperative_grid": True},
    )
    assert made.asm["cubin"]
    for instruction in ("wgmma.mma_async", "cp.async.cg", "gpu.release", "gpu.acquire"):
        assert instruction in made.asm["ptx"], instruction


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes the CPU")
def test_refused_with_a_reason(
    bundles: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    from canvasmar_rt.engines.flow_kernel import supported

    wide = small_config(flow=FlowConfig(width=8192))
    assert "8192" in str(supported(wide, torch.device("cuda")))
    path = bundles("expert").path
    assert canvasmar_rt.load(path, engine="torch").engine.flow_kernel is None  # type: ignore[attr-defined]
    with pytest.raises(EngineError, match="runs on CUDA; the device is cpu"):
        canvasmar_rt.load(path, engine="torch", flow_kernel=True)
    with pytest.raises(EngineError, match="set flow_kernel too"):
        canvasmar_rt.load(path, engine="torch", flow_persistent=True)
    with pytest.raises(EngineError, match="no option flow_kernel"):
        canvasmar_rt.load(path, engine="onnxruntime", flow_kernel=True)
    monkeypatch.delitem(sys.modules, "canvasmar_rt.engines.flow_kernel")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(EngineError, match="pip install triton"):
        canvasmar_rt.load(path, engine="torch", flow_kernel=True)
