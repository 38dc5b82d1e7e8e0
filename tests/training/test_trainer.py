"""The training loop: what it optimises, and that a run can be stopped and taken up anywhere."""

from __future__ import annotations

import gc
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)
from torch import Tensor, nn

from canvasmar_rt.bundle import Bundle, resolve
from canvasmar_rt.errors import BundleError, ConfigError, InputError, StateError
from canvasmar_rt.models import sampler
from canvasmar_rt.models.checkpoint import RUN_FILE, load_checkpoint
from tests.training.small_runs import (
    ONE,
    STAGES,
    Waves,
    autoencoder_stage,
    history_stage,
    logged,
    model_stage,
    trainer,
)
from training.clips import Clips, LatentClips
from training.config import ModelTraining, RunConfig
from training.losses import Draws
from training.trainer import (
    PROGRESS_FILE,
    STATE_FILE,
    Average,
    Muon,
    Ranks,
    Trainer,
    find_checkpoints,
    latest_checkpoint,
    learning_rate_factor,
    load_weights,
    make_optimizers,
)

ROOT = Path(__file__).resolve().parents[2]
Saved = dict[str, Tensor]


def saved(directory: Path, step: int) -> Saved:
    return load_file(directory / f"step_{step:08d}" / STATE_FILE)


def assert_same(a: Saved, b: Saved) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir() if "step_" in p.name)


# Parts


def test_learning_rate_warms_up_stays_and_falls() -> None:
    config = RunConfig(steps=10, batch=1, warmup_steps=3, decay_steps=4)
    found = [learning_rate_factor(config, step) for step in range(10)]
    expected = [0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    np.testing.assert_allclose(found, expected)
    assert learning_rate_factor(config, 10) == 0
    steady = RunConfig(steps=10, batch=1, warmup_steps=0)
    assert {learning_rate_factor(steady, step) for step in range(20)} == {1.0}


def test_average_is_the_loop() -> None:
    module = nn.Linear(3, 2)
    average = Average(module, 0.9)
    expected = {n: p.detach().double().numpy().copy() for n, p in module.named_parameters()}
    for step in range(120):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn_like(p))
        average.update(module, step)
        decay = min(0.9, (1 + step) / (10 + step))
        for name, p in module.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach().double().numpy()
    for name, value in expected.items():
        np.testing.assert_allclose(average.shadow[name], value, atol=1e-5)


