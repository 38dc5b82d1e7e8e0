"""Clips for training: what every source of data gives, and ToyTable as one.

Notation: B clips, T pixel frames, A action size per pixel frame, t pixel frames per latent frame.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from canvasmar_rt.config import ModelConfig
from canvasmar_rt.errors import BundleError, ConfigError, InputError
from canvasmar_rt.files import check_writable, refusals, replacing, write_file
from training.toytable import ToyTableConfig, generate

_LATENTS_FILE = "latents.json"


@dataclass(frozen=True, kw_only=True)
class Clips:
    """A batch of clips. `actions[:, i]` is taken between pixel frames i and i+1."""

    frames: Tensor  # (B, T, H, W, 3) uint8
    actions: Tensor | None  # (B, T-1, A) float32, None if the data has none


@dataclass(frozen=True, kw_only=True)
class LatentClips:
    """A batch of clips that have been through the autoencoder: normalised latents, and the actions
    of latent steps, `actions[:, i]` leading from latent frame i to i+1."""

    latents: Tensor  # (B, 1+n, N, C) float32
    actions: Tensor | None  # (B, n, t*A) float32


AnyClips = TypeVar("AnyClips", bound=Clips | LatentClips)


class ClipSource(Protocol):
    """An endless stream of clips. Clip i is a pure function of the source's seed and i, so a run
    resumes at any step and the ranks of a group share a batch by index.

    `frames`, `height`, `width` are the clips' size, `action_dim` is A, 0 for data without actions.
    """

    @property
    def frames(self) -> int: ...

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def action_dim(self) -> int: ...

    def clips(self, first: int, count: int) -> Clips | LatentClips:
        """Clips first ... first + count - 1."""
        ...


@dataclass(frozen=True, kw_only=True)
class ToyTableSource:
    """Clips of the ToyTable world, drawn when asked for."""

    frames: int = 17
    size: int = 64
    seed: int = 0
    device: str = "cpu"

    @property
    def height(self) -> int:
        return self.size

    @property
    def width(self) -> int:
        return self.size

    @property
    def action_dim(self) -> int:
        return 2

    def clips(self, first: int, count: int) -> Clips:
        drawn = generate(
            ToyTableConfig(size=self.size),
            batch=count,
            frames=self.frames,
            seed=self.seed,
            first_clip=first,
            device=self.device,
        )
        return Clips(frames=drawn.frames, actions=drawn.actions)


class AheadSource:
    """Another source's pixel clips, drawn in blocks of `ahead`: a GPU draws a thousand clips in
    little more time than ten."""

    def __init__(self, source: ClipSource, ahead: int) -> None:
        self.frames, self.height, self.width = source.frames, source.height, source.width
        self.action_dim = source.action_dim
        self._source, self._ahead = source, ahead
        self._blocks: dict[int, Clips] = {}

    def clips(self, first: int, count: int) -> Clips:
        end, size = first + count, self._ahead
        self._blocks = {i: self._block(i) for i in range(first // size, -(-end // size))}
        parts = [
            (b, slice(max(first - i * size, 0), end - i * size)) for i, b in self._blocks.items()
        ]
        return _together(
            [
                Clips(frames=b.frames[part], actions=None if b.actions is None else b.actions[part])
                for b, part in parts
            ]
        )

    def _block(self, index: int) -> Clips:
        if index in self._blocks:
            return self._blocks[index]
        drawn = self._source.clips(index * self._ahead, self._ahead)
        assert isinstance(drawn, Clips)
        return drawn


def check_length(frames: int, t: int) -> None:
    """See that clips of so many pixel frames are whole latent frames.

    Raises:
        InputError: if they are not 1 + n*t frames long.
    """
    if frames < 1 or (frames - 1) % t:
        raise InputError(f"clips of {frames} frames: the model wants 1 + n*{t}")


def check_actions(config: ModelConfig, action_dim: int, what: str = "", then: str = "") -> None:
    """See that a model of actions takes those of clips with `action_dim` numbers a frame, if any.

    Raises:
        InputError: if it takes others; `what` and `then` go around the words.
    """
    step = action_dim * config.autoencoder.temporal_compression * config.group
    if step and config.action_dim not in (0, step):
        raise InputError(
            f"{what}actions of {action_dim} numbers a frame make {step} a step, the model's "
            f"action_dim is {config.action_dim}{then}"
        )


def check_shared(batch: int, world: int) -> None:
    """See that the ranks can share a batch evenly.

    Raises:
        InputError: if they cannot.
    """
    if batch % world:
        raise InputError(
            f"a batch of {batch} clips cannot be shared by {world} ranks; make it a multiple"
        )


def latent_actions(actions: Tensor, t: int) -> Tensor:
    """Actions of pixel steps (B, n*t, A) -> of latent steps (B, n, t*A), in order of time.

    Raises:
        InputError: if the number of actions is not a multiple of t.
    """
    if actions.shape[1] % t:
        raise InputError(
            f"{actions.shape[1]} actions do not make whole latent steps of {t}; a clip has "
            f"1 + n*{t} frames"
        )
    return actions.reshape(len(actions), actions.shape[1] // t, t * actions.shape[2])


def age(step: int, slot: int, stay: int) -> int:
    """For how many steps the clip in a slot of the batch has been there; clips come and go a few at
    a time, each staying for `stay` steps."""
    return min(step, (step + slot) % stay)


def batches(
    source: ClipSource,
    *,
    first_step: int,
    steps: int,
    batch: int,
    rank: int = 0,
    world: int = 1,
    stay: int = 1,
    pinned: bool = False,
) -> Iterator[Clips | LatentClips]:
    """This rank's share of the batches of steps first_step ... steps - 1, the next one being
    prepared in a thread while the last is used. `batch` counts the clips of all ranks; a clip
    stays in its slot for `stay` steps (`age`). What is on the CPU is `pinned` if asked for, so that
    nobody waits for it to be copied to a GPU.

    Raises:
        InputError: if `batch` cannot be shared evenly.
    """
    check_shared(batch, world)
    share = batch // world
    slots = range(rank * share, (rank + 1) * share)
    held: dict[int, tuple[int, Clips | LatentClips]] = {}  # by slot: a clip's number, and the clip

    def prepare(step: int) -> Clips | LatentClips:
        clips = gather(step)
        return _each(clips, lambda t: t if t.is_cuda else t.pin_memory()) if pinned else clips

    def gather(step: int) -> Clips | LatentClips:
        if stay == 1:
            return source.clips(step * batch + slots.start, share)
        for slot in slots:
            number = (step - age(step, slot, stay)) * batch + slot
            if slot not in held or held[slot][0] != number:
                held[slot] = number, source.clips(number, 1)
        return _together([held[slot][1] for slot in slots])

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(prepare, first_step) if first_step < steps else None
        for step in range(first_step, steps):
            assert following is not None
            ready = following.result()
            following = pool.submit(prepare, step + 1) if step + 1 < steps else None
            yield ready


def _together(parts: Sequence[AnyClips]) -> AnyClips:
    """One batch of several; all of them have actions, or none has."""
    columns = {f.name: [getattr(p, f.name) for p in parts] for f in fields(parts[0])}
    joined: dict[str, Any] = {n: torch.cat(c) for n, c in columns.items() if c[0] is not None}
    return replace(parts[0], **joined)


def to_device(clips: AnyClips, device: torch.device) -> AnyClips:
    """The same clips on another device."""
    return _each(clips, lambda t: t.to(device, non_blocking=True))


def _each(clips: AnyClips, change: Callable[[Tensor], Tensor]) -> AnyClips:
    tensors = {f.name: getattr(clips, f.name) for f in fields(clips)}
    changed: dict[str, Any] = {n: change(t) for n, t in tensors.items() if t is not None}
    return replace(clips, **changed)


# -- latents made once


class LatentSource:
    """Latents written by `write_latents`, into one directory or several, shuffled anew every
    epoch."""

    def __init__(self, *directories: Path, seed: int = 0) -> None:
        """
        Raises:
            BundleError: if a shard is missing or cut, or shards do not belong together.
            InputError: if directories do not belong together.
        """
        self.about: dict[str, Any] = {}
        self._shards: list[dict[str, Tensor]] = []
        own: dict[str, Any] = {"shards": [], "clips": 0}
        seeds: dict[int, Path] = {}
        for directory in directories:
            about, shards = _read_latents(directory)
            drawn = about.pop("seed", None)  # older sets do not tell
            if drawn in seeds:
                raise InputError(
                    f"{directory}: the same clips as in {seeds[drawn]}, both are of seed {drawn}; "
                    "give each `encode` another --seed"
                )
            if drawn is not None:
                seeds[drawn] = directory
            self.about = self.about or about | own
            differing = sorted(
                k
                for k in (about.keys() | self.about.keys()) - own.keys()
                if about.get(k) != self.about.get(k)
            )
            if differing:
                raise InputError(
                    f"{directory}: latents of other data than {directories[0]} (they differ in "
                    f"{', '.join(differing)})"
                )
            self.about["shards"] += about["shards"]
            self.about["clips"] += about["clips"]
            self._shards += shards
        self._ends = np.cumsum([len(s["latents"]) for s in self._shards])
        self._seed, self._epoch, self._order = seed, -1, np.empty(0, np.int64)
        if seeds:
            self.about["seeds"] = list(seeds)

    @property
    def frames(self) -> int:
        return int(self.about["frames"])

    @property
    def height(self) -> int:
        return int(self.about["height"])

    @property
    def width(self) -> int:
        return int(self.about["width"])

    @property
    def action_dim(self) -> int:
        return int(self.about["action_dim"])

    def _pick(self, index: int) -> tuple[int, int]:
        """Shard and row of the clip in a place of the endless stream."""
        epoch, place = divmod(index, int(self._ends[-1]))
        if epoch != self._epoch:
            self._order = np.random.default_rng((self._seed, epoch)).permutation(self._ends[-1])
            self._epoch = epoch
        number = self._order[place]
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, int(number - self._ends[shard])  # counted from the shard's end

    def clips(self, first: int, count: int) -> LatentClips:
        picked = [self._pick(i) for i in range(first, first + count)]

        def gathered(name: str) -> Tensor:
            return torch.stack([self._shards[shard][name][row] for shard, row in picked]).float()

        actions = gathered("actions") if self.action_dim else None
        return LatentClips(latents=gathered("latents"), actions=actions)


def _read_latents(directory: Path) -> tuple[dict[str, Any], list[dict[str, Tensor]]]:
    """What a directory's listing tells, and its shards, mapped from disk."""
    try:
        about: dict[str, Any] = json.loads((directory / _LATENTS_FILE).read_text())
        for key, least in (("frames", 1), ("height", 1), ("width", 1), ("action_dim", 0)):
            if type(about[key]) is not int or about[key] < least:
                raise ValueError(f"{key} is {about[key]!r}")
        if type(about.get("seed", 0)) is not int:
            raise ValueError(f"seed is {about['seed']!r}")
        shards = [load_file(directory / name) for name in about["shards"]]
        names = ("latents", "actions") if int(about["action_dim"]) else ("latents",)
        for name in names:
            if len({shard[name].shape[1:] for shard in shards}) > 1:
                raise ValueError(f"shards whose {name} differ in size")
            found = sum(len(shard[name]) for shard in shards)
            if not found or found != about["clips"]:
                raise ValueError(f"expected {about['clips']} clips, found {found}")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise BundleError(
            f"{directory}: no whole set of latents ({error}); make it again with "
            "`python -m training encode`"
        ) from None
    return about, shards


