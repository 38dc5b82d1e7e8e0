"""Sources of clips: clip i is always clip i, whoever asks, and latents come back as written."""

from __future__ import annotations

import json
import threading
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from canvasmar_rt.errors import BundleError, ConfigError, InputError
from tests.training.small_runs import Waves
from training.clips import (
    AheadSource,
    Clips,
    LatentClips,
    LatentSource,
    ToyTableSource,
    alone,
    batches,
    latent_actions,
    to_device,
    write_latents,
)
from training.toytable import ToyTableConfig, generate

# ToyTable


def test_toytable_clips_are_the_worlds() -> None:
    source = ToyTableSource(frames=4, size=16, seed=3)
    assert (source.height, source.width, source.action_dim) == (16, 16, 2)
    drawn = source.clips(5, 3)
    world = generate(ToyTableConfig(size=16), batch=3, frames=4, seed=3, first_clip=5, device="cpu")
    assert torch.equal(drawn.frames, world.frames)
    assert drawn.actions is not None
    assert torch.equal(drawn.actions, world.actions)
    assert drawn.frames.shape == (3, 4, 16, 16, 3)
    assert drawn.frames.dtype == torch.uint8
    assert drawn.actions.shape == (3, 3, 2)


def test_a_toytable_clip_is_a_function_of_its_index() -> None:
    source = ToyTableSource(frames=3, size=16, seed=3)
    whole = source.clips(0, 6)
    part = ToyTableSource(frames=3, size=16, seed=3).clips(4, 2)
    assert whole.actions is not None
    assert part.actions is not None
    assert torch.equal(whole.actions[4:], part.actions)
    # the last bits of the drawing may depend on the batch
    assert (whole.frames[4:].int() - part.frames.int()).abs().max() <= 1
    other = ToyTableSource(frames=3, size=16, seed=4).clips(0, 6)
    assert not torch.equal(whole.frames, other.frames)


# Actions


def test_latent_actions_are_in_order_of_time() -> None:
    actions = torch.arange(2 * 6 * 2).reshape(2, 6, 2)
    out = latent_actions(actions, 3)
    assert out.shape == (2, 2, 6)
    for b in range(2):
        for i in range(2):
            expected = [int(actions[b, 3 * i + k, a]) for k in range(3) for a in range(2)]
            assert out[b, i].tolist() == expected
    assert torch.equal(latent_actions(actions, 1), actions)
    assert latent_actions(actions[:, :0], 3).shape == (2, 0, 6)


def test_actions_must_make_whole_steps() -> None:
    with pytest.raises(InputError, match=r"5 actions.*steps of 2.*1 \+ n\*2"):
        latent_actions(torch.zeros(1, 5, 2), 2)


# Batches


@dataclass
class Indices:
    """A source of clips that are their own index; remembers what was asked of it and where."""

    frames: int = 1
    height: int = 1
    width: int = 1
    action_dim: int = 0
    asked: list[tuple[int, int]] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)
    broken_from: int = 10**9

    def clips(self, first: int, count: int) -> Clips | LatentClips:
        if first >= self.broken_from:
            raise InputError(f"clip {first} cannot be read")
        self.asked.append((first, count))
        self.threads.add(threading.get_ident())
        frames = torch.arange(first, first + count).reshape(-1, 1, 1, 1, 1)
        return Clips(frames=frames, actions=None)


def indices(clips: Clips | LatentClips) -> list[int]:
    assert isinstance(clips, Clips)
    return clips.frames.flatten().tolist()


def test_batches_follow_one_another() -> None:
    found = [indices(b) for b in batches(Indices(), first_step=2, steps=5, batch=3)]
    assert found == [[6, 7, 8], [9, 10, 11], [12, 13, 14]]
    assert not list(batches(Indices(), first_step=5, steps=5, batch=3))


