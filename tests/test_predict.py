"""What `predict` refuses before it computes anything, and the actions it reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import canvasmar_rt
from canvasmar_rt.bundle import DEMO_CLIP
from canvasmar_rt.config import preset
from canvasmar_rt.errors import InputError
from canvasmar_rt.predict import PredictOptions, predict_clip, read_actions, video_names
from canvasmar_rt.rollout import Predictor

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


def test_a_file_is_no_folder_for_many_clips(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "within"):
        with pytest.raises(InputError, match="file is not a folder"):
            video_names([Path("a.mp4"), Path("b.mp4")], output)


@pytest.mark.parametrize(
    "dtype", ["complex64", "bool", "S4", "datetime64[s]"], ids=lambda dtype: dtype[:4]
)
def test_actions_of_another_kind_are_refused(dtype: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", actions=np.zeros((8, 4), dtype))
    with pytest.raises(InputError, match=r"actions must be real numbers, got .* save them"):
        read_actions(tmp_path / "a.npz", TOYTABLE, 8)


@pytest.mark.filterwarnings("error")
def test_actions_beyond_float32_become_infinite_in_silence(tmp_path: Path) -> None:
    """A rollout refuses them by its own message."""
    np.savez(tmp_path / "a.npz", actions=np.full((8, 4), 1e308))
    assert np.isinf(read_actions(tmp_path / "a.npz", TOYTABLE, 8)).all()
    np.savez(tmp_path / "a.npz", actions=np.full((8, 4), -3, np.int8))
    assert (read_actions(tmp_path / "a.npz", TOYTABLE, 8) == -3).all()