def test_averaged_weights_are_put_back() -> None:
    module = nn.Linear(3, 2)
    average = Average(module, 0.5)
    with torch.no_grad():
        module.weight.add_(1)
    own = module.weight.detach().clone()
    average.shadow["bias"] = torch.ones(2)
    found = []
    with average.applied(module):
        found.append(module.weight.detach().clone())
        assert module.bias.tolist() == [1, 1]
    assert torch.equal(found[0], average.shadow["weight"])
    assert torch.equal(module.weight, own)
    with pytest.raises(ZeroDivisionError), average.applied(module):
        module.weight.grad = module.weight / (1 // 0)
    assert torch.equal(module.weight, own)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("name", STAGES)
def test_every_weight_has_one_optimizer(name: str, optimizer: str) -> None:
    loss = STAGES[name](optimizer=optimizer, weight_decay=0.1).loss
    optimizers = make_optimizers(loss, STAGES[name](optimizer=optimizer, weight_decay=0.1).config)
    names = {id(p): n for n, p in loss.named_parameters() if p.requires_grad}
    held = [
        (owner, names[id(p)], group["weight_decay"], p.ndim)
        for owner, o in optimizers.items()
        for group in o.param_groups
        for p in (o.whole if isinstance(o, Muon) else group["params"])
    ]
    assert sorted(n for _, n, _, _ in held) == sorted(names.values())
    for owner, parameter, decay, ndim in held:
        assert decay == (0.1 if ndim >= 2 else 0.0), parameter
        hidden = (
            re.search(r"blocks\.\d+\.(attn|mlp|qkv|out)\..*weight", parameter)
            if name != "autoencoder"
            else re.search(r"conv.*\.weight", parameter)
        )
        assert owner == ("muon" if optimizer == "muon" and hidden else "adamw"), parameter
    assert ("muon" in optimizers) == (optimizer == "muon")
    assert {group["betas"] for group in optimizers["adamw"].param_groups} == {(0.9, 0.95)}


def test_muon_treats_a_convolution_as_a_matrix() -> None:
    torch.manual_seed(0)
    conv, matrix = nn.Conv2d(3, 4, 3, bias=False), nn.Linear(27, 4, bias=False)
    with torch.no_grad():
        matrix.weight.copy_(conv.weight.flatten(1))
    gradient = torch.randn(4, 27)
    options = {"lr": 0.1, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    ours = Muon([conv.weight], **options)
    theirs = torch.optim.Muon([matrix.weight], **options)
    for _ in range(3):
        conv.weight.grad, matrix.weight.grad = gradient.view_as(conv.weight), gradient
        ours.step()
        theirs.step()
        ours.zero_grad()
        assert conv.weight.grad is None
    assert torch.equal(conv.weight.flatten(1), matrix.weight)


def test_updates_of_muon_have_the_size_of_adamw_s() -> None:
    """A fifth of the learning rate, whatever the shape of the matrix."""
    stage = model_stage(optimizer="muon", weight_decay=0.0)
    muon = make_optimizers(stage.loss, stage.config)["muon"]
    assert isinstance(muon, Muon)
    before = [p.detach().clone() for p in muon.whole]
    for p in muon.whole:
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    muon.step()
    for p, old in zip(muon.whole, before, strict=True):
        size = float((p.detach() - old).square().mean().sqrt()) / stage.config.learning_rate
        assert 0.14 < size < 0.25, p.shape


# Learning


def test_an_autoencoder_learns(tmp_path: Path) -> None:
    trainer(autoencoder_stage(steps=60, learning_rate=5e-3), tmp_path).run()
    l1 = [line["l1"] for line in logged(tmp_path)]
    assert np.mean(l1[-5:]) < 0.6 * np.mean(l1[:5])


def test_a_model_learns(tmp_path: Path) -> None:
    trainer(model_stage(steps=80, batch=8), tmp_path).run()
    log = logged(tmp_path)
    for name, share in (("mar", 0.8), ("canvas", 0.8), ("static", 1.0)):
        values = [line[name] for line in log]
        assert np.mean(values[-10:]) < share * np.mean(values[:5]), name


def test_memory_does_not_grow(tmp_path: Path) -> None:
    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(x), Tensor) for x in gc.get_objects())

    run = trainer(model_stage(steps=12, checkpoint_every=4, sample_every=4), tmp_path)
    run.run(4)
    before = tensors()
    run.run()
    assert tensors() <= before + 5