def test_blocks_drawn_ahead_hold_the_same_clips() -> None:
    for dim in (2, 0):
        source = Waves(action_dim=dim)
        ahead = AheadSource(source, 4)
        for first, count in ((0, 3), (3, 3), (6, 2), (1, 10), (11, 1)):
            got, want = ahead.clips(first, count), source.clips(first, count)
            assert isinstance(want, Clips)
            assert torch.equal(got.frames, want.frames)
            if dim:
                assert torch.equal(
                    typing.cast(Tensor, got.actions), typing.cast(Tensor, want.actions)
                )
            else:
                assert got.actions is None


def test_each_block_is_drawn_once() -> None:
    source = Indices()
    ahead = AheadSource(source, 5)
    found = [indices(b) for b in batches(ahead, first_step=0, steps=7, batch=3)]
    assert found == [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(7)]
    assert source.asked == [(0, 5), (5, 5), (10, 5), (15, 5), (20, 5)]


def test_ranks_share_a_batch() -> None:
    whole = [indices(b) for b in batches(Indices(), first_step=1, steps=4, batch=6)]
    shares = [
        [indices(b) for b in batches(Indices(), first_step=1, steps=4, batch=6, rank=r, world=3)]
        for r in range(3)
    ]
    assert [[*a, *b, *c] for a, b, c in zip(*shares, strict=True)] == whole
    with pytest.raises(InputError, match="7 clips cannot be shared by 2 ranks"):
        next(batches(Indices(), first_step=0, steps=1, batch=7, world=2))


def test_clips_stay_and_go_one_after_another() -> None:
    source = Indices()
    found = [indices(b) for b in batches(source, first_step=0, steps=5, batch=4, stay=3)]
    assert found == [[0, 1, 2, 3], [0, 1, 6, 3], [0, 9, 6, 3], [12, 9, 6, 15], [12, 9, 18, 15]]
    assert [first for first, _ in source.asked] == [0, 1, 2, 3, 6, 9, 12, 15, 18]
    again = [indices(b) for b in batches(Indices(), first_step=3, steps=5, batch=4, stay=3)]
    assert again == found[3:]
    shares = [
        [
            indices(b)
            for b in batches(Indices(), first_step=0, steps=5, batch=4, rank=r, world=2, stay=3)
        ]
        for r in range(2)
    ]
    assert [[*a, *b] for a, b in zip(*shares, strict=True)] == found


def test_the_next_batch_is_prepared_while_one_is_used() -> None:
    source = Indices()
    stream = batches(source, first_step=0, steps=3, batch=2)
    next(stream)
    for _ in range(1000):  # the thread needs a moment
        if len(source.asked) == 2:
            break
        threading.Event().wait(0.01)
    assert source.asked == [(0, 2), (2, 2)]  # one ahead, not more
    assert threading.get_ident() not in source.threads
    assert [indices(b) for b in stream] == [[2, 3], [4, 5]]


def test_what_breaks_in_the_source_reaches_the_caller() -> None:
    stream = batches(Indices(broken_from=4), first_step=0, steps=5, batch=2)
    assert indices(next(stream)) == [0, 1]
    assert indices(next(stream)) == [2, 3]
    with pytest.raises(InputError, match="clip 4 cannot be read"):
        next(stream)


def test_clips_move_to_a_device_whole() -> None:
    clips = Clips(frames=torch.zeros(1, 2), actions=None)
    moved = to_device(clips, torch.device("meta"))
    assert moved.frames.device.type == "meta"
    assert moved.actions is None
    latents = LatentClips(latents=torch.zeros(2), actions=torch.ones(2))
    there = to_device(latents, torch.device("meta"))
    assert there.latents.device.type == "meta"
    assert there.actions is not None
    assert there.actions.device.type == "meta"


# Latents


def encode(frames: Tensor) -> Tensor:
    """Means of 8x8 pixels of the latent frames' first pictures: (B, 1+n, 4, 3)."""
    x = frames[:, [0, *range(1, frames.shape[1], 2)]].float() / 127.5 - 1
    return x.unflatten(2, (2, 8)).unflatten(4, (2, 8)).mean((3, 5)).flatten(2, 3)


