"""What `predict` refuses before it computes anything."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import canvasmar_rt
from canvasmar_rt.bundle import DEMO_CLIP
from canvasmar_rt.config import preset
from canvasmar_rt.errors import InputError, VideoError
from canvasmar_rt.predict import (
    PredictOptions,
    predict_clip,
    read_latent_actions,
    video_names,
)
from canvasmar_rt.rollout import Predictor
from canvasmar_rt.video import read_clip, write_clip

TOYTABLE, _ = preset("toytable")


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> Predictor:
    """A predictor that must not be started."""

    def start(*args: object, **kwargs: object) -> None:
        raise AssertionError("a rollout was started")

    monkeypatch.setattr(Predictor, "start", start)
    return canvasmar_rt.load("toytable-int8", threads=1)


def test_an_output_that_cannot_be_written_is_refused_first(idle: Predictor, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "old_0007.png").touch()  # five frames and two make 0000 to 0006

    def refused(name: str, **options: Any) -> str:
        with pytest.raises(InputError) as caught:
            predict_clip(idle, DEMO_CLIP, tmp_path / name, PredictOptions(frames=2, **options))
        return str(caught.value)

    assert re.search(r"old_0007\.png: left from a longer clip", refused("old.png"))
    assert "0.01..1000" in refused("x.mp4", fps=0.001)
    assert "0.01..1000" in refused("x.mp4", fps=float("nan"))
    assert "50 fps" in refused("x.gif", fps=60)
    assert list(tmp_path.iterdir()) == [folder]
    (folder / "old_0007.png").rename(folder / "old_0006.png")
    with pytest.raises(AssertionError, match="started"):
        refused("old.png")


def test_predictions_do_not_lie_among_the_frames_they_continue(
    idle: Predictor, tmp_path: Path
) -> None:
    folder, frames = tmp_path / "a", np.zeros((7, 64, 64, 3), np.uint8)
    write_clip(folder / "a.png", frames, TOYTABLE.fps)
    kept = {path: path.read_bytes() for path in folder.iterdir()}
    assert len(kept) == 7
    for source, name in (
        (folder, "a.png"),  # the folder of its numbered frames is the clip
        (folder, "a/b.mp4"),  # whose sheet would be a frame of it
        (folder / "a_0000.png", "a.png"),
    ):
        with pytest.raises(InputError, match="among the clip's own frames"):
            predict_clip(idle, source, tmp_path / name, PredictOptions(frames=2, context=1))
    assert {path: path.read_bytes() for path in folder.iterdir()} == kept
    for source, name in ((folder, "b.png"), (folder / "a_0000.png", "a/b.mp4")):
        with pytest.raises(AssertionError, match="started"):
            predict_clip(idle, source, tmp_path / name, PredictOptions(frames=2, context=1))


def test_a_clip_is_known_by_another_name(idle: Predictor, tmp_path: Path) -> None:
    """A link stands in for a name in other letters, where case does not count."""
    shutil.copy(DEMO_CLIP, tmp_path / "a.npz")
    os.link(tmp_path / "a.npz", tmp_path / "A.mp4")
    with pytest.raises(InputError, match=r"A\.mp4: is the clip itself"):
        predict_clip(idle, tmp_path / "a.npz", tmp_path / "A.mp4", PredictOptions(frames=2))
    with pytest.raises(VideoError, match="no such file"):
        predict_clip(idle, tmp_path / "none", tmp_path / "A.mp4", PredictOptions(frames=2))


def test_a_file_is_no_folder_for_many_clips(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "within"):
        with pytest.raises(InputError, match="file is not a folder"):
            video_names([Path("a.mp4"), Path("b.mp4")], output)


@pytest.mark.parametrize(
    ("clips", "videos"),
    [
        (["a.mp4", "b.npz"], ["a.mp4", "b.mp4"]),
        (["a.mp4", "a.npz", "b.mp4"], ["a.mp4.mp4", "a.npz.mp4", "b.mp4"]),
        (["a.mp4", "a.npz", "a.npz.mp4"], ["a.mp4.mp4", "a.npz.mp4", "a.npz.mp4.mp4"]),
        (["A.mov", "a.mp4", "b.mp4"], ["A.mov.mp4", "a.mp4.mp4", "b.mp4"]),
    ],
)
def test_every_clip_has_a_video_of_its_own(
    tmp_path: Path, clips: list[str], videos: list[str]
) -> None:
    found = video_names([Path(clip) for clip in clips], tmp_path)
    assert list(found.values()) == [tmp_path / video for video in videos]


def test_frames_that_are_missing_are_noticed_by_their_actions(tmp_path: Path) -> None:
    """As of a damaged file whose container goes on past the gap without a word."""
    with np.load(DEMO_CLIP) as archive:
        frames, actions = archive["frames"][:20], archive["actions"][:19]
    predictor = canvasmar_rt.load("toytable-int8", threads=1)
    options = PredictOptions(frames=2, actions=True)
    for lost, told in ((0, True), (1, False), (3, False)):
        write_clip(tmp_path / "a.mp4", frames[lost:], TOYTABLE.fps)
        for rows in (actions, np.concatenate([actions, actions[-1:]])):  # one a frame, or one less
            np.save(tmp_path / "a.actions.npy", rows)
            if told or len(rows) <= len(frames) - lost:
                predict_clip(predictor, tmp_path / "a.mp4", tmp_path / "b.mp4", options)
                continue
            with pytest.raises(InputError, match=f"{len(rows)} rows of actions for {20 - lost}"):
                predict_clip(predictor, tmp_path / "a.mp4", tmp_path / "b.mp4", options)


def test_no_video_takes_the_place_of_a_clip(tmp_path: Path) -> None:
    clips = [tmp_path / "a.npz", tmp_path / "b.mp4"]
    with pytest.raises(InputError, match="the clips themselves lie there"):
        video_names(clips, tmp_path)
    with pytest.raises(InputError, match="the clips themselves lie there"):  # nor lies among many
        video_names([tmp_path / "a.npz", tmp_path / "c.npz"], tmp_path)
    assert list(video_names(clips[:1], tmp_path).values()) == [tmp_path / "a.mp4"]
    with pytest.raises(
        InputError, match=r"out\.mp4: 2 clips make as many videos; give -o a folder"
    ):
        video_names(clips, tmp_path / "out.mp4")


def test_rows_of_actions_that_are_not_of_a_frame_are_told(tmp_path: Path) -> None:
    with np.load(DEMO_CLIP) as archive:
        frames, actions = archive["frames"], archive["actions"]
    np.savez(tmp_path / "a.npz", frames=frames, actions=actions[:20].reshape(10, 4))
    predictor = canvasmar_rt.load("toytable-int8", threads=1)
    options = PredictOptions(frames=2, actions=True)
    for clip, told in ((DEMO_CLIP, []), (tmp_path / "a.npz", ["its 10 rows of 4 actions are taken "
                       "as one a latent frame, of 2 pixel frames"])):  # fmt: skip
        made = predict_clip(predictor, clip, tmp_path / "b.mp4", options)
        assert made["notes"] == told
        assert (made["bundle"], made["ar_steps"], made["flow_steps"]) == ("toytable-int8", 1, 4)


@pytest.mark.parametrize(("action_dim", "wanted"), [(4, r"\(3, 4\) or \(6, 2\)"), (3, r"\(3, 3\)")])
def test_actions_of_another_size_are_told_what_fits(
    tmp_path: Path, action_dim: int, wanted: str
) -> None:
    """An odd action is of no two pixel frames."""
    frames = np.zeros((7, 64, 64, 3), np.uint8)
    np.savez(tmp_path / "a.npz", frames=frames, actions=np.zeros((6, 5), np.float32))
    config = dataclasses.replace(TOYTABLE, action_dim=action_dim)
    with pytest.raises(InputError, match=rf"shape \(6, 5\), expected at least {wanted}$"):
        read_latent_actions(tmp_path / "a.npz", config, 3)


def test_wide_actions_are_not_folded_for_a_model_of_single_frames(tmp_path: Path) -> None:
    """Where a latent frame is one pixel frame, rows of 6 numbers were taken as 3 rows of 2."""
    np.savez(tmp_path / "a.npz", actions=np.zeros((8, 6), np.float32))
    single = dataclasses.replace(TOYTABLE.autoencoder, temporal_compression=1)
    config = dataclasses.replace(TOYTABLE, autoencoder=single, action_dim=2)
    with pytest.raises(InputError, match=r"shape \(8, 6\), expected at least \(3, 2\)$"):
        read_latent_actions(tmp_path / "a.npz", config, 3)
    np.savez(tmp_path / "a.npz", actions=np.arange(16, dtype=np.float32).reshape(8, 2))
    assert read_latent_actions(tmp_path / "a.npz", config, 3).latent.shape == (8, 2)


def test_one_step_without_actions_is_said_to_blur(tmp_path: Path) -> None:
    predictor = canvasmar_rt.load("toytable-int8", threads=1)
    more = dataclasses.replace(predictor.sampling, ar_steps=2)
    for actions, sampling, told in ((False, None, True), (True, None, False), (False, more, False)):
        options = PredictOptions(frames=2, actions=actions, sampling=sampling)
        notes = predict_clip(predictor, DEMO_CLIP, tmp_path / "a.mp4", options)["notes"]
        assert any("try --steps 4" in note for note in notes) == told


def test_a_context_that_is_cut_is_said_to_be(tmp_path: Path) -> None:
    predictor = canvasmar_rt.load("toytable-int8", threads=1)
    for asked, told in ((4, ["the context is 3 frames, not 4: the model takes 1 + n*2"]), (5, [])):
        made = predict_clip(
            predictor, DEMO_CLIP, tmp_path / "a.png",
            PredictOptions(frames=2, context=asked, actions=True),
        )  # fmt: skip
        assert made["notes"] == told
        shutil.rmtree(tmp_path / "a")


def test_a_video_and_an_archive_with_its_frames_are_continued_alike(tmp_path: Path) -> None:
    """Under actions every recorded frame counts, at whatever rate the video plays."""
    with np.load(DEMO_CLIP) as archive:
        frames, actions = archive["frames"], archive["actions"]
    write_clip(tmp_path / "a.mp4", frames, 3 * TOYTABLE.fps)
    np.save(tmp_path / "a.actions.npy", actions)
    decoded = read_clip(tmp_path / "a.mp4").frames
    assert len(decoded) == len(frames)
    np.savez(tmp_path / "b.npz", frames=decoded, actions=actions)
    predictor = canvasmar_rt.load("toytable-int8", threads=1)
    options = PredictOptions(frames=2, actions=True)
    made, notes = [], []
    shutil.copy(tmp_path / "a.mp4", tmp_path / "a.m2ts")  # of a name that is in no list
    for name in ("a.mp4", "a.m2ts", "b.npz"):
        told = predict_clip(predictor, tmp_path / name, tmp_path / "out.png", options)
        notes.append(told["notes"])
        made.append([p.read_bytes() for p in sorted((tmp_path / "out").iterdir())])
    recorded = "recorded at 30 fps, the model's is 10: with its actions every frame is taken"
    assert notes == [[recorded], [recorded], []]
    assert made[0] == made[1] == made[2]
    assert len(made[0]) == 7  # five given
