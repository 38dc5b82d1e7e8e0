"""Readers of data sets: whole ones, broken ones, and the promise that clip i is always clip i."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from canvasmar_rt.errors import ConfigError, InputError
from canvasmar_rt.video import Clip, read_clip, write_clip
from tests.training.tfrecord_writer import Feature, example, file_of, record
from training import datasets
from training.clips import Clips
from training.datasets import DataSet, RecordedClips, _batch, make_source

Frames = NDArray[np.uint8]
LENGTH = 9  # frames of a made recording
BIG = {"frames": 4, "height": 64, "width": 64}
SMALL = {"frames": 4, "height": 16, "width": 16}


def moving(seed: int, size: int = 64, frames: int = LENGTH) -> Frames:
    """Smooth colours in motion, (T, size, size, 3), different in every frame and for each seed."""
    t, y, x = np.mgrid[0:frames, 0:size, 0:size] / size
    waves = [np.sin((seed + k + 2) * (x + y * k) + 9 * t + seed) for k in range(3)]
    return (127.5 + 120 * np.stack(waves, axis=-1)).astype(np.uint8)


def moves(seed: int, frames: int = LENGTH) -> NDArray[np.float32]:
    return (np.arange(frames * 4).reshape(frames, 4) / 8 + 100 * seed).astype(np.float32)


def trajectory(seed: int) -> dict[str, Feature]:
    """What a record of BAIR holds; the main camera shows the other one's negative."""
    features: dict[str, Feature] = {}
    for i, (picture, action) in enumerate(zip(moving(seed), moves(seed), strict=True)):
        features[f"{i}/image_aux1/encoded"] = picture.tobytes()
        features[f"{i}/image_main/encoded"] = (255 - picture).tobytes()
        features[f"{i}/action"] = action.tolist()
        features[f"{i}/endeffector_pos"] = [0.5, 0.25, 0.125]
    return features


def bair(root: Path) -> Path:
    """Five trajectories in three files, whose natural order is not that of the alphabet."""
    folder = root / "softmotion30_44k" / "test"
    folder.mkdir(parents=True)
    for name, seeds in {"0_to_1": [0, 1], "2_to_9": [2], "10_to_11": [3, 4]}.items():
        (folder / f"traj_{name}.tfrecords").write_bytes(file_of(map(trajectory, seeds)))
    return root


def save_pictures(folder: Path, frames: Frames) -> None:
    folder.mkdir(parents=True)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{i}.png")


def pictures(root: Path) -> Path:
    """Three folders of more than ten numbered pictures, as in `processed_data/test`."""
    for seed in range(3):
        folder = root / "processed_data" / "test" / "traj_0_to_255" / str(8 + seed)
        save_pictures(folder, moving(seed, 16, frames=12))
    return root


def archives(root: Path) -> Path:
    for seed in range(4):
        frames = moving(seed, 16)
        np.savez(root / f"{seed}.npz", frames=frames, actions=moves(seed)[:-1])
    return root


def place(part: torch.Tensor | Frames, whole: Frames, stride: int = 1) -> int:
    """Where in `whole` the frames `part` begin; -1 if they are not in it."""
    wanted = np.asarray(part)
    span = (len(wanted) - 1) * stride + 1
    for start in range(len(whole) - span + 1):
        if np.array_equal(whole[start : start + span : stride], wanted):
            return start
    return -1


def same(one: Clips, other: Clips) -> bool:
    if one.actions is None or other.actions is None:
        return torch.equal(one.frames, other.frames) and one.actions is other.actions
    return torch.equal(one.frames, other.frames) and torch.equal(one.actions, other.actions)


def joined(parts: list[Clips]) -> Clips:
    actions = [part.actions for part in parts if part.actions is not None]
    return Clips(
        frames=torch.cat([part.frames for part in parts]),
        actions=torch.cat(actions) if actions else None,
    )


# ---------------------------------------------------------------------------------------------
# A stream that does not depend on how it is read


def make_bair(root: Path, **options: object) -> RecordedClips:
    return make_source("bair-tfrecord", bair(root), split="test", **{**BIG, **options})