def write(directory: Path, **options: Any) -> None:
    source = options.pop("source", Waves())
    write_latents(
        source, encode, directory, temporal_compression=2, autoencoder="abc",
        data={"name": "waves"}, **{"clips": 11, "batch": 2, "shard": 4} | options,
    )  # fmt: skip


def test_latents_come_back(tmp_path: Path) -> None:
    done: list[int] = []
    write(tmp_path, progress=done.append)
    assert done == [2, 2, 2, 2, 2, 1]
    shards = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert [len(load_file(tmp_path / s)["latents"]) for s in shards] == [4, 4, 3]
    assert load_file(tmp_path / shards[0])["latents"].dtype == torch.float16
    source = LatentSource(tmp_path, seed=7)
    assert (source.frames, source.height, source.width, source.action_dim) == (5, 16, 16, 2)
    assert (source.about["autoencoder"], source.about["name"]) == ("abc", "waves")

    drawn = Waves().clips(0, 11)
    assert isinstance(drawn, Clips)
    assert drawn.actions is not None
    expected, actions = encode(drawn.frames), latent_actions(drawn.actions, 2)
    clips = source.clips(0, 11)
    assert clips.latents.dtype == torch.float32
    assert clips.latents.shape == (11, 3, 4, 3)
    assert clips.actions is not None
    order = [int((expected - clip).abs().sum((1, 2, 3)).argmin()) for clip in clips.latents]
    assert sorted(order) == list(range(11))
    torch.testing.assert_close(clips.latents, expected[order], atol=1e-3, rtol=0)  # float16
    assert torch.equal(clips.actions, actions[order])


def test_two_processes_do_not_encode_into_one_directory(tmp_path: Path) -> None:
    write(tmp_path)
    listing = (tmp_path / "latents.json").read_bytes()
    with alone(tmp_path, "encodes"), pytest.raises(ConfigError, match="another process encodes"):
        write(tmp_path, clips=3)
    assert (tmp_path / "latents.json").read_bytes() == listing


def test_latents_without_actions(tmp_path: Path) -> None:
    write(tmp_path, source=Waves(action_dim=0))
    assert LatentSource(tmp_path).clips(0, 2).actions is None


def test_every_epoch_is_a_permutation(tmp_path: Path) -> None:
    write(tmp_path)
    source = LatentSource(tmp_path, seed=1)
    rows = source.clips(0, 44).latents.flatten(1)
    epochs = [[tuple(r) for r in rows[11 * e : 11 * e + 11].tolist()] for e in range(4)]
    for epoch in epochs[1:]:
        assert sorted(epoch) == sorted(epochs[0])
        assert epoch != epochs[0]
    # a pure function of the index, across the borders of epochs and backwards
    for first in (30, 9, 0):
        again = source.clips(first, 5).latents.flatten(1)
        assert torch.equal(again, rows[first : first + 5])
    assert torch.equal(LatentSource(tmp_path, seed=1).clips(20, 9).latents.flatten(1), rows[20:29])
    assert not torch.equal(
        LatentSource(tmp_path, seed=2).clips(0, 11).latents.flatten(1), rows[:11]
    )


def test_latents_of_several_directories_are_one_set(tmp_path: Path) -> None:
    parts = [tmp_path / name for name in "ab"]
    for part in parts:
        part.mkdir()
    write(parts[0])
    write(parts[1], source=Waves(seed=1))
    with pytest.raises(InputError, match=r"b: the same clips as in .*a, both are of seed 0; give"):
        LatentSource(*parts)
    rewrite(seed=1)(parts[1])
    source = LatentSource(*parts)
    assert source.about["clips"] == 22
    rows = {tuple(r) for r in source.clips(0, 22).latents.flatten(1).tolist()}
    each = [LatentSource(part).clips(0, 11).latents.flatten(1).tolist() for part in parts]
    assert rows == {tuple(r) for part in each for r in part}
    rewrite(autoencoder="another")(parts[1])
    with pytest.raises(InputError, match=r"b: .* other data than .*a \(they differ in autoenc"):
        LatentSource(*parts)


