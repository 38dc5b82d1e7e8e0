"""Checkpoints: what is written comes back, and what is broken is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from canvasmar_rt.config import AutoencoderConfig, SamplingConfig
from canvasmar_rt.errors import BundleError, CanvasMarError, ConfigError
from canvasmar_rt.models import checkpoint
from canvasmar_rt.models.canvasmar import CanvasMAR
from canvasmar_rt.models.checkpoint import (
    CONFIG_FILE,
    PROGRESS_FILE,
    RUN_FILE,
    WEIGHTS_FILE,
    load_checkpoint,
    load_state,
    save_checkpoint,
)
from canvasmar_rt.models.families import build, cast
from tests.conftest import least_config

CONFIG = least_config(
    "tiny",
    autoencoder=AutoencoderConfig(
        height=8, width=8, temporal_compression=2, latent_channels=4, widths=(8,), blocks=1
    ),
)
SAMPLING = SamplingConfig(ar_steps=3, solver="heun", temperature=4.5)
TENSOR = "spatial.mask"


@pytest.fixture
def model() -> CanvasMAR:
    made = build(CONFIG, seed=3)
    made.autoencoder.latent_mean.add_(0.25)
    return made


@pytest.fixture
def saved(tmp_path: Path, model: CanvasMAR) -> Path:
    save_checkpoint(tmp_path / "a" / "b", model, SAMPLING)
    return tmp_path / "a" / "b"


def refused(kind: type[CanvasMarError], call: Callable[[], Any]) -> str:
    """The message of the error, which is one line."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    state = load_file(directory / WEIGHTS_FILE)
    change(state)
    save_file(state, directory / WEIGHTS_FILE)


def test_round_trip(saved: Path, model: CanvasMAR) -> None:
    loaded, sampling = load_checkpoint(saved)
    assert loaded.config == CONFIG
    assert sampling == SAMPLING
    assert not loaded.training
    want = model.state_dict()
    assert loaded.state_dict().keys() == want.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, want[name]), name
    assert sorted(p.name for p in saved.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


def test_the_files_are_what_they_say(saved: Path, model: CanvasMAR) -> None:
    data = json.loads((saved / CONFIG_FILE).read_text())
    assert set(data) == {"model", "sampling"}
    assert data["model"]["dim"] == 16
    assert data["sampling"]["ar_steps"] == 3
    assert load_file(saved / WEIGHTS_FILE).keys() == model.state_dict().keys()


def test_saving_again_replaces(saved: Path) -> None:
    other = build(CONFIG, seed=4)
    save_checkpoint(saved, other, SAMPLING)
    loaded, _ = load_checkpoint(saved)
    assert torch.equal(loaded.spatial.mask, other.spatial.mask)


def test_half_precision_weights_load_as_float32(model: CanvasMAR, saved: Path) -> None:
    save_checkpoint(saved, build(CONFIG).half(), SAMPLING)
    loaded, _ = load_checkpoint(saved)
    assert {t.dtype for t in loaded.state_dict().values()} == {torch.float32}


def test_a_failed_save_leaves_the_old_checkpoint(
    saved: Path, model: CanvasMAR, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(state: dict[str, Tensor], path: str) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(saved, build(CONFIG, seed=9), SAMPLING)
    assert sorted(p.name for p in saved.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    loaded, _ = load_checkpoint(saved)
    assert torch.equal(loaded.spatial.mask, model.spatial.mask)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_missing_files(saved: Path, name: str) -> None:
    (saved / name).unlink()
    message = refused(BundleError, lambda: load_checkpoint(saved))
    assert f"no {name}" in message
    assert CONFIG_FILE in message
    assert WEIGHTS_FILE in message


def test_no_directory(tmp_path: Path) -> None:
    assert "no config.json" in refused(BundleError, lambda: load_checkpoint(tmp_path / "none"))


def test_a_run_is_told_its_last_checkpoint(tmp_path: Path, model: CanvasMAR) -> None:
    for step in (900, 1000):
        save_checkpoint(tmp_path / "run" / f"step_{step:08d}", model, SAMPLING)
    message = refused(BundleError, lambda: load_checkpoint(tmp_path / "run"))
    assert message.endswith(f"as {tmp_path / 'run' / 'step_00001000'} is")


def test_an_autoencoder_s_run_holds_no_whole_model(saved: Path) -> None:
    described = saved.parent / RUN_FILE
    for text in ('{"stage": "model"}', "{}", "[]", "{"):
        described.write_text(text)
        load_checkpoint(saved)
    described.write_text('{"stage": "autoencoder"}')
    message = refused(BundleError, lambda: load_checkpoint(saved))
    assert message.startswith(f"{saved}: only the autoencoder was trained")
    assert "training model --autoencoder" in message
    load_checkpoint(saved, whole=False)
    described.unlink()  # copied without its run
    (saved / PROGRESS_FILE).write_text('{"step": 3}')
    load_checkpoint(saved)
    (saved / PROGRESS_FILE).write_text('{"stage": "autoencoder", "step": 3}')
    refused(BundleError, lambda: load_checkpoint(saved))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop(TENSOR), [f"tensor {TENSOR} is missing"]),
        (lambda s: s.update(extra=torch.zeros(2)), ["unknown tensor extra", "configuration"]),
        (
            lambda s: s.update({TENSOR: torch.zeros(17)}),
            [f"tensor {TENSOR} has shape (17,)", "expected (16,)"],
        ),
        (
            lambda s: s.update({TENSOR: torch.zeros(1, 16)}),
            [f"tensor {TENSOR} has shape (1, 16)", "expected (16,)"],
        ),
        (
            lambda s: s[TENSOR].fill_(float("nan")),
            [f"tensor {TENSOR} holds values that are not finite", "earlier checkpoint"],
        ),
        (
            lambda s: s.update({TENSOR: s[TENSOR].half().fill_(-float("inf"))}),
            [f"tensor {TENSOR} holds values that are not finite"],
        ),
        (
            lambda s: s.update({TENSOR: torch.full((16,), 1e300, dtype=torch.float64)}),
            [f"tensor {TENSOR} holds values that are not finite"],
        ),
        (
            lambda s: s.update({TENSOR: torch.ones(16, dtype=torch.int8)}),
            [f"tensor {TENSOR} is int8", "float32"],
        ),
        (
            lambda s: s.update({TENSOR: torch.ones(16).to(torch.float8_e4m3fn)}),
            [f"tensor {TENSOR} is float8_e4m3fn"],
        ),
        (
            lambda s: s["autoencoder.latent_std"][1].zero_(),
            ["tensor autoencoder.latent_std must be above 0", "its least is 0"],
        ),
    ],
    ids=[
        "missing",
        "unknown",
        "misshapen",
        "rank",
        "nan",
        "infinite",
        "too large",
        "int8",
        "float8",
        "deviation",
    ],
)
def test_wrong_tensors_are_named(saved: Path, change: Any, words: list[str]) -> None:
    rewrite(saved, change)
    message = refused(BundleError, lambda: load_checkpoint(saved))
    assert WEIGHTS_FILE in message
    for word in words:
        assert word in message