def make_broken_bair(root: Path, **options: object) -> RecordedClips:
    file = bair(root) / "softmotion30_44k" / "test" / "traj_0_to_1.tfrecords"
    data = bytearray(file.read_bytes())
    data[len(data) // 2 - 1000] ^= 1
    file.write_bytes(data)
    return make_source("bair-tfrecord", root, split="test", **{**BIG, **options})


def make_pictures(root: Path, **options: object) -> RecordedClips:
    return make_source("bair-frames", pictures(root), split="test", **{**SMALL, **options})


def make_archives(root: Path, **options: object) -> RecordedClips:
    source = {**SMALL, "action_dim": 4, **options}
    return make_source("videos", archives(root), **source)


MAKERS = [make_bair, make_broken_bair, make_pictures, make_archives]


@pytest.mark.parametrize("make", MAKERS)
def test_clips_do_not_depend_on_how_they_are_asked_for(
    make: Callable[..., RecordedClips], tmp_path: Path
) -> None:
    for name in ("whole", "parts", "threads", "other"):
        (tmp_path / name).mkdir()
    whole = make(tmp_path / "whole", seed=3).clips(0, 12)
    assert whole.frames.dtype == torch.uint8
    parts = make(tmp_path / "parts", seed=3)
    late = parts.clips(7, 5)  # a run resumed, before the others were ever read
    assert same(whole, joined([parts.clips(0, 1), parts.clips(1, 6), late]))
    assert same(whole, make(tmp_path / "threads", seed=3, workers=3).clips(0, 12))
    assert not same(whole, make(tmp_path / "other", seed=4).clips(0, 12))


def test_a_pass_shows_every_recording_and_each_pass_is_ordered_anew(tmp_path: Path) -> None:
    source = make_bair(tmp_path)
    assert (source.frames, source.height, source.width, source.action_dim) == (4, 64, 64, 4)
    assert len(source) == 5
    wholes = [moving(seed) for seed in range(5)]
    orders, starts = [], set()
    for turn in range(12):
        clips = source.clips(turn * 5, 5)
        order = []
        assert clips.actions is not None
        for frames, actions in zip(clips.frames, clips.actions, strict=True):
            found = [place(frames, whole) for whole in wholes]
            (seed,) = [i for i, start in enumerate(found) if start >= 0]
            np.testing.assert_array_equal(actions, moves(seed)[found[seed] : found[seed] + 3])
            order.append(seed)
            starts.add(found[seed])
        assert sorted(order) == list(range(5))
        orders.append(tuple(order))
    assert len(set(orders)) > 6
    assert starts == set(range(LENGTH - 4 + 1)), "every window that fits is shown"


def test_test_clips_come_in_the_order_of_the_files(tmp_path: Path) -> None:
    source = make_bair(tmp_path)
    first = list(source.test_clips(batch=2))
    assert [len(clips.frames) for clips in first] == [2, 2, 1]
    clips = joined(first)
    assert clips.actions is not None
    for seed in range(5):
        np.testing.assert_array_equal(clips.frames[seed], moving(seed)[:4])
        np.testing.assert_array_equal(clips.actions[seed], moves(seed)[:3])
    middle = joined([_batch([source._cut(item, 0.5)]) for item in range(5)])
    starts = [place(frames, moving(seed)) for seed, frames in enumerate(middle.frames)]
    assert starts == [3] * 5  # spare frames: five, of which two come after


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_test_clips_leave_out_what_is_broken_and_name_it(tmp_path: Path, batch: int) -> None:
    source = make_broken_bair(tmp_path)
    sizes = [len(clips.frames) for clips in source.test_clips(batch=batch)]
    assert sizes == [batch] * (4 // batch)
    (name,) = source.skipped
    assert name.endswith("traj_0_to_1.tfrecords#0")


def test_skipped_recordings_are_told_of_once(tmp_path: Path) -> None:
    told: list[tuple[str, str]] = []
    source = make_broken_bair(tmp_path, on_skip=lambda name, reason: told.append((name, reason)))
    wholes = [moving(seed) for seed in range(1, 5)]
    for frames in source.clips(0, 20).frames:
        assert max(place(frames, whole) for whole in wholes) >= 0
    assert told == list(source.skipped.items())
    ((name, reason),) = told
    assert name.endswith("#0")
    assert reason == "the data have the wrong checksum; copy the file again"


# ---------------------------------------------------------------------------------------------
# BAIR


def test_the_other_camera_and_no_actions(tmp_path: Path) -> None:
    source = make_bair(tmp_path, view="image_main", action_dim=0)
    (clips,) = source.test_clips()
    assert clips.actions is None
    assert source.action_dim == 0
    np.testing.assert_array_equal(clips.frames[4], 255 - moving(4)[:4])


def test_bair_is_resized_when_asked(tmp_path: Path) -> None:
    (clips,) = make_bair(tmp_path, height=32, width=32).test_clips()
    blocks = moving(2)[:4].reshape(4, 32, 2, 32, 2, 3).astype(float).mean(axis=(2, 4))
    assert clips.frames.shape == (5, 4, 32, 32, 3)
    assert np.abs(clips.frames[2].numpy() - blocks)[:, 2:-2, 2:-2].max() < 4


def test_a_cut_file_is_named_and_its_whole_records_are_used(tmp_path: Path) -> None:
    file = bair(tmp_path) / "softmotion30_44k" / "test" / "traj_10_to_11.tfrecords"
    file.write_bytes(file.read_bytes()[:-100])
    source = make_source("bair-tfrecord", tmp_path, split="test", **BIG)
    assert list(source.skipped) == [str(file)]
    assert "record 1" in source.skipped[str(file)]
    (clips,) = source.test_clips()
    assert len(clips.frames) == 4
    np.testing.assert_array_equal(clips.frames[3], moving(3)[:4])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        ({"2/action": [1.5] * 3}, "expected 2/action to be 4 finite numbers"),
        ({"2/image_aux1/encoded": b"png"}, "one string of 12288 bytes"),
        ({"0/image_aux1/encoded": None}, "expected at least 4 frames, got 0"),
        ({"3/image_aux1/encoded": None}, "expected at least 4 frames, got 3"),
        ({"1/action": None}, "has no feature 1/action"),
    ],
)
def test_a_record_of_another_form_is_left_out(
    spoil: dict[str, Feature | None], reason: str, tmp_path: Path
) -> None:
    made = {**trajectory(1), **spoil}
    features = {name: value for name, value in made.items() if value is not None}
    data = record(example(features)) + file_of([trajectory(2)])
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "some.tfrecords").write_bytes(data)
    source = make_source("bair-tfrecord", tmp_path, **BIG)
    (clips,) = source.test_clips()
    np.testing.assert_array_equal(clips.frames, moving(2)[None, :4])
    (told,) = source.skipped.values()
    assert reason in told
    assert "\n" not in told


