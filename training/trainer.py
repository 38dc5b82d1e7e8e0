"""The training loop of both stages: optimiser, EMA, checkpoints, logs, ranks.

A run directory holds `run.json` (what was asked for), `step_NNNNNNNN/` checkpoints and TensorBoard
event files. A checkpoint is a model directory that `canvasmar-rt export` takes (EMA weights) plus
`training.safetensors` and `training.json`, from which a run goes on to the same loss curve.
It is written beside its place and renamed: a checkpoint is whole or not there.

Ranks: start with `torchrun`; DistributedDataParallel shares the gradients, every rank reads its own
part of each batch, rank 0 writes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

from canvasmar_rt.bundle import MANIFEST, Bundle, packaged_names
from canvasmar_rt.command import stderr
from canvasmar_rt.config import SamplingConfig, to_dict
from canvasmar_rt.engines.torch_engine import load_model
from canvasmar_rt.errors import BundleError, ConfigError, InputError, StateError
from canvasmar_rt.files import refusals, replacing, write_file
from canvasmar_rt.models.canvasmar import FrameModel
from canvasmar_rt.models.checkpoint import (
    PROGRESS_FILE,
    RUN_FILE,
    WEIGHTS_FILE,
    load_checkpoint,
    save_checkpoint,
)
from canvasmar_rt.signals import kept_signals
from training.clips import (
    Clips,
    ClipSource,
    LatentClips,
    age,
    alone,
    batches,
    check_actions,
    check_length,
    check_shared,
    to_device,
)
from training.config import RunConfig
from training.losses import Draws, Terms

STATE_FILE = "training.safetensors"
LOG_FILE = "log.jsonl"
CARRIED = "carried"

UNCHECKED_STEPS = 32
"""Steps on a GPU after which it is seen whether their losses were finite."""


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among those of the run, and its device."""

    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0


@contextmanager
def process_group(device: str = "") -> Iterator[Ranks]:
    """Join the group that `torchrun` describes in the environment, or be the only rank.

    `device` "" means CUDA where there is one (NCCL), else the CPU (gloo).

    Raises:
        InputError: if the device cannot be had.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if not device:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device {device!r}: this machine has no CUDA GPU that torch can use")
    try:
        place = torch.device(device, local) if device == "cuda" else torch.device(device)
        if place.type == "cuda":
            torch.cuda.set_device(place)
    except RuntimeError as error:
        raise InputError(f"device {device!r}: {str(error).splitlines()[0]}") from None
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Ranks(0, 1, place)
        return
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), world, place)
    finally:
        dist.destroy_process_group()


@contextmanager
def progress_bar(
    name: str, total: int, quiet: bool, *, done: int = 0
) -> Iterator[Callable[..., None]]:
    """A bar on stderr; call what it gives with the steps done and, now and then, a text. Where
    stderr is not a terminal the texts become lines."""
    with Progress(
        TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"), console=stderr,
        disable=quiet or not stderr.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=total, completed=done, text="")
        count = done

        def advance(steps: int, text: str | None = None) -> None:
            nonlocal count
            count += steps
            bar.update(task, advance=steps)
            if text is None:
                return
            bar.update(task, text=text)
            if not quiet and not stderr.is_terminal:
                stderr.print(f"{name} {count}/{total}  {text}", highlight=False, soft_wrap=True)

        yield advance


class Stage(Protocol):
    """What the loop trains: `loss` is the module whose parameters move; called with `draws` and the
    `inputs` of clips that have been in the batch for `ages` steps, of `stay`, it gives a scalar and
    its terms. After the step they `advance`; `carried`, a row a clip, goes from one step to the
    next. `sample` writes pictures of `held_out` clips for the log."""

    name: str
    model: FrameModel
    sampling: SamplingConfig
    held_out: ClipSource
    loss: nn.Module
    stay: int
    carried: Tensor | None

    @property
    def config(self) -> RunConfig: ...

    def inputs(self, clips: Clips | LatentClips, ages: Sequence[int]) -> dict[str, Any]: ...

    def advance(self, inputs: dict[str, Any], draws: Draws) -> None: ...

    def finish(self) -> None:
        """Called with the EMA weights in place before a checkpoint is written."""
        ...

    def sample(self, writer: SummaryWriter, step: int, directory: Path) -> None: ...


def learning_rate_factor(config: RunConfig, step: int, seconds: float = 0.0) -> float:
    """Warm-up, plateau, linear decay: the factor of the learning rate at `step` (from 0), where
    the clock counts after `seconds` of training."""
    factor = min(1.0, (step + 1) / (config.warmup_steps + 1))
    done = config.steps * seconds / (60 * config.minutes) if config.minutes else step
    if config.decay_steps:
        factor *= min(1.0, max(0.0, (config.steps - done) / config.decay_steps))
    return factor


class Muon(torch.optim.Muon):
    """torch's Muon that also takes convolutions: their weights are matrices (out, in *
    kernel) in the same memory."""

    def __init__(self, params: Sequence[nn.Parameter], **options: Any) -> None:
        self.whole = list(params)
        self._matrices = [nn.Parameter(p.detach().view(len(p), -1)) for p in self.whole]
        super().__init__(self._matrices, **options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for whole, matrix in zip(self.whole, self._matrices, strict=True):
            matrix.grad = None if whole.grad is None else whole.grad.flatten(1)
        return super().step(closure)  # type: ignore[no-untyped-call]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in (*self.whole, *self._matrices):
            parameter.grad = None


def _orthogonalised(name: str, parameter: nn.Parameter) -> bool:
    """Muon's: matrices of transformer blocks, and convolutions."""
    return parameter.ndim == 4 or (parameter.ndim == 2 and "blocks." in name)