@contextmanager
def alone(directory: Path, does: str) -> Iterator[None]:
    """No other process of this machine works in the directory meanwhile; `does` says what one does.

    Raises:
        ConfigError: if another one does.
        InputError: if nothing can be written there.
    """
    lock = FileLock(directory / ".lock", timeout=0)
    with refusals(directory):
        try:
            lock.acquire()
        except Timeout:
            raise ConfigError(
                f"{directory}: another process {does} there; wait for it, or choose another "
                "directory"
            ) from None
    try:
        yield
    finally:
        lock.release()


def write_latents(
    source: ClipSource,
    encode: Callable[[Tensor], Tensor],
    directory: Path,
    *,
    clips: int,
    temporal_compression: int,
    autoencoder: str,
    data: Mapping[str, Any],
    seed: int = 0,
    batch: int = 16,
    shard: int = 2048,
    seconds: float = math.inf,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Encode clips 0 ... `clips` - 1 of a source into float16 shards, or as many whole shards as
    are begun within so many `seconds`. `encode` maps uint8 frames (B, T, H, W, 3) to latents
    (B, 1+n, N, C); `autoencoder` identifies it, `data` and `seed` tell what the clips are. The list
    of shards is written last: without it nothing reads the directory.

    Raises:
        ConfigError: if another process encodes there.
        InputError: if a file cannot be written.
    """
    listing = directory / _LATENTS_FILE
    check_writable(listing)
    with alone(directory, "encodes"):
        names: list[str] = []
        begun, encoded = time.monotonic(), 0
        for start in range(0, clips, shard):
            if names and time.monotonic() - begun > seconds:
                break
            parts: dict[str, list[Tensor]] = {"latents": [], "actions": []}
            for first in range(start, min(start + shard, clips), batch):
                drawn = source.clips(first, min(batch, start + shard - first, clips - first))
                assert isinstance(drawn, Clips)
                parts["latents"].append(encode(drawn.frames).half().cpu())
                if drawn.actions is not None:
                    actions = latent_actions(drawn.actions, temporal_compression)
                    parts["actions"].append(actions.cpu())
                progress(len(drawn.frames))
            names.append(f"latents_{len(names):05d}.safetensors")
            tensors = {n: torch.cat(p).contiguous() for n, p in parts.items() if p}
            with refusals(directory / names[-1]):
                if not start:  # an earlier set stays until there is something in its place
                    listing.unlink(missing_ok=True)
                with replacing(directory / names[-1]) as temporary:
                    save_file(tensors, temporary)
            encoded += len(tensors["latents"])
        about = {
            **data,
            "shards": names,
            "clips": encoded,
            "frames": source.frames,
            "height": source.height,
            "width": source.width,
            "action_dim": source.action_dim,
            "autoencoder": autoencoder,
            "seed": seed,
        }
        write_file(listing, json.dumps(about, indent=2) + "\n")
        with refusals(directory):
            for left in directory.glob(f"latents_{'[0-9]' * 5}.safetensors"):  # of a larger set
                if left.name not in names:
                    left.unlink()