@pytest.mark.parametrize("clip_norm", [1e-3, 1e9])
@pytest.mark.parametrize("name", STAGES)
def test_gradients_are_clipped_together(name: str, clip_norm: float, tmp_path: Path) -> None:
    """Before the optimizers see them; the log tells how large they were."""
    run, seen = trainer(STAGES[name](clip_norm=clip_norm), tmp_path), []

    def look(*_: Any) -> None:
        grads = [p.grad for p in run.stage.loss.parameters() if p.grad is not None]
        seen.append(float(torch.cat([g.flatten() for g in grads]).norm()))

    run.optimizers["adamw"].register_step_pre_hook(look)
    run.run(3)
    norms = [line["gradient_norm"] for line in logged(tmp_path)]
    assert min(norms) > 1e-2
    np.testing.assert_allclose(seen, np.minimum(norms, clip_norm), rtol=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_networks_run_in_the_precision_asked_for(precision: str, tmp_path: Path) -> None:
    """In the step, and where it predicts histories; the weights stay float32."""
    run, seen = trainer(history_stage(precision=precision), tmp_path), []
    block = run.stage.loss.get_submodule("temporal.blocks.0.attn.qkv")
    block.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    run.run(1)
    assert seen == [torch.bfloat16 if precision == "bf16" else torch.float32] * 2
    assert {p.dtype for p in run.stage.loss.parameters()} == {torch.float32}


def test_histories_are_carried_as_long_as_their_clips_stay(tmp_path: Path) -> None:
    """Every pass starts from what the last one gave; a clip that comes is seen as it is."""
    stage = history_stage(steps=5)
    ages = []

    def predicted(history: Tensor, actions: Tensor, given: Draws) -> Tensor:
        return history + 100

    def shown(clips: Clips | LatentClips, old: Sequence[int]) -> dict[str, Any]:
        told = inputs(clips, old)
        gone = told.get("history", told["latents"]) - told["latents"]
        assert gone.mean((1, 2, 3)).round(decimals=3).tolist() == [100 * x for x in old]
        ages.append(list(old))
        return told

    inputs, stage.inputs = stage.inputs, shown  # type: ignore[method-assign]
    stage.loss.predicted = predicted  # type: ignore[assignment]
    trainer(stage, tmp_path).run()
    assert ages == [[0, 0, 0, 0], [1, 1, 0, 1], [2, 0, 1, 2], [0, 1, 2, 0], [1, 2, 0, 1]]


# Resuming


@pytest.mark.parametrize(
    ("name", "optimizer", "precision"),
    [
        ("autoencoder", "adamw", "fp32"),
        ("autoencoder", "adamw", "bf16"),
        ("model", "adamw", "fp32"),
        ("model", "muon", "bf16"),
        ("autoencoder", "muon", "fp32"),
        ("history", "muon", "bf16"),
    ],
)
def test_a_resumed_run_is_the_straight_one(
    name: str, optimizer: str, precision: str, tmp_path: Path
) -> None:
    options = {"optimizer": optimizer, "precision": precision, "warmup_steps": 2, "decay_steps": 2}
    trainer(STAGES[name](**options, sample_every=2), tmp_path / "straight").run()
    for until in (3, None):
        trainer(STAGES[name](**options), tmp_path / "parts").run(until)
    assert logged(tmp_path / "parts") == logged(tmp_path / "straight")
    straight = saved(tmp_path / "straight", 6)
    assert_same(saved(tmp_path / "parts", 6), straight)
    kinds = {n.partition(".")[0] for n in straight}
    carried = {"carried"} if name == "history" else set()
    assert kinds == {"weights", "average", "optimizer"} | carried
    whole, parts = (load_file(tmp_path / d / "step_00000006/model.safetensors") for d in
                    ("straight", "parts"))  # fmt: skip
    assert_same(whole, parts)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists what is mapped")
def test_a_resumed_run_lets_go_of_its_checkpoint(tmp_path: Path) -> None:
    """Windows and NFS remove no file that is mapped, and the run would end where its turn comes."""
    trainer(STAGES["history"](), tmp_path).run(3)
    resumed = trainer(STAGES["history"](), tmp_path)
    assert resumed.step == 3
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_copies_of_checkpoints_are_left_alone(tmp_path: Path) -> None:
    options = {"checkpoint_every": 2, "keep_checkpoints": 1}
    trainer(model_stage(**options, steps=2), tmp_path).run()
    for copy in ("step_best", "step_00000002_good"):
        shutil.copytree(tmp_path / "step_00000002", tmp_path / copy)
    run = trainer(model_stage(**options), tmp_path)
    run.run()
    assert find_checkpoints(tmp_path) == [tmp_path / "step_00000006"]
    assert names(tmp_path) == ["step_00000002_good", "step_00000006", "step_best"]


def test_a_run_goes_on_from_any_checkpoint(tmp_path: Path) -> None:
    options = {"checkpoint_every": 2, "keep_checkpoints": 9}
    trainer(model_stage(**options), tmp_path).run()
    assert names(tmp_path) == ["step_00000002", "step_00000004", "step_00000006"]
    first, log = saved(tmp_path, 6), logged(tmp_path)
    for last in (4, 2, 0):
        for path in find_checkpoints(tmp_path):
            if int(path.name[5:]) > last:
                for file in path.iterdir():
                    file.unlink()
                path.rmdir()
        run = trainer(model_stage(**options), tmp_path)
        assert run.step == last
        run.run()
        assert_same(saved(tmp_path, 6), first)
        assert logged(tmp_path)[-(6 - last) :] == log[last:]


def test_a_resumed_run_forgets_the_steps_it_takes_again(tmp_path: Path) -> None:
    run = trainer(model_stage(checkpoint_every=2), tmp_path)
    run.run(2)
    lines = (tmp_path / "log.jsonl").read_text()
    cut = '{"step": 4, "sec'  # its writer was killed
    (tmp_path / "log.jsonl").write_text(lines + '{"step": 3, "seconds": 1.0}\n' + cut)
    again = trainer(model_stage(checkpoint_every=2), tmp_path)
    again.run(2)  # nothing to do: nothing is touched
    assert (tmp_path / "log.jsonl").read_text().endswith(cut)
    again.run(3)
    assert [line["step"] for line in logged(tmp_path)] == [1, 2, 3]
    assert (tmp_path / "log.jsonl").read_text().startswith(lines)


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    trainer(model_stage(steps=2), tmp_path).run()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("step_*/*")}
    trainer(model_stage(steps=2), tmp_path).run()
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("step_*/*")} == before
    trainer(model_stage(steps=3), tmp_path).run()  # more steps are another wish for the same run
    assert "step_00000003" in names(tmp_path)