def test_a_real_trajectory_comes_back_bit_for_bit(clips_folder: Path, tmp_path: Path) -> None:
    with np.load(clips_folder / "bair_push_30f_64.npz") as held:
        aux1, main, action = held["aux1_image"], held["image"], held["action"]
    features: dict[str, Feature] = {}
    for i in range(30):
        features[f"{i}/image_main/encoded"] = main[i].astype(np.uint8).tobytes()
        features[f"{i}/image_aux1/encoded"] = aux1[i].astype(np.uint8).tobytes()
        features[f"{i}/action"] = [float(number) for number in action[i]]
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "traj_0_to_0.tfrecords").write_bytes(file_of([features]))
    for view, pixels in {"image_aux1": aux1, "image_main": main}.items():
        source = make_source(
            "bair-tfrecord", tmp_path, split="test", view=view, **{**BIG, "frames": 30}
        )
        clips = source.clips(0, 1)
        np.testing.assert_array_equal(clips.frames[0], pixels)
        assert clips.actions is not None
        np.testing.assert_array_equal(clips.actions[0], action[:29].astype(np.float32))


def test_folders_of_pictures_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    source = make_pictures(tmp_path, frames=12)
    (clips,) = source.test_clips()  # folders 8, 9, 10; pictures 0, 1, .. 10, 11
    np.testing.assert_array_equal(clips.frames, [moving(s, 16, frames=12) for s in range(3)])
    assert clips.actions is None


def test_a_stride_takes_every_nth_picture(tmp_path: Path) -> None:
    source = make_pictures(tmp_path, stride=3)
    wholes = [moving(seed, 16, frames=12) for seed in range(3)]
    starts = {max(place(f, whole, 3) for whole in wholes) for f in source.clips(0, 30).frames}
    assert starts == {0, 1, 2}


def test_the_middle_of_a_wide_picture_is_kept(tmp_path: Path) -> None:
    wide = np.zeros((4, 20, 50, 3), np.uint8)
    wide[:, :, :15], wide[:, :, 15:35], wide[:, :, 35:] = (255, 0, 0), (0, 200, 0), (0, 0, 255)
    save_pictures(tmp_path / "train" / "0", wide)
    source = make_source("bair-frames", tmp_path, **{**SMALL, "height": 10, "width": 10})
    frames = source.clips(0, 1).frames[0]
    assert (frames[:, :, 3:-3] == torch.tensor([0, 200, 0])).all()
    # The filter reaches a little over the edge of the crop, so that its ends are not all green.
    assert frames[..., 1].min() > 150