def test_sizes_are_compared_before_memory_is_asked_for(saved: Path) -> None:
    """A hostile configuration is refused at once."""
    path = saved / CONFIG_FILE
    data = json.loads(path.read_text())
    data["model"] |= {"dim": 65536, "heads": 8192}
    path.write_text(json.dumps(data))
    assert "has shape" in refused(BundleError, lambda: load_checkpoint(saved))


def test_weights_of_another_configuration(model: CanvasMAR) -> None:
    other = CONFIG.__class__(**{**vars(CONFIG), "temporal_layers": 2})
    message = refused(BundleError, lambda: load_state(other, model.state_dict(), "here"))
    assert message.startswith("here: tensor temporal.blocks.1.")
    other = CONFIG.__class__(**{**vars(CONFIG), "action_dim": 0})
    message = refused(BundleError, lambda: load_state(other, model.state_dict(), "here"))
    assert "unknown tensor temporal.action" in message


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_cut_weights(saved: Path, keep: int) -> None:
    whole = (saved / WEIGHTS_FILE).read_bytes()
    (saved / WEIGHTS_FILE).write_bytes(whole[:keep])
    message = refused(BundleError, lambda: load_checkpoint(saved))
    assert WEIGHTS_FILE in message
    assert "cannot be read" in message


def test_weights_that_are_something_else(saved: Path) -> None:
    (saved / WEIGHTS_FILE).write_bytes(b"\x80\x04\x95" + bytes(range(256)) * 4)
    assert "cannot be read" in refused(BundleError, lambda: load_checkpoint(saved))


@pytest.mark.parametrize(
    "text",
    ["", "{", "not json", '{"model": {}}', "[]", "null", '{"model": 1, "sampling": {}}'],
)
def test_bad_configurations(saved: Path, text: str) -> None:
    (saved / CONFIG_FILE).write_text(text)
    refused(ConfigError, lambda: load_checkpoint(saved))


@pytest.mark.parametrize("text", [b"\xff\xfe{}", b"[" * 100_000])
def test_configurations_that_are_no_text_or_too_deep(saved: Path, text: bytes) -> None:
    (saved / CONFIG_FILE).write_bytes(text)
    assert "not JSON" in refused(ConfigError, lambda: load_checkpoint(saved))


def test_a_bad_value_is_named(saved: Path) -> None:
    data = json.loads((saved / CONFIG_FILE).read_text())
    data["sampling"]["solver"] = "rk4"
    (saved / CONFIG_FILE).write_text(json.dumps(data))
    message = refused(ConfigError, lambda: load_checkpoint(saved))
    assert "sampling.solver" in message
    assert "'rk4'" in message
    data["sampling"]["solver"] = "euler"
    data["model"]["depth"] = 3
    (saved / CONFIG_FILE).write_text(json.dumps(data))
    assert "'depth'" in refused(ConfigError, lambda: load_checkpoint(saved))


def test_making_a_model_leaves_the_callers_generator_alone() -> None:
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    build(least_config(), seed=1)
    assert torch.equal(torch.rand(3), want)


def test_tables_keep_their_precision_in_every_dtype() -> None:
    model = build(least_config())
    want = {name: value.clone() for name, value in model.named_buffers()}
    assert "flow.frequency" in want
    for dtype in (torch.bfloat16, torch.float16):
        found = dict(cast(build(least_config()), dtype).named_buffers())
        for name, value in want.items():
            assert torch.equal(found[name], value), name


def test_a_stage_is_that_of_the_checkpoint_wherever_one_stands(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (saved.parent / "run.json").write_text('{"stage": "autoencoder"}')
    monkeypatch.chdir(saved)
    with pytest.raises(BundleError, match="only the autoencoder was trained"):
        load_checkpoint(Path())
    (saved / "training.json").write_text('{"stage": "model"}')
    load_checkpoint(Path())