def test_encoding_stops_with_the_shard_that_was_begun_in_time(tmp_path: Path) -> None:
    write(tmp_path, seconds=0.0)
    source = LatentSource(tmp_path)
    assert (source.about["clips"], len(source.about["shards"])) == (4, 1)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_a_smaller_set_leaves_nothing_of_the_one_before(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "latents_mine.safetensors").write_bytes(b"its user's")
    write(tmp_path, clips=5)
    names = ["latents_00000.safetensors", "latents_00001.safetensors"]
    assert LatentSource(tmp_path).about["shards"] == names
    assert sorted(p.name for p in tmp_path.glob("latents_*")) == [
        *names, "latents_mine.safetensors",
    ]  # fmt: skip


def cut(directory: Path) -> None:
    shard = directory / "latents_00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])


def foreign(directory: Path) -> None:
    save_file({"latents": torch.zeros(4, 3, 9, 3).half()}, directory / "latents_00001.safetensors")


def shorter(directory: Path) -> None:
    shard = directory / "latents_00001.safetensors"
    save_file({n: t[:1].clone() for n, t in load_file(shard).items()}, shard)


def no_actions(directory: Path) -> None:
    for shard in directory.glob("*.safetensors"):
        save_file({"latents": load_file(shard)["latents"]}, shard)


def rewrite(**changes: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        about = json.loads((directory / "latents.json").read_text())
        (directory / "latents.json").write_text(json.dumps(about | changes))

    return change


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        foreign,
        shorter,
        no_actions,
        rewrite(shards=[]),
        rewrite(shards=[], clips=0),
        rewrite(shards=3),
        rewrite(frames="x"),
        rewrite(height=float("inf")),
        rewrite(action_dim=-1),
        rewrite(seed=[1]),
        lambda d: (d / "latents_00002.safetensors").unlink(),
        lambda d: (d / "latents.json").unlink(),
        lambda d: (d / "latents.json").write_text('{"shards": ['),
        lambda d: (d / "latents.json").write_text("[]"),
        lambda d: (d / "latents.json").write_text("{}"),
    ],
)  # fmt: skip
def test_damaged_latents_are_refused(damage: Callable[[Path], Any], tmp_path: Path) -> None:
    write(tmp_path)
    damage(tmp_path)
    with pytest.raises(BundleError, match=r"no whole set of latents.*encode") as error:
        LatentSource(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_an_interrupted_encoding_is_not_a_set(tmp_path: Path) -> None:
    """What was there before is, until there is something in its place."""
    write(tmp_path)

    def stopped(batches: int) -> None:
        left = iter(range(batches))

        def stop(done: int) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, progress=stop)

    stopped(1)  # two make a shard
    assert LatentSource(tmp_path).about["clips"] == 11
    stopped(2)
    with pytest.raises(BundleError):
        LatentSource(tmp_path)


def test_sets_are_told_by_their_seeds_and_read_by_all(tmp_path: Path) -> None:
    for seed in (5, 3):
        write(tmp_path / str(seed), seed=seed)
    source = LatentSource(tmp_path / "5", tmp_path / "3")
    assert source.about["seeds"] == [5, 3]
    assert {path.stat().st_mode & 0o044 for path in tmp_path.glob("*/*")} == {0o044}


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr("training.clips.save_file", fail)
    with pytest.raises(InputError, match=r"latents_00000.safetensors: cannot be written \(.*space"):
        write(tmp_path)


def test_the_test_source_is_pure() -> None:
    whole, part = Waves().clips(0, 4), Waves().clips(2, 2)
    assert isinstance(whole, Clips)
    assert isinstance(part, Clips)
    np.testing.assert_array_equal(whole.frames[2:], part.frames)