@pytest.mark.parametrize("kind", ["npy", "csv", "npz", "beside"])
@pytest.mark.parametrize("rows", [LENGTH, LENGTH - 1])
def test_actions_beside_the_pictures(kind: str, rows: int, tmp_path: Path) -> None:
    root, table = tmp_path / "train", moves(5)[:rows]
    if kind == "npz":
        root.mkdir()
        np.savez(root / "a.npz", frames=moving(0, 16), action=np.asfortranarray(table))
        source = make_source("videos", tmp_path, split="train", action_dim=4, **SMALL)
    elif kind == "beside":  # which is no recording itself
        root.mkdir()
        np.save(root / "a.npy", moving(0, 16))
        np.save(root / "a.actions.npy", table)
        source = make_source("videos", tmp_path, split="train", action_dim=4, **SMALL)
        assert len(source) == 1
    else:
        save_pictures(root / "a", moving(0, 16))
        if kind == "npy":
            np.save(root / "a" / "actions.npy", table.astype(np.float64))
        else:
            np.savetxt(root / "a" / "actions.csv", table, delimiter=",", fmt="%.9g")
        source = make_source("bair-frames", tmp_path, action_dim=4, **SMALL)
    clips = source.clips(0, 40)
    assert clips.actions is not None
    assert clips.actions.shape == (40, 3, 4)
    starts = set()
    for frames, actions in zip(clips.frames, clips.actions, strict=True):
        start = place(frames, moving(0, 16))
        np.testing.assert_array_equal(actions, table[start : start + 3])
        starts.add(start)
    assert starts == set(range(6))


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda f: None, "no actions; expected"),
        (lambda f: np.save(f / "actions.npy", moves(0)[:5]), r"actions (9 or 8, 4), got (5, 4)"),
        (lambda f: np.save(f / "actions.npy", moves(0)[:, :3]), "got (9, 3)"),
        (
            lambda f: np.save(f / "actions.npy", np.full((9, 4), np.inf)),
            "row 0 of its actions (from 0) is not finite",
        ),
        (lambda f: np.save(f / "actions.npy", np.full((9, 4), "a")), "must be real numbers"),
        (lambda f: (f / "actions.npy").write_bytes(b"\x93NUMPY"), "cannot be read"),
        (lambda f: (f / "actions.csv").write_text("x,y,z,grip\n" * 9), "cannot be read"),
        (lambda f: (f / "actions.csv").write_text("1,2,3,4\n1,2\n" * 4), "cannot be read"),
        (lambda f: (f / "actions.csv").write_text(""), "got (0, 1)"),
    ],
)
def test_actions_of_another_form_leave_the_recording_out(
    write: Callable[[Path], object], reason: str, tmp_path: Path
) -> None:
    for name in ("bad", "good"):
        save_pictures(tmp_path / "train" / name, moving(0, 16))
    write(tmp_path / "train" / "bad")
    np.save(tmp_path / "train" / "good" / "actions.npy", moves(1))
    source = make_source("bair-frames", tmp_path, action_dim=4, **SMALL)
    assert source.clips(0, 4).frames.shape == (4, 4, 16, 16, 3)
    assert list(source.skipped) == [str(tmp_path / "train" / "bad")]
    assert reason in source.skipped[str(tmp_path / "train" / "bad")]


def test_a_damaged_video_is_left_out_where_actions_belong_to_its_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bad", "good"):
        np.save(tmp_path / f"{name}.npy", moving(0, 16))
        np.save(tmp_path / f"{name}.actions.npy", moves(0))
    read = datasets.read_clip

    def damaged(path: Path, **options: Any) -> Clip:
        return replace(read(path, **options), skipped=int(path.stem == "bad"))

    monkeypatch.setattr(datasets, "read_clip", damaged)
    source = make_source("videos", tmp_path, action_dim=4, **SMALL)
    source.clips(0, 4)
    assert list(source.skipped.values()) == ["damaged frames; which action is whose is unknown"]
    source = make_source("videos", tmp_path, **SMALL)
    source.clips(0, 4)
    assert source.skipped == {}