def test_a_finished_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(model_stage(steps=2), tmp_path).run()
    for quiet, shown in ((True, ""), (False, "model: already at step 2 of 2\n")):
        Trainer(model_stage(steps=2), Waves(), tmp_path, ranks=ONE, quiet=quiet).run()
        assert capsys.readouterr().err == shown


def test_old_checkpoints_go(tmp_path: Path) -> None:
    trainer(model_stage(checkpoint_every=1, keep_checkpoints=2), tmp_path).run()
    assert names(tmp_path) == ["step_00000005", "step_00000006"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    trainer(model_stage(), tmp_path).run(1)
    (tmp_path / ".step_half").mkdir()
    (tmp_path / ".step_half" / "model.safetensors").write_bytes(b"half")
    trainer(model_stage(), tmp_path).run(2)
    assert names(tmp_path) == ["step_00000001", "step_00000002"]


# Checkpoints


def test_a_checkpoint_is_the_averaged_model(tmp_path: Path) -> None:
    run = trainer(model_stage(), tmp_path)
    run.run(3)
    own = {n: p.detach().clone() for n, p in run.stage.loss.named_parameters()}
    run.save()
    for name, p in run.stage.loss.named_parameters():
        assert torch.equal(p, own[name])
    model, sampling = load_checkpoint(latest_checkpoint(tmp_path))
    weights = dict(model.named_parameters())
    for name, average in run.average.shadow.items():
        assert torch.equal(weights[name], average)
        assert torch.equal(saved(tmp_path, 3)[f"weights.{name}"], own[name])
    assert any((weights[n] != own[n]).any() for n in own)
    # and it predicts
    clips = Waves(seed=3).clips(0, 1)
    state = sampler.start(model, sampler.encode(model, clips.frames))  # type: ignore[union-attr]
    noise = sampler.draw_noise(model.config, sampling, seed=0, streams=[0], frame=3)
    _, sample = sampler.step(model, sampling, state, noise)
    assert sample.frames.shape == (1, 2, 16, 16, 3)


def test_samples_are_of_the_averaged_model(tmp_path: Path) -> None:
    run = trainer(model_stage(steps=2, sample_every=2), tmp_path)
    seen: list[dict[str, Tensor]] = []

    def sample(*_: Any) -> None:
        assert not run.stage.loss.training
        seen.append({n: p.detach().clone() for n, p in run.stage.loss.named_parameters()})

    run.stage.sample = sample  # type: ignore[method-assign]
    run.run()
    (weights,) = seen
    assert all(torch.equal(weights[n], average) for n, average in run.average.shadow.items())
    own = dict(run.stage.loss.named_parameters())
    assert any((weights[n] != own[n]).any() for n in own)


def test_two_processes_do_not_train_in_one_directory(tmp_path: Path) -> None:
    words = "another process trains there; wait for it, or choose another directory"
    waiting = trainer(model_stage(), tmp_path)
    running = trainer(model_stage(), tmp_path)
    real = running.save

    def save() -> None:
        with pytest.raises(ConfigError, match=words):
            trainer(model_stage(), tmp_path)
        with pytest.raises(ConfigError, match=words):
            waiting.run(2)
        real()

    running.save = save  # type: ignore[method-assign]
    running.run(2)
    assert names(tmp_path) == ["step_00000002"]
    assert trainer(model_stage(), tmp_path).step == 2


def test_a_failed_save_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(model_stage(checkpoint_every=2), tmp_path)
    run.run(2)
    before = saved(tmp_path, 2)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("training.trainer.save_file", fail)
        with pytest.raises(KeyboardInterrupt):
            run.run()
    assert names(tmp_path) == ["step_00000002"]
    load_checkpoint(latest_checkpoint(tmp_path))
    assert_same(saved(tmp_path, 2), before)
    again = trainer(model_stage(checkpoint_every=2), tmp_path)
    assert again.step == 2
    again.run()
    assert names(tmp_path) == ["step_00000004", "step_00000006"]


def test_weights_are_given_by_run_checkpoint_or_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer(autoencoder_stage(), tmp_path / "run").run(1)
    checkpoint = latest_checkpoint(tmp_path / "run")
    expected, sampling = load_checkpoint(checkpoint, whole=False)
    for path in (tmp_path / "run", checkpoint):
        model, options = load_weights(path)
        assert options == sampling
        assert_same(model.state_dict(), expected.state_dict())
    by_name, options = load_weights(Path("toytable"))
    by_path, _ = load_weights(resolve("toytable"))
    assert by_name.config.name == "toytable"
    assert options == Bundle.open("toytable").manifest.profile()
    assert_same(by_name.state_dict(), by_path.state_dict())
    monkeypatch.chdir(tmp_path)
    Path("toytable").mkdir()  # what lies here comes first
    for path, message in (
        (Path("toytable"), "neither a checkpoint nor a run with checkpoints"),
        (Path("nowhere"), r"neither a checkpoint nor a run, nor a bundle .* \(toytable, "),
    ):
        with pytest.raises(BundleError, match=f"^{path}: {message}"):
            load_weights(path)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def other_weights(file: Path) -> None:
    state = load_file(file)
    state.pop(next(n for n in state if n.startswith("weights.")))
    save_file(state, file)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (STATE_FILE, cut),
        (STATE_FILE, lambda file: file.write_bytes(b"")),
        (STATE_FILE, Path.unlink),
        (STATE_FILE, other_weights),
        (PROGRESS_FILE, lambda file: file.write_text('{"step": ')),
        (PROGRESS_FILE, lambda file: file.write_text("[]")),
    ],
    ids=["cut", "empty", "missing", "other", "half", "list"],
)
def test_a_damaged_checkpoint_is_named(
    name: str, damage: Callable[[Path], Any], tmp_path: Path
) -> None:
    trainer(model_stage(), tmp_path).run(1)
    damage(tmp_path / "step_00000001" / name)
    with pytest.raises(BundleError, match="step_00000001") as error:
        trainer(model_stage(), tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_damaged_description_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / RUN_FILE).write_text(text)
    with pytest.raises(BundleError, match=re.escape(RUN_FILE)):
        trainer(model_stage(), tmp_path)