def make_optimizers(loss: nn.Module, config: RunConfig) -> dict[str, torch.optim.Optimizer]:
    """AdamW over everything, or Muon over the matrices of transformer blocks and convolutions and
    AdamW over the rest. Vectors are not decayed."""
    named = [(n, p) for n, p in loss.named_parameters() if p.requires_grad]
    hidden = [p for n, p in named if config.optimizer == "muon" and _orthogonalised(n, p)]
    taken = {id(p) for p in hidden}
    rest = [p for _, p in named if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers: dict[str, torch.optim.Optimizer] = {
        "adamw": torch.optim.AdamW(
            groups, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
        )
    }
    if hidden:
        optimizers["muon"] = Muon(
            hidden,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
    return optimizers


class Average:
    """Exponential moving average of a module's parameters, with a warm start: after few steps it
    follows closely, min(decay, (1 + step) / (10 + step))."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {n: p.detach().clone() for n, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        parameters = dict(module.named_parameters())
        torch._foreach_lerp_(
            list(self.shadow.values()), [parameters[n].detach() for n in self.shadow], weight
        )

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """The module with averaged weights; its own come back afterwards."""
        parameters = dict(module.named_parameters())
        own = {n: p.detach().clone() for n, p in parameters.items()}
        with torch.no_grad():
            for n, p in parameters.items():
                p.copy_(self.shadow[n])
        try:
            yield
        finally:
            with torch.no_grad():
                for n, p in parameters.items():
                    p.copy_(own[n])


class Trainer:
    """One run of one stage. Construct it, then `run()`; a directory with checkpoints is resumed."""

    def __init__(
        self,
        stage: Stage,
        source: ClipSource,
        directory: Path,
        *,
        ranks: Ranks,
        quiet: bool = False,
        description: dict[str, Any] | None = None,
    ) -> None:
        """`description` goes into run.json beside the configuration: where the data came from.

        Raises:
            ConfigError: if the directory holds a run of another configuration.
            InputError: if clips and model do not fit together, or ranks and batch.
        """
        self.stage, self.source, self.directory = stage, source, directory
        self.ranks, self.quiet = ranks, quiet
        self.config = stage.config
        _check_source(stage, source)
        _check_source(
            stage,
            stage.held_out,
            "held-out ",
            "; give the --data, --root and --set-data trained on",
        )
        stage.held_out.clips(0, 1)  # what cannot be read is told before the training
        check_shared(self.config.batch, ranks.world)
        if self.config.minutes and ranks.world > 1:
            raise ConfigError("training: minutes are for one process; several have no common clock")
        stage.model.to(ranks.device)
        stage.loss.train()
        self._claim(description or {})
        self.module: nn.Module = stage.loss
        if ranks.world > 1:
            self.module = DistributedDataParallel(stage.loss, find_unused_parameters=True)
            self._control = dist.new_group(backend="gloo")  # what is asked there waits for no GPU
        self.optimizers = make_optimizers(stage.loss, self.config)
        self.average = Average(stage.loss, self.config.ema_decay)
        self.step = 0
        self.seconds = 0.0
        self._factor = 0.0  # of the learning rate, at the latest step
        self._unchecked: list[tuple[int, Tensor]] = []  # steps; their loss and gradient norm
        latest = self._latest()
        if latest is not None:
            self._load(latest)

    def run(self, until: int | None = None) -> None:
        """Train to `until` steps, by default to the end; ends with a checkpoint, also where the
        user or a signal interrupts it, unless they do so twice.

        Raises:
            ConfigError: if another process trains in the directory.
            KeyboardInterrupt: after the checkpoint of the step that was interrupted.
        """
        meanwhile = alone(self.directory, "trains") if self.ranks.main else nullcontext()
        with meanwhile, kept_signals() as stopped:
            self._run(until, stopped)

    def _run(self, until: int | None, stopped: Callable[[], bool]) -> None:
        c, r = self.config, self.ranks
        steps = sys.maxsize if c.minutes else c.steps
        end = steps if until is None else min(until, steps)
        if self._ended(end):
            if r.main and not self.quiet:
                stderr.print(
                    f"{self.stage.name}: already at step {self.step} of "
                    + (f"{c.minutes:g} minutes" if c.minutes else f"{c.steps}"),
                    highlight=False,
                )
            return
        writer = None
        if r.main:
            self._forget_lost_steps()
            with refusals(self.directory):
                writer = SummaryWriter(str(self.directory), purge_step=self.step + 1)
        data = batches(
            self.source, first_step=self.step, steps=end, batch=c.batch, rank=r.rank, world=r.world,
            stay=self.stage.stay, pinned=r.device.type == "cuda",
        )  # fmt: skip
        began, before = time.monotonic(), self.seconds
        try:
            quiet = self.quiet or not r.main
            name, done, total = self.stage.name, self.step, end
            if c.minutes and until is None:
                name, done, total = f"{name}, seconds", int(before), round(60 * c.minutes)
            with progress_bar(name, total, quiet, done=done) as advance:
                for clips in data:
                    terms = self._step(to_device(clips, r.device))
                    self.step += 1
                    self.seconds = before + time.monotonic() - began
                    stop = self._any(stopped())
                    ended = stop or self._ended(end)
                    if self.step % c.log_every == 0 or ended:
                        shown = self._log(writer, terms)
                    else:
                        shown = None
                    now = self.step if total == end else int(self.seconds)
                    advance(now - done, shown)
                    done = now
                    if self.step % c.checkpoint_every == 0 or ended:
                        self.save()
                        stop = self._any(stopped())
                    if stop:
                        raise KeyboardInterrupt
                    if c.sample_every and self.step % c.sample_every == 0 and writer is not None:
                        with refusals(self.directory), self._averaged():
                            self.stage.sample(writer, self.step, self.directory)
                    if ended:
                        break
        finally:
            if writer is not None:
                with refusals(self.directory):
                    writer.close()

    def _any(self, stopped: bool) -> bool:
        """Whether any rank is to stop: all do, after the same step."""
        if self.ranks.world == 1:
            return stopped
        flag = torch.tensor(stopped, dtype=torch.int32)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._control)
        return bool(flag)

    def _ended(self, end: int) -> bool:
        limit = 60 * self.config.minutes or math.inf
        return self.step >= end or self.seconds >= limit

    def _step(self, clips: Clips | LatentClips) -> Terms:
        c, r = self.config, self.ranks
        share = c.batch // r.world
        slots = range(r.rank * share, (r.rank + 1) * share)
        draws = Draws(r.device, seed=c.seed, step=self.step, batch=c.batch, rows=slots)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        ages = [age(self.step, slot, self.stage.stay) for slot in slots]
        inputs = self.stage.inputs(clips, ages)
        with self._autocast():
            total, terms = self.module(**inputs, draws=draws)
        total.backward()
        norm = nn.utils.clip_grad_norm_(self.stage.loss.parameters(), c.clip_norm)
        self._unchecked.append((self.step, torch.stack([total.detach(), norm])))
        if r.device.type == "cpu" or len(self._unchecked) == UNCHECKED_STEPS:
            self._check()
        self._factor = learning_rate_factor(c, self.step, self.seconds)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = c.learning_rate * self._factor
            optimizer.step()
        self.average.update(self.stage.loss, self.step)
        with self._autocast():
            self.stage.advance(inputs, draws)
        return {"loss": total.detach(), "gradient_norm": norm.detach()} | {
            name: value.detach() for name, value in terms.items()
        }

    def _check(self) -> None:
        """See that losses and gradients so far were finite; a GPU is asked once for many steps, as
        it would have to wait for the next one.

        Raises:
            StateError: naming the first step that was not.
        """
        if not self._unchecked:
            return
        steps, found = zip(*self._unchecked, strict=True)
        self._unchecked.clear()
        for step, (loss, size) in zip(steps, torch.stack(found).tolist(), strict=True):
            if math.isfinite(loss) and math.isfinite(size):
                continue
            kept = find_checkpoints(self.directory)
            intact = f"the last checkpoint, {kept[-1]}, is intact: " if kept else ""
            raise StateError(
                f"step {step}: the loss is {loss} and its gradient's norm {size}; {intact}"
                "start another run with a lower learning_rate or with precision fp32"
            )

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.ranks.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"
        )

    def _log(self, writer: SummaryWriter | None, terms: Terms) -> str:
        self._check()
        values = torch.stack([v.float() for v in terms.values()])
        if self.ranks.world > 1:
            dist.all_reduce(values)
            values /= self.ranks.world
        named = dict(zip(terms, values.tolist(), strict=True))
        if writer is not None:
            line = json.dumps({"step": self.step, "seconds": round(self.seconds, 1), **named})
            rate = self.config.learning_rate * self._factor
            with refusals(self.directory / LOG_FILE):
                for name, value in (*named.items(), ("learning_rate", rate)):
                    writer.add_scalar(f"{self.stage.name}/{name}", value, self.step)
                with open(self.directory / LOG_FILE, "a", encoding="utf-8") as log:
                    log.write(line + "\n")
        return "  ".join(f"{n} {v:.4g}" for n, v in named.items() if n != "gradient_norm")

    def _forget_lost_steps(self) -> None:
        """Drop what the log tells of steps that came after the checkpoint: they are taken again."""
        path = self.directory / LOG_FILE
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            kept = "".join(f"{n}\n" for n in text.splitlines() if _logged_step(n) <= self.step)
            if kept != text:
                write_file(path, kept)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        self.stage.loss.eval()
        try:
            with self.average.applied(self.stage.loss):
                yield
        finally:
            self.stage.loss.train()

    # -- checkpoints

    def save(self) -> None:
        """Write the checkpoint of this step and drop the oldest ones beyond `keep_checkpoints`.

        Raises:
            InputError: if it cannot be written.
            StateError: if a loss since the last one was not finite.
        """
        self._check()
        carried = self._all_carried()
        if self.ranks.main:
            place = self.directory / f"step_{self.step:08d}"
            with refusals(place):
                self._write(place, carried)
        if self.ranks.world > 1:
            dist.barrier()

    def _write(self, place: Path, carried: dict[str, Tensor]) -> None:
        temporary = Path(tempfile.mkdtemp(dir=self.directory, prefix=".step_"))
        try:
            with self._averaged():
                self.stage.finish()
                save_checkpoint(temporary, self.stage.model, self.stage.sampling)
            with replacing(temporary / STATE_FILE) as state:
                save_file(self._tensors() | carried, state)
            progress = {"stage": self.stage.name, "step": self.step, "seconds": self.seconds}
            (temporary / PROGRESS_FILE).write_text(json.dumps(progress) + "\n")
            temporary.chmod(0o755)
            if place.exists():
                shutil.rmtree(place)
            os.replace(temporary, place)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        for old in find_checkpoints(self.directory)[: -self.config.keep_checkpoints]:
            hidden = old.with_name(f".{old.name}")  # gone at once, whatever interrupts
            os.replace(old, hidden)
            shutil.rmtree(hidden)

    def _tensors(self) -> dict[str, Tensor]:
        out = {f"weights.{n}": p.detach() for n, p in self.stage.loss.named_parameters()}
        out |= {f"average.{n}": p for n, p in self.average.shadow.items()}
        for name, optimizer in self.optimizers.items():
            for index, state in optimizer.state_dict()["state"].items():
                out |= {f"optimizer.{name}.{index}.{k}": v for k, v in state.items()}
        return {n: t.detach().cpu().contiguous().clone() for n, t in out.items()}

    def _all_carried(self) -> dict[str, Tensor]:
        """What the stage carries of the clips of all ranks, if anything."""
        own = self.stage.carried
        if own is None:
            return {}
        parts = [own]
        if self.ranks.world > 1:
            parts = [torch.empty_like(own) for _ in range(self.ranks.world)]
            dist.all_gather(parts, own)
        return {CARRIED: torch.cat(parts).cpu()}

    def _latest(self) -> Path | None:
        """The checkpoint to go on from, the same one on all ranks.

        Raises:
            InputError: if ranks see others.
        """
        found = find_checkpoints(self.directory)[-1:]
        names: list[str] = [found[0].name if found else "none"] * self.ranks.world
        if self.ranks.world > 1:
            dist.all_gather_object(names, names[0])
        if len(set(names)) > 1:
            raise InputError(
                f"{self.directory}: the ranks see different checkpoints ({', '.join(names)}); the "
                "run must lie in a folder that all machines share"
            )
        return found[0] if found else None

    def _load(self, checkpoint: Path) -> None:
        try:
            tensors = load_file(checkpoint / STATE_FILE)
            saved = load_file(checkpoint / WEIGHTS_FILE)
            progress = json.loads((checkpoint / PROGRESS_FILE).read_text())
            self.step, self.seconds = int(progress["step"]), float(progress["seconds"])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise BundleError(
                f"{checkpoint}: the training state cannot be read ({error}); remove this directory "
                "to go on from the checkpoint before it"
            ) from None
        carried = tensors.pop(CARRIED, None)
        if carried is not None:
            own = carried.chunk(self.ranks.world)[self.ranks.rank]
            self.stage.carried = own.to(self.ranks.device, copy=True)
        state: dict[str, dict[int, dict[str, Tensor]]] = {n: {} for n in self.optimizers}
        parameters = dict(self.stage.loss.named_parameters())
        wanted = {f"{kind}.{n}" for kind in ("weights", "average") for n in parameters}
        if wanted != {n for n in tensors if not n.startswith("optimizer.")}:
            raise BundleError(f"{checkpoint / STATE_FILE}: not the training state of this model")
        with torch.no_grad():
            for key, tensor in tensors.items():
                kind, _, name = key.partition(".")
                if kind == "optimizer":
                    owner, index, field = name.split(".")
                    # a copy: the file would stay mapped, and Windows and NFS not let it go
                    state[owner].setdefault(int(index), {})[field] = tensor.clone()
                else:
                    place = parameters if kind == "weights" else self.average.shadow
                    place[name].copy_(tensor)
            for name, buffer in self.stage.model.named_buffers():
                if name in saved:  # the scale of the latents
                    buffer.copy_(saved[name])
        for name, optimizer in self.optimizers.items():
            whole = optimizer.state_dict()
            optimizer.load_state_dict({"state": state[name], "param_groups": whole["param_groups"]})

    def _claim(self, description: dict[str, Any]) -> None:
        """Make the directory this run's, or see that it already is; one without a checkpoint is
        anyone's."""
        wanted = {
            "stage": self.stage.name,
            "model": to_dict(self.stage.model.config),
            "training": to_dict(self.config),
            **description,
        }
        path = self.directory / RUN_FILE
        if path.is_file():
            try:
                found = json.loads(path.read_text())
                before, data = dict(found["training"]), dict(found.get("data") or {})
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise BundleError(
                    f"{path}: cannot be read ({error}); choose another directory"
                ) from None
            # a longer run, or other habits of logging, may go on from the same checkpoints
            free = {"steps", "decay_steps", "minutes", "checkpoint_every", "keep_checkpoints",
                    "log_every", "sample_every"}  # fmt: skip
            differing = [
                k for k in ("stage", "model", "autoencoder") if found.get(k) != wanted.get(k)
            ]
            if other := _other_data(data, dict(wanted.get("data") or {})):
                differing.append(f"data ({', '.join(other)})")
            if "stage" not in differing:
                now = wanted["training"]
                usual = to_dict(type(self.config)(steps=1, batch=1))
                before = usual | before  # options that there were not yet
                differing += [k for k in now if k not in free and now[k] != before[k]]
            if differing and find_checkpoints(self.directory):
                raise ConfigError(
                    f"{self.directory}: holds a run with another {' and '.join(differing)}; choose "
                    "another directory, or give the same options to resume it"
                )
        if self.ranks.main:
            with refusals(self.directory):
                self.directory.mkdir(exist_ok=True)
            with alone(self.directory, "trains"), refusals(self.directory):
                for left in self.directory.glob(".step_*"):  # by a process that was killed
                    shutil.rmtree(left)
                with replacing(path) as temporary:  # other ranks may be reading
                    temporary.write_text(json.dumps(wanted, indent=2) + "\n")
        if self.ranks.world > 1:
            dist.barrier()


def find_checkpoints(directory: Path) -> list[Path]:
    """Checkpoints of a run, oldest first. Folders of other names, as of copies, are its user's."""
    named = [p for p in directory.glob("step_*") if p.name.removeprefix("step_").isdecimal()]
    found = [p for p in named if (p / PROGRESS_FILE).is_file()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def latest_checkpoint(path: Path) -> Path:
    """The newest checkpoint of a run directory, or the path itself if it is one.

    Raises:
        BundleError: if there is none.
    """
    if (path / WEIGHTS_FILE).is_file():
        return path
    found = find_checkpoints(path)
    if not found:
        raise BundleError(f"{path}: neither a checkpoint nor a run with checkpoints")
    return found[-1]


def load_weights(path: Path, *, whole: bool = False) -> tuple[FrameModel, SamplingConfig]:
    """Model and sampling options of a run directory, a checkpoint, or a bundle (by path or packaged
    name), in float32 and evaluation mode. `whole`: as `load_checkpoint` takes it.

    Raises:
        BundleError: if there is none of them, it is damaged, or an autoencoder where `whole`.
        ConfigError: if the configuration is not valid.
    """
    if path.is_dir() and not (path / MANIFEST).is_file():
        return load_checkpoint(latest_checkpoint(path), whole=whole)
    packaged = packaged_names()
    if not path.exists() and str(path) not in packaged:
        raise BundleError(
            f"{path}: neither a checkpoint nor a run, nor a bundle by its path or name "
            f"({', '.join(packaged)})"
        )
    bundle = Bundle.open(path)
    return load_model(bundle), bundle.manifest.profile()


def _logged_step(line: str) -> float:
    """The step of a line of the log; infinite for one that was cut when its writer was killed."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _other_data(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """In what two descriptions of data differ, wherever they lie now. Latents are what
    `latents.json` says of them; older ones do not name their data."""
    both = a.keys() & b.keys()
    alone = (a.keys() ^ b.keys()) - {"name", "root", "seeds"}
    return sorted(alone | {k for k in both - {"root"} if a[k] != b[k]})


def _check_source(stage: Stage, source: ClipSource, what: str = "", then: str = "") -> None:
    ae, t = stage.model.config.autoencoder, stage.model.config.autoencoder.temporal_compression
    if (source.height, source.width) != (ae.height, ae.width):
        raise InputError(
            f"{what}clips are {source.height}x{source.width}, the model wants "
            f"{ae.height}x{ae.width}{then}"
        )
    check_length(source.frames, t)
    if stage.name == "model":
        check_actions(stage.model.config, source.action_dim, what, then)