def test_a_table_elsewhere_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    archives(tmp_path / "data")
    rows = ["path,split", *(f"{i}.npz,{'test' if i else 'train'}" for i in range(4))]
    (tmp_path / "mine.csv").write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)
    given = DataSet.of("kinetics600", tmp_path / "data", ["table=mine.csv"])
    assert given.described() == {
        "name": "kinetics600",
        "root": str(tmp_path / "data"),
        "options": {"table": str(tmp_path / "mine.csv")},
    }
    monkeypatch.chdir("/")
    assert [len(given.source(split=s, **SMALL)) for s in ("train", "test")] == [1, 3]


def test_frames_a_millisecond_apart_keep_their_actions(tmp_path: Path) -> None:
    """As a webcam delivers them after a stall, in a file that rounds to milliseconds."""
    stamps = [0, 33, 67, 300, 301, 302, 303, 333, 367, 400, 600, 601, 602, 633, 667, 700]
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=30)
        stream.width = stream.height = 16
        stream.pix_fmt = "bgr0"
        stream.codec_context.time_base = Fraction(1, 1000)
        for i, stamp in enumerate(stamps):
            shade = np.full((16, 16, 3), 10 * i, np.uint8)
            frame = av.VideoFrame.from_ndarray(shade, format="rgb24").reformat(format="bgr0")
            frame.pts, frame.time_base = stamp, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    rows = np.arange(len(stamps), dtype=np.float32)[:, None]
    np.save(tmp_path / "a.actions.npy", rows)
    source = make_source("videos", tmp_path, action_dim=1, **SMALL)
    clips = source.clips(0, 60)
    assert clips.actions is not None
    begun = clips.frames[:, :3, 0, 0, 0] / 10
    torch.testing.assert_close(clips.actions[..., 0], begun.float())
    assert len(set(begun[:, 0].tolist())) == len(stamps) - 3


def test_frames_that_an_edit_list_cuts_off_have_no_actions(tmp_path: Path) -> None:
    """As a cut without encoding anew leaves them in the file."""
    shades = np.stack([np.full((16, 16, 3), 8 * i, np.uint8) for i in range(30)])
    write_clip(tmp_path / "whole.mp4", shades, 10)
    (tmp_path / "cut").mkdir()
    options = {"avoid_negative_ts": "disabled"}
    with (
        av.open(str(tmp_path / "whole.mp4")) as whole,
        av.open(str(tmp_path / "cut" / "a.mp4"), "w", options=options) as cut,
    ):
        stream = whole.streams.video[0]
        copy = cut.add_stream_from_template(stream)
        seven = int(0.7 / stream.time_base)
        for packet in whole.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts = packet.pts - seven, packet.dts - seven
                packet.stream = copy
                cut.mux(packet)
    np.save(tmp_path / "cut" / "a.actions.npy", np.arange(7, 30, dtype=np.float32)[:, None])
    source = make_source("videos", tmp_path / "cut", action_dim=1, **SMALL)
    clips = source.clips(0, 40)
    assert clips.actions is not None
    shown = (clips.frames[:, :3].float().mean((2, 3, 4)) / 8).round()
    torch.testing.assert_close(clips.actions[..., 0], shown)
    assert {7.0, 26.0} <= set(shown[:, 0].tolist())