def test_a_directory_belongs_to_one_configuration(tmp_path: Path) -> None:
    trainer(model_stage(), tmp_path, description={"autoencoder": "a"}).run(1)
    described = json.loads((tmp_path / RUN_FILE).read_text())
    assert described["stage"] == "model"
    assert described["training"]["learning_rate"] == 2e-3
    for stage, autoencoder, words in (
        (model_stage(learning_rate=1e-3, seed=4), "a", "another seed and learning_rate;"),
        (model_stage(), "b", "another autoencoder;"),
        (autoencoder_stage(), "a", "another stage"),
    ):
        with pytest.raises(ConfigError, match=words):
            trainer(stage, tmp_path, description={"autoencoder": autoencoder})
    assert json.loads((tmp_path / RUN_FILE).read_text()) == described
    free = model_stage(steps=9, log_every=3, keep_checkpoints=5, sample_every=7)
    assert trainer(free, tmp_path, description={"autoencoder": "a"}).step == 1


def test_a_directory_belongs_to_one_data_set(tmp_path: Path) -> None:
    def described(directory: str, data: dict[str, Any]) -> Trainer:
        return trainer(model_stage(), tmp_path / directory, description={"data": data})

    videos, toytable = {"name": "videos", "root": "/a"}, {"name": "toytable"}
    latents: dict[str, Any] = {"clips": 9, "shards": ["a"], "autoencoder": "x"}
    for name, data in (("videos", videos), ("latents", latents), ("named", latents | videos)):
        described(name, data).run(1)
    described("videos", videos | {"root": "/b"})  # it was moved
    described("latents", latents | videos)  # encoded again by a version that tells the name
    described("named", latents | videos | {"root": "/b"})
    for name, data in (
        ("videos", toytable),
        ("videos", latents | videos),
        ("latents", latents | {"clips": 8}),
        ("named", latents | toytable),
        ("named", videos),
    ):
        with pytest.raises(ConfigError, match=r"with another data \("):
            described(name, data)


