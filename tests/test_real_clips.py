"""`predict` on real videos, good and broken: the right frames, or one clear error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import canvasmar_rt
from canvasmar_rt.cli import DEFAULT_MODEL
from canvasmar_rt.errors import VideoError
from canvasmar_rt.predict import PredictOptions, predict_clip
from canvasmar_rt.rollout import Predictor
from canvasmar_rt.video import read_clip

GOOD = [
    "bair_push_30f_64.npz",
    "bair_push_aux1_64_ffv1.mkv",
    "rt1_can_22f_256x320.npz",
    "rt1_can_256x320_ffv1.mkv",
    "ucf101_soccerjuggling_g23_c01.avi",
    "ucf101_cricketshot_g04_c01.gif",
    "kinetics_segway.mp4",
    "kinetics_armwrestling.mp4",
    "hmdb51_cartwheel_nonutf8meta.avi",
    "intel_asl_hungry.mkv",
    "intel_bottle_hand.mp4",
    "cc0_flower_vp8.webm",
    "awkward/odd_height_overlay_400x281.gif",
    "awkward/hevc_10bit_200x200.mp4",
    "awkward/vfr_traffic_720p.mp4",
    "awkward/corrupt_midstream_720p.mp4",
]
BROKEN = {
    "awkward/audio_only.mp4": "video",
    "awkward/one_frame_av1_64.mp4": "at least 5",
    "awkward/rotated90_3frames.mov": "at least 5",
    "awkward/made_truncated_no_moov.mp4": "damaged|cut",
}


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return canvasmar_rt.load(DEFAULT_MODEL)


@pytest.mark.parametrize("name", GOOD)
def test_a_good_clip_is_continued(
    name: str, predictor: Predictor, clips_folder: Path, tmp_path: Path
) -> None:
    summary = predict_clip(
        predictor, clips_folder / name, tmp_path / "out.png", PredictOptions(frames=4)
    )
    assert len(summary["output"]) == 5 + 4
    assert summary["context_frames"] == 5
    written = read_clip(tmp_path / "out" / "out_0000.png")
    source = read_clip(clips_folder / name, size=(64, 64), fps=predictor.config.fps, max_frames=5)
    np.testing.assert_array_equal(written.frames[0], source.frames[0])
    assert (tmp_path / "out_sheet.png").is_file()


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_clip_is_one_clear_error(
    name: str, predictor: Predictor, clips_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(VideoError, match=BROKEN[name]) as caught:
        predict_clip(predictor, clips_folder / name, tmp_path / "out.mp4", PredictOptions())
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_every_clip_of_the_folder_is_tried(clips_folder: Path) -> None:
    suffixes = {".mp4", ".mkv", ".avi", ".gif", ".webm", ".mov", ".npz"}
    found = {
        str(p.relative_to(clips_folder)) for p in clips_folder.rglob("*") if p.suffix in suffixes
    }
    assert found == {*GOOD, *BROKEN}