def test_a_broken_picture_costs_only_the_windows_that_need_it(tmp_path: Path) -> None:
    folder = tmp_path / "train" / "0"
    save_pictures(folder, moving(0, 16))
    (folder / "8.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    source = make_source("bair-frames", tmp_path, **SMALL)
    starts = {place(frames, moving(0, 16)) for frames in source.clips(0, 30).frames}
    assert starts == {0, 1, 2, 3, 4}
    assert source.skipped == {}
    (folder / "1.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"none of the 1 recordings .*1\.png"):
        list(source.test_clips())


# ---------------------------------------------------------------------------------------------
# UCF-101, Kinetics, folders of videos


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Frames]:
    """A small video file, and what its frames decode to."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    write_clip(path, moving(1, 16, frames=12), fps=10)
    return path, read_clip(path).frames


def test_ucf101_follows_the_official_lists(film: tuple[Path, Frames], tmp_path: Path) -> None:
    path, whole = film
    folder = tmp_path / "UCF-101" / "Archery"
    folder.mkdir(parents=True)
    for i in range(1, 4):
        os.link(path, folder / f"v_Archery_g01_c0{i}.avi")
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    train = "Archery/v_Archery_g01_c01.avi 3\r\nArchery/v_Archery_g01_c09.avi 3\r\n"
    (lists / "trainlist02.txt").write_text(train)
    (lists / "testlist02.txt").write_text(
        "Archery/v_Archery_g01_c03.avi\nArchery/v_Archery_g01_c02.avi\n\n"
    )
    source = make_source("ucf101", tmp_path, fold=2, stride=2, **SMALL)
    assert len(source) == 1
    assert source.skipped == {str(folder / "v_Archery_g01_c09.avi"): "no such file"}
    assert {place(frames, whole, 2) for frames in source.clips(0, 40).frames} == set(range(6))
    held_out = make_source(
        "ucf101", tmp_path / "UCF-101", lists=lists, split="test", fold=2, **SMALL
    )
    assert (len(held_out), held_out.skipped) == (2, {})
    with pytest.raises(InputError, match=r"trainlist01.txt: cannot be read .*give its path"):
        make_source("ucf101", tmp_path, **SMALL)
    (lists / "trainlist03.txt").write_text("Archery/v_Archery_g02_c01.avi 3\n")
    with pytest.raises(InputError, match="none of its 1 videos is there, the first would be"):
        make_source("ucf101", tmp_path, fold=3, **SMALL)


KINETICS = """label,youtube_id,time_start,time_end,split
"archery, indoors",-abc_DEF-12,5,15,train
abseiling,never_there,0,10,train
abseiling,another_one,107,117,validate
abseiling,without_time,,10,train
abseiling,last_of_all,1000.0,1010.0,train
"""


def test_kinetics_follows_its_table(film: tuple[Path, Frames], tmp_path: Path) -> None:
    path, whole = film
    (tmp_path / "train" / "archery").mkdir(parents=True)
    os.link(path, tmp_path / "train" / "archery" / "-abc_DEF-12_000005_000015.mp4")
    os.link(path, tmp_path / "train" / "last_of_all_001000_001010.MKV")
    os.link(path, tmp_path / "another_one_000107_000117.mp4")
    (tmp_path / "train.csv").write_text(KINETICS)
    source = make_source("kinetics600", tmp_path, **SMALL)
    assert len(source) == 2
    assert list(source.skipped) == [
        str(tmp_path / "never_there_000000_000010"),
        str(tmp_path / "line 5 of train.csv"),
    ]
    assert all(place(frames, whole) >= 0 for frames in source.clips(0, 4).frames)
    table = tmp_path / "train.csv"
    assert len(make_source("kinetics600", tmp_path, split="validate", table=table, **SMALL)) == 1
    with pytest.raises(InputError, match="has 'train', 'validate' and no row of 'test'; rename"):
        make_source("kinetics600", tmp_path, split="test", table=table, **SMALL)
    table.write_text("path,split\n")
    with pytest.raises(InputError, match="expected a list of videos, found none"):
        make_source("kinetics600", tmp_path, **SMALL)
    table.write_text("path,split\na.mp4,train\nb.mp4,\n")
    with pytest.raises(InputError, match=r"line 3 has no split; it would be trained on and held"):
        make_source("kinetics600", tmp_path, split="train", table=table, **SMALL)


def test_kinetics_with_paths_in_the_table(film: tuple[Path, Frames], tmp_path: Path) -> None:
    os.link(film[0], tmp_path / "a.mp4")
    long = "x" * 5000
    (tmp_path / "train.csv").write_text(f"\ufeffpath,label\na.mp4,b\n\x00,c\n{long},d\n,e\n")
    source = make_source("kinetics600", tmp_path, **SMALL)
    assert len(source) == 1
    assert len(source.skipped) == 3
    assert source.clips(0, 2).frames.shape == (2, 4, 16, 16, 3)
    with pytest.raises(InputError, match="one table for all splits needs a column split"):
        make_source("kinetics600", tmp_path, table=tmp_path / "train.csv", **SMALL)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"name,when\na,b\n", "expected columns youtube_id"),
        (b"", "got none"),
        (b"\xff\xfe\xfd", "cannot be read"),
        (b'path\n"' + b"x" * 200_000, "is no CSV"),
        (b"x" * 200_000, "is no CSV"),
    ],
)
def test_a_table_of_another_form_is_one_clear_error(
    text: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / "train.csv").write_bytes(text)
    with pytest.raises(InputError, match=message) as caught:
        make_source("kinetics600", tmp_path, **SMALL)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "train.csv"))


BROKEN = {
    "audio_only.mp4": "expected a video stream, got only: audio",
    "one_frame_av1_64.mp4": "expected at least 5 frames, got 1",
    "rotated90_3frames.mov": "expected at least 5 frames, got 3",
    "made_truncated_no_moov.mp4": "cannot be read",
    "empty.mp4": "cannot be read",
    "noise.avi": "expected a video stream, got only: no streams",
    "playlist.mp4": "playlist",
    "pipe.mp4": "expected a file",
    "gone.mkv": "expected a file",
    "pickled.npz": "expected one array shaped",
}


def test_a_folder_of_every_kind_of_clip(clips_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "real").symlink_to(clips_folder)
    (tmp_path / "empty.mp4").touch()
    noise = np.random.default_rng(0).bytes(5000)
    (tmp_path / "noise.avi").write_bytes(b"RIFF\xff\xff\xff\xffAVI LIST" + noise)
    (tmp_path / "playlist.mp4").write_text("#EXTM3U\n/etc/passwd\n")
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "gone.mkv").symlink_to(tmp_path / "nowhere")
    np.savez(tmp_path / "pickled.npz", frames=np.array([{}], dtype=object))
    (tmp_path / "notes.txt").write_text("not a clip")
    told: list[str] = []
    source = make_source(
        "videos",
        tmp_path,
        **{**SMALL, "frames": 5, "workers": 2},
        on_skip=lambda name, reason: told.append(name),
    )
    good = sum(len(clips.frames) for clips in source.test_clips(batch=4))
    reasons = {Path(name).name: reason for name, reason in source.skipped.items()}
    assert set(reasons) == set(BROKEN)
    for name, reason in BROKEN.items():
        assert reason in reasons[name], name
        assert "\n" not in reasons[name]
    assert good == len(source) - len(BROKEN) == 16
    clips = source.clips(0, 8)
    assert clips.frames.shape == (8, 5, 16, 16, 3)
    assert len(told) == len(set(told)) == len(BROKEN)


@pytest.mark.parametrize(
    ("name", "stride"),
    [
        ("kinetics_segway.mp4", 1),  # windows beyond 8 s are sought, not decoded up to
        ("ucf101_soccerjuggling_g23_c01.avi", 4),
        ("ucf101_cricketshot_g04_c01.gif", 2),
        ("intel_asl_hungry.mkv", 3),
        ("bair_push_30f_64.npz", 2),
    ],
)
def test_windows_of_a_real_video_are_its_frames(
    name: str, stride: int, clips_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / name).symlink_to(clips_folder / name)
    source = make_source("videos", tmp_path, stride=stride, seed=1, **SMALL)
    whole = read_clip(clips_folder / name, size=(16, 16)).frames
    starts = [place(frames, whole, stride) for frames in source.clips(0, 6).frames]
    assert min(starts) >= 0
    assert len(set(starts)) > 1
    last = len(whole) - (4 - 1) * stride - 1
    centre, _ = source._cut(0, 0.5)
    np.testing.assert_array_equal(centre, whole[(last + 1) // 2 :][: 3 * stride + 1 : stride])


def test_a_video_that_ends_before_its_header_says(clips_folder: Path, tmp_path: Path) -> None:
    name = "hmdb51_cartwheel_nonutf8meta.avi"  # 84 packets, 83 pictures
    (tmp_path / name).symlink_to(clips_folder / name)
    source = make_source("videos", tmp_path, **{**SMALL, "frames": 83})
    whole = read_clip(clips_folder / name, size=(16, 16)).frames
    for frames in source.clips(0, 4).frames:  # starts 0 and 1: the second does not fit after all
        np.testing.assert_array_equal(frames, whole)
    with pytest.raises(InputError, match="none of the 1 recordings can be used"):
        make_source("videos", tmp_path, **{**SMALL, "frames": 84}).clips(0, 1)


def test_a_packet_without_a_picture_shifts_no_actions(clips_folder: Path, tmp_path: Path) -> None:
    name = "hmdb51_cartwheel_nonutf8meta.avi"  # its second packet holds none
    (tmp_path / name).symlink_to(clips_folder / name)
    whole = read_clip(clips_folder / name, size=(16, 16)).frames
    for rows in (83, 82):
        np.save(
            tmp_path / f"{Path(name).stem}.actions.npy", np.arange(rows, dtype=np.float32)[:, None]
        )
        source = make_source("videos", tmp_path, action_dim=1, **{**SMALL, "frames": 60})
        clips = source.clips(0, 8)
        assert clips.actions is not None
        for frames, actions in zip(clips.frames.numpy(), clips.actions.numpy(), strict=True):
            first = int(actions[0, 0])
            np.testing.assert_array_equal(frames, whole[first : first + 60])


def test_a_circle_of_links_ends(tmp_path: Path) -> None:
    archives(tmp_path)
    (tmp_path / "below").symlink_to(tmp_path)
    assert len(make_source("videos", tmp_path, **SMALL)) == 4


# ---------------------------------------------------------------------------------------------
# Nothing to read, and options that make no sense


@pytest.mark.parametrize(
    ("name", "folder", "message"),
    [
        ("bair-tfrecord", "train", "expected whole records in .* found none"),
        ("bair-tfrecord", "other", "train: no such folder"),
        ("bair-frames", "train", "expected folders of numbered pictures"),
        ("bair-frames", "processed_data", "train: no such folder"),
        ("ucf101", "UCF-101", "trainlist01.txt: cannot be read"),
        ("kinetics600", "train", "train.csv: cannot be read"),
        ("videos", "train", "expected video files or .npz archives, found none"),
    ],
)
def test_an_empty_folder_is_one_clear_error(
    name: str, folder: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / folder).mkdir()
    with pytest.raises(InputError, match=message) as caught:
        make_source(name, tmp_path, **SMALL)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_cut_file_and_nothing_else_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.tfrecords").write_bytes(file_of([trajectory(0)])[:1000])
    with pytest.raises(InputError, match=r"found none .*a.tfrecords: record 0, .* is cut short"):
        make_source("bair-tfrecord", tmp_path, **BIG)


def test_broken_files_alone_are_one_clear_error(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"nothing")
    source = make_source("videos", tmp_path, **SMALL)
    for read in (lambda: source.clips(0, 1), lambda: list(source.test_clips())):
        with pytest.raises(InputError, match=r"none of the 2 recordings can be used") as caught:
            read()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("bair", SMALL, "no data set reader is called 'bair'; choose from bair-tfrecord, "),
        ("videos", {**SMALL, "fold": 1}, "unknown option fold; it takes action_dim, "),
        ("videos", {"frames": 4}, "height, width must be given"),
        ("videos", {**SMALL, "frames": 0}, "frames must be at least 1"),
        ("videos", {**SMALL, "width": 0}, "height and width must be at least 1"),
        ("videos", {**SMALL, "seed": -1}, "seed must not be negative"),
        ("videos", {**SMALL, "workers": 0}, "workers must be at least 1"),
        ("videos", {**SMALL, "stride": 0}, "stride must be at least 1"),
        ("videos", {**SMALL, "stride": 2, "action_dim": 4}, "stride must be 1"),
        ("bair-tfrecord", {**SMALL, "view": "image"}, "view must be one of image_aux1, image_main"),
        ("bair-tfrecord", {**SMALL, "action_dim": 3}, "action_dim must be one of 0, 4"),
        ("bair-frames", {**SMALL, "split": "val"}, "split must be one of train, test"),
        ("ucf101", {**SMALL, "fold": 4}, "fold must be one of 1, 2, 3"),
    ],
)
def test_options_that_make_no_sense(
    name: str, options: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_source(name, tmp_path, **options)


def test_a_long_search_is_told_and_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.datasets.IN_A_ROW", 3)
    for name in "abcde":
        (tmp_path / f"{name}.mp4").write_bytes(b"nothing")
    told: list[str] = []
    source = make_source(
        "videos", tmp_path, **SMALL, on_skip=lambda name, reason: told.append(name)
    )
    with pytest.raises(InputError, match="of the 5 recordings none of 3 in a row can be used"):
        source.clips(0, 1)
    assert len(told) == len(set(told)) == 3


def test_clips_before_the_first_one_are_refused(tmp_path: Path) -> None:
    source = make_source("videos", archives(tmp_path), **SMALL)
    for first, count in ((-1, 2), (0, 0)):
        with pytest.raises(InputError, match="expected clips from 0 on"):
            source.clips(first, count)
    with pytest.raises(InputError, match="at least one clip"):
        list(source.test_clips(batch=0))