def test_a_directory_without_a_checkpoint_belongs_to_nobody(tmp_path: Path) -> None:
    trainer(model_stage(seed=4), tmp_path)
    trainer(model_stage(), tmp_path).run(1)
    assert json.loads((tmp_path / RUN_FILE).read_text())["training"]["seed"] == 0
    with pytest.raises(ConfigError, match="another seed"):
        trainer(model_stage(seed=4), tmp_path)


def test_a_batch_is_shared_evenly(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="4 clips cannot be shared by 3 ranks; make it a multiple"):
        trainer(model_stage(), tmp_path / "run", Ranks(0, 3, torch.device("cpu")))
    assert not (tmp_path / "run").exists()


def test_a_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        trainer(model_stage(), tmp_path / "file" / "run")


@pytest.mark.parametrize("full", ["save_file", "open"])
def test_a_full_disk_is_said(full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(model_stage(checkpoint_every=1), tmp_path)
    run.run(1)

    def fail(*_: object, **__: object) -> None:
        error = SafetensorError if full == "save_file" else OSError
        raise error("No space left on device")

    monkeypatch.setattr(f"training.trainer.{full}", fail, raising=False)
    place = "step_00000002" if full == "save_file" else "log.jsonl"
    message = (
        rf"^{re.escape(str(tmp_path))}/{place}: cannot be written \(No space left on device\)$"
    )
    with pytest.raises(InputError, match=message):
        run.run()
    assert names(tmp_path) == ["step_00000001"]


# Numbers that are none


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    run = trainer(model_stage(checkpoint_every=1), tmp_path)
    run.run(2)
    before = saved(tmp_path, 2)
    with torch.no_grad():
        next(run.stage.loss.parameters()).fill_(float("nan"))
    with pytest.raises(StateError, match=r"step 2: the loss is nan.*step_00000002, is intact: "):
        run.run()
    assert names(tmp_path) == ["step_00000001", "step_00000002"]
    assert_same(saved(tmp_path, 2), before)


def test_a_loss_that_is_no_number_at_once_leaves_no_checkpoint_to_name(tmp_path: Path) -> None:
    run = trainer(model_stage(), tmp_path)
    with torch.no_grad():
        next(run.stage.loss.parameters()).fill_(float("nan"))
    with pytest.raises(StateError, match=r"step 0: .*norm nan; start another run"):
        run.run()


def test_the_clock_ends_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes a minute here: of ten, the last four are at a falling learning rate."""
    clock = iter(range(0, 6000, 60))
    watch = SimpleNamespace(monotonic=lambda: float(next(clock)))
    monkeypatch.setattr("training.trainer.time", watch)
    options: Any = {"minutes": 10, "steps": 5, "decay_steps": 2}
    rates = []
    for until in (3, None, None):
        run = trainer(model_stage(**options), tmp_path)
        run.stage.advance = lambda *_, run=run: rates.append(run._factor)  # type: ignore[method-assign]
        run.run(until)
    assert (run.step, run.seconds) == (10, 600)
    np.testing.assert_allclose(rates, [1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert [line["step"] for line in logged(tmp_path)] == list(range(1, 11))
    assert names(tmp_path) == ["step_00000003", "step_00000010"]


def test_a_clock_is_not_shared(tmp_path: Path) -> None:
    ranks = Ranks(0, 2, torch.device("cpu"))
    with pytest.raises(ConfigError, match="minutes are for one process"):
        trainer(model_stage(minutes=1), tmp_path, ranks)


def test_a_run_of_before_an_option_goes_on(tmp_path: Path) -> None:
    trainer(model_stage(), tmp_path).run(1)
    about = json.loads((tmp_path / RUN_FILE).read_text())
    for option in ("minutes", "mask_all", "lengths"):
        del about["training"][option]
    (tmp_path / RUN_FILE).write_text(json.dumps(about))
    with pytest.raises(ConfigError, match="another mask_all"):
        trainer(model_stage(mask_all=0.5), tmp_path)
    run = trainer(model_stage(), tmp_path)
    run.run(2)
    assert run.step == 2


def test_losses_of_many_steps_are_looked_at_together(tmp_path: Path) -> None:
    """As on a GPU: the first step that went wrong is named, and no checkpoint is written."""
    run = trainer(model_stage(), tmp_path)
    run.run(2)
    found = [1.0, 1.0], [1.0, np.inf], [np.nan, np.nan]
    run._unchecked = [(step, torch.tensor(x)) for step, x in enumerate(found, 2)]
    run.step = 5
    with pytest.raises(StateError, match=r"step 3: the loss is 1\.0 and its gradient's norm inf"):
        run.save()
    assert "step_00000005" not in names(tmp_path)


@pytest.mark.parametrize(
    "name", ["mar_weight", "canvas_weight", "static_weight", "weight_decay", "minutes"]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1])
def test_weights_of_losses_are_finite_and_not_negative(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be finite and not negative"):
        ModelTraining(steps=1, batch=1, **{name: value})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_deviations_of_the_mask_ratio_are_finite(value: float) -> None:
    with pytest.raises(ConfigError, match="mask_ratio_std must be above 0 and finite"):
        ModelTraining(steps=1, batch=1, mask_ratio_std=value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_changes_nothing(value: float, tmp_path: Path) -> None:
    run = trainer(model_stage(checkpoint_every=1), tmp_path)
    run.run(2)
    run.stage.loss.flow.out.bias.register_hook(lambda g: g * value)  # type: ignore[union-attr]
    own = {n: p.detach().clone() for n, p in run.stage.loss.named_parameters()}
    with pytest.raises(StateError, match="gradient"):
        run.run()
    assert names(tmp_path)[-1] == "step_00000002"
    for name, p in run.stage.loss.named_parameters():
        assert torch.equal(p, own[name])


# Clips that do not fit


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Waves(height=32), "clips are 32x16, the model wants 16x16"),
        (Waves(frames=4), r"1 \+ n\*2"),
        (Waves(action_dim=3), "actions of 3 numbers"),
    ],
)
def test_clips_must_fit_the_model(source: Waves, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        Trainer(model_stage(), source, tmp_path / "run", ranks=ONE)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        (Waves(height=32), "^held-out clips are 32x16, the model wants 16x16; give the --data"),
        (Waves(action_dim=3), "^held-out actions of 3 numbers.*; give the --data, --root"),
    ],
)
def test_held_out_clips_must_fit_the_model(held_out: Waves, message: str, tmp_path: Path) -> None:
    stage = model_stage()
    stage.held_out = held_out
    with pytest.raises(InputError, match=message):
        trainer(stage, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_autoencoder_needs_no_actions(tmp_path: Path) -> None:
    source = Waves(action_dim=3)
    Trainer(autoencoder_stage(steps=1), source, tmp_path, ranks=ONE, quiet=True).run()


# Logs


@pytest.mark.parametrize("name", STAGES)
def test_event_files_hold_curves_and_pictures(name: str, tmp_path: Path) -> None:
    stage = STAGES[name](steps=4, log_every=2, sample_every=2, warmup_steps=1, decay_steps=2)
    trainer(stage, tmp_path).run()
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    for term in (
        "loss",
        "gradient_norm",
        *(("mar", "canvas") if stage.name == "model" else ("l1", "kl")),
    ):
        points = events.Scalars(f"{stage.name}/{term}")
        assert [p.step for p in points] == [2, 4]
        values = [line[term] for line in logged(tmp_path)]
        np.testing.assert_allclose([p.value for p in points], values, rtol=1e-6)
    rate = stage.config.learning_rate
    rates = [p.value for p in events.Scalars(f"{stage.name}/learning_rate")]
    np.testing.assert_allclose(rates, [rate, rate / 2], rtol=1e-6)
    pictures = events.Images(f"{stage.name}/samples")
    assert [p.step for p in pictures] == [2, 4]
    with Image.open(io.BytesIO(pictures[0].encoded_image_string)) as film:
        assert film.size == (64, 32)  # four clips in two rows
        assert getattr(film, "n_frames", 1) == 5
    sheet = tmp_path / "samples" / f"{stage.name}_00000004.png"
    with Image.open(sheet) as picture:
        assert min(picture.size) > 16
    if name == "autoencoder":
        assert 0 < events.Scalars("autoencoder/held_out_psnr")[-1].value < 60


def test_curves_and_pictures_of_steps_taken_again_are_drawn_once(tmp_path: Path) -> None:
    options = {"steps": 4, "checkpoint_every": 2, "sample_every": 1}
    killed = trainer(model_stage(**options), tmp_path)
    advance = killed.stage.advance

    def kill(*given: Any) -> None:
        advance(*given)
        if killed.step == 3:  # three steps are in the log, two in the checkpoint
            raise MemoryError

    killed.stage.advance = kill  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        killed.run()
    again = trainer(model_stage(**options), tmp_path)
    assert again.step == 2
    again.run()
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    for points in (events.Scalars("model/loss"), events.Images("model/samples")):
        assert [p.step for p in points] == [1, 2, 3, 4]


def test_progress_is_lines_where_there_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Waves()
    Trainer(model_stage(steps=4, log_every=2), source, tmp_path, ranks=ONE).run()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[:2] for line in lines] == [["model", "2/4"], ["model", "4/4"]]
    assert "mar" in lines[0]


# Ranks

RANKED = """
import os
import signal
import sys
from pathlib import Path
import torch
from canvasmar_rt.errors import InputError
from tests.training.small_runs import STAGES, trainer
from training.trainer import process_group
torch.set_num_threads(1)
with process_group("cpu") as ranks:
    assert ranks.world == 2 and ranks.device.type == "cpu"
    for name, make in STAGES.items():
        trainer(make(), Path(sys.argv[1]) / name, ranks).run(2)
        trainer(make(), Path(sys.argv[1]) / name, ranks).run(4)
    stopped = trainer(STAGES["history"](), Path(sys.argv[1]) / "stopped", ranks)
    advance = stopped.stage.advance
    def told(inputs, draws):
        advance(inputs, draws)
        if stopped.step == 1 and ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
    stopped.stage.advance = told
    try:
        stopped.run()
    except KeyboardInterrupt:
        print("stopped at", stopped.step)
    alone = Path(sys.argv[1]) / f"alone{ranks.rank}"
    alone.mkdir(parents=True)
    trainer(STAGES["model"](), alone, ranks).run(1)
    try:
        trainer(STAGES["model"](), alone, ranks)
    except InputError as error:
        print(error)
"""


def test_two_ranks_are_one_with_the_same_batch(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, "-c", RANKED, str(tmp_path / "two")]
        ranks.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                text=True,
            )
        )  # fmt: skip
    try:
        for name, make in STAGES.items():
            trainer(make(), tmp_path / "one" / name).run(4)
        told, errors = zip(*(process.communicate(timeout=120) for process in ranks), strict=True)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(errors)
    for rank, lines in enumerate(text.splitlines() for text in told):  # one was told to stop
        assert lines[0] == "stopped at 2"
        assert lines[1] == (
            f"{tmp_path}/two/alone{rank}: the ranks see different checkpoints (step_00000001, "
            "none); the run must lie in a folder that all machines share"
        )
    assert_same(saved(tmp_path / "two" / "stopped", 2), saved(tmp_path / "two" / "history", 2))
    for name in STAGES:
        one, two = logged(tmp_path / "one" / name), logged(tmp_path / "two" / name)
        assert [line["step"] for line in two] == [1, 2, 3, 4]
        for a, b in zip(one, two, strict=True):
            for term in a.keys() - {"psnr"}:  # a logarithm: its mean is not that of the batch
                assert b[term] == pytest.approx(a[term], rel=2e-5), term
        whole, shared = saved(tmp_path / "one" / name, 4), saved(tmp_path / "two" / name, 4)
        assert whole.keys() == shared.keys()
        for key, value in whole.items():
            if "qkv" in key and key.endswith("bias"):
                # softmax does not feel the keys' bias: its gradient is rounding error, and AdamW
                # makes steps of it
                value, shared[key] = (x.reshape(3, -1)[::2] for x in (value, shared[key]))
            if not key.startswith("optimizer."):
                torch.testing.assert_close(shared[key], value, atol=2e-5, rtol=1e-4, msg=key)
