"""Clips in and out: made-up videos with known pixels, then every real clip of the data folder."""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from canvasmar_rt import _video_streams, _video_writing, video
from canvasmar_rt.errors import VideoError
from canvasmar_rt.video import Clip, find_clips, fit, read_clip, write_clip, write_png

Array = NDArray[Any]
Refused = Callable[..., str]

_DEFAULT_CLIPS = Path(__file__).resolve().parents[2] / "shared" / "clips"
CLIPS = Path(os.environ.get("CANVASMAR_RT_CLIPS", _DEFAULT_CLIPS))
needs_clips = pytest.mark.skipif(
    not CLIPS.is_dir(), reason="the real clips are absent; set CANVASMAR_RT_CLIPS to their folder"
)


def pictures(count: int, height: int = 20, width: int = 28, seed: int = 0) -> Array:
    """Frames that all differ: blocks of random colour."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (count, -(-height // 4), -(-width // 4), 3), dtype=np.uint8)
    return blocks.repeat(4, axis=1).repeat(4, axis=2)[:, :height, :width]


def make_video(
    path: Path,
    frames: Array,
    *,
    fps: int = 10,
    times: Sequence[float] | None = None,
    codec: str = "ffv1",
    pix_fmt: str = "bgr0",
    orient: tuple[float, bool, bool] | None = None,
) -> Path:
    """Encode `frames`, losslessly by default; `times` (s) makes the rate variable."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        assert isinstance(stream, VideoStream)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        if orient is not None:
            stream.set_display_rotation(orient[0], hflip=orient[1], vflip=orient[2])
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        layout = "rgba" if frames.shape[-1] == 4 else "rgb24"
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=layout)
            if times is not None:
                frame.pts, frame.time_base = round(1000 * times[i]), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def psnr(a: Array, b: Array) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


@pytest.fixture
def refused() -> Refused:
    """Call a function that must raise one clear line naming `path`; give that line back."""

    def call(function: Callable[..., object], path: Path, *args: Any, **kwargs: Any) -> str:
        with pytest.raises(VideoError) as caught:
            function(path, *args, **kwargs)
        message = str(caught.value)
        assert "\n" not in message
        assert len(message) < 400
        assert str(path) in message
        return message

    return call


# ---------------------------------------------------------------------------------------------
# Constant rate, sizes, pixels


@pytest.mark.parametrize("size", [(20, 28), (21, 29), (1, 7)])
def test_lossless_video_comes_back_exactly(tmp_path: Path, size: tuple[int, int]) -> None:
    frames = pictures(6, *size)
    clip = read_clip(make_video(tmp_path / "a.mkv", frames))
    np.testing.assert_array_equal(clip.frames, frames)
    assert clip.frames.dtype == np.uint8
    assert clip.frames.flags.c_contiguous
    assert (clip.fps, clip.skipped, clip.notes) == (10.0, 0, ())
    assert clip.source == str(tmp_path / "a.mkv")


def test_max_frames_and_start_in_order(tmp_path: Path) -> None:
    frames = pictures(10)
    path = make_video(tmp_path / "a.mkv", frames)
    np.testing.assert_array_equal(read_clip(path, max_frames=3).frames, frames[:3])
    np.testing.assert_array_equal(read_clip(path, start=0.4).frames, frames[4:])
    np.testing.assert_array_equal(read_clip(path, start=0.45, max_frames=2).frames, frames[4:6])


def test_decodes_no_further_than_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_video(tmp_path / "a.mkv", pictures(50))
    seen = 0
    whole = _video_streams._decoded

    def counted(*args: Any) -> Any:
        nonlocal seen
        for frame in whole(*args):
            seen += 1
            yield frame

    monkeypatch.setattr(_video_streams, "_decoded", counted)
    read_clip(path, max_frames=5)
    assert seen == 5
    seen = 0
    read_clip(path, max_frames=5, fps=10)
    assert 5 <= seen <= 12  # some frames ahead, to put time stamps in order


@pytest.mark.parametrize("matrix", ["601", "709"])
@pytest.mark.parametrize("full", [False, True])
def test_colour_matrix_and_range_are_honoured(tmp_path: Path, matrix: str, full: bool) -> None:
    rng = np.random.default_rng(1)
    y, cb, cr = rng.integers(60, 180, (3, 6, 8)).repeat(4, 1).repeat(4, 2).astype(np.uint8)
    path = one_frame(
        tmp_path / "yuv.mkv", np.stack([y, cb, cr]), "yuv444p",
        full=full, matrix=1 if matrix == "709" else 6,
    )  # fmt: skip
    expected = yuv_to_rgb(y, cb, cr, matrix=matrix, full=full)
    assert np.abs(read_clip(path).frames[0] - expected).max() <= 1.0
    for other in [(matrix, not full), ("709" if matrix == "601" else "601", full)]:
        wrong = yuv_to_rgb(y, cb, cr, matrix=other[0], full=other[1])
        assert np.abs(read_clip(path).frames[0] - wrong).max() > 5.0


def one_frame(path: Path, array: Array, pix_fmt: str, *, full: bool, matrix: int) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=5)
        stream.height, stream.width, stream.pix_fmt = 24, 32, pix_fmt
        frame = av.VideoFrame.from_ndarray(array, format=pix_fmt)
        for x in (stream.codec_context, frame):
            x.color_range, x.colorspace = (2 if full else 1), matrix
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("full", [False, True])
def test_grey_video_of_either_range(tmp_path: Path, full: bool) -> None:
    levels = np.linspace(0 if full else 16, 255 if full else 235, 32).astype(np.uint8)
    grey = np.broadcast_to(levels, (24, 32)).copy()
    path = one_frame(tmp_path / "a.mkv", grey, "gray", full=full, matrix=1)
    expected = grey if full else (grey - 16.0) * 255 / 219
    assert np.abs(read_clip(path).frames[0] - expected[..., None]).max() <= 1.0


def test_colours_nobody_converts_are_not_called_damage(tmp_path: Path, refused: Refused) -> None:
    picture = np.full((3, 24, 32), 128, np.uint8)
    path = one_frame(tmp_path / "a.mkv", picture, "yuv444p", full=False, matrix=14)  # ICtCp
    message = refused(read_clip, path)
    assert "matrix 14" in message
    assert "convert it to BT.709" in message
    assert "damaged" not in message


def yuv_to_rgb(y: Array, cb: Array, cr: Array, *, matrix: str, full: bool, bits: int = 8) -> Array:
    """ITU-R BT.601 / BT.709 in floating point, written down here independently of swscale."""
    unit = 2 ** (bits - 8)
    k_r, k_b = (0.299, 0.114) if matrix == "601" else (0.2126, 0.0722)
    luma = y / unit / 255 if full else (y / unit - 16) / 219
    blue, red = ((c / unit - 128) / (255 if full else 224) for c in (cb, cr))
    r, b = luma + 2 * (1 - k_r) * red, luma + 2 * (1 - k_b) * blue
    g = (luma - k_r * r - k_b * b) / (1 - k_r - k_b)
    return np.asarray(np.clip(np.stack([r, g, b], axis=-1) * 255, 0, 255))


@pytest.mark.parametrize("flip", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
def test_display_matrix_is_applied(tmp_path: Path, degrees: int, flip: tuple[bool, bool]) -> None:
    frames = pictures(2, 12, 20)
    path = make_video(
        tmp_path / "a.mov", frames, codec="png", pix_fmt="rgb24", orient=(degrees, *flip)
    )
    upright = np.rot90(frames, k=degrees // 90, axes=(1, 2))  # counter-clockwise, then mirrored
    upright = upright[:, :, ::-1] if flip[0] else upright
    upright = upright[:, ::-1] if flip[1] else upright
    np.testing.assert_array_equal(read_clip(path).frames, upright)


def test_transparency_lies_over_black(tmp_path: Path) -> None:
    rgba = np.full((1, 8, 8, 4), (200, 100, 50, 255), dtype=np.uint8)
    rgba[0, :4, :, 3] = 128
    rgba[0, 0, :, 3] = 0
    path = make_video(tmp_path / "a.mov", rgba, codec="png", pix_fmt="rgba")
    frame = read_clip(path).frames[0]
    assert frame[0, 0].tolist() == [0, 0, 0]
    assert frame[2, 0].tolist() == [100, 50, 25]
    assert frame[7, 0].tolist() == [200, 100, 50]


def test_transparent_palette(tmp_path: Path) -> None:
    indices = np.array([[0, 1], [1, 0]], dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    palette = np.zeros((256, 4), dtype=np.uint8)  # ARGB
    palette[:2] = [(0, 255, 0, 0), (255, 0, 255, 0)]  # transparent red, green
    path = tmp_path / "a.mov"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=5)
        stream.height, stream.width, stream.pix_fmt = 16, 16, "pal8"
        frame = av.VideoFrame.from_ndarray((indices, palette), format="pal8")  # type: ignore[arg-type]
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    frame = next(av.open(str(path)).decode(video=0))
    assert frame.format.name == "pal8"
    pixels = read_clip(path).frames[0]
    assert pixels[0, 0].tolist() == [0, 0, 0]
    assert pixels[0, 15].tolist() == [0, 255, 0]


def test_transparent_gif(tmp_path: Path) -> None:
    indexed = Image.fromarray(np.array([[0, 1], [1, 0]], dtype=np.uint8).repeat(8, 0).repeat(8, 1))
    indexed.putpalette([255, 0, 0, 0, 255, 0])
    indexed.save(tmp_path / "a.gif", transparency=0)
    frame = read_clip(tmp_path / "a.gif").frames[0]
    assert frame[0, 0].tolist() == [0, 0, 0]  # red, but transparent
    assert frame[0, 15].tolist() == [0, 255, 0]


# ---------------------------------------------------------------------------------------------
# Time


def test_sampling_by_time_at_variable_rate(tmp_path: Path) -> None:
    times = [0.0, 0.1, 0.2, 0.3, 0.7, 1.1, 1.15, 1.2]
    frames = pictures(len(times))
    path = make_video(tmp_path / "vfr.mkv", frames, times=times)
    clip = read_clip(path, fps=10, max_frames=12)
    shown = [max(i for i, t in enumerate(times) if t <= k / 10 + 1e-3) for k in range(12)]
    assert shown == [0, 1, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5]
    np.testing.assert_array_equal(clip.frames, frames[shown])
    assert clip.fps == 10.0
    late = read_clip(path, fps=10, start=0.65, max_frames=3)
    np.testing.assert_array_equal(late.frames, frames[[3, 4, 4]])


@pytest.mark.parametrize("first", [0.0, 3.217])
def test_same_rate_neither_drops_nor_repeats(tmp_path: Path, first: float) -> None:
    # Millisecond clocks round 1/30 s: 33, 67, 100; none of it may show, wherever time begins.
    frames = pictures(40)
    times = [first + i / 30 for i in range(40)]
    path = make_video(tmp_path / "a.mkv", frames, fps=30, times=times)
    np.testing.assert_array_equal(read_clip(path, fps=30).frames, frames)
    np.testing.assert_array_equal(read_clip(path, fps=10).frames, frames[::3])
    np.testing.assert_array_equal(read_clip(path, fps=60).frames, frames.repeat(2, axis=0))


def test_last_frame_counts_while_it_is_shown(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mkv", pictures(10))  # 1 s
    assert len(read_clip(path, fps=4).frames) == 4
    assert len(read_clip(path, fps=4, start=0.8).frames) == 1


def test_a_clock_that_starts_again(tmp_path: Path) -> None:
    first, second = pictures(12, 32, 32), pictures(12, 32, 32, seed=1)
    parts = [
        make_video(
            tmp_path / f"{name}.ts", part, codec="mpeg2video", pix_fmt="yuv420p", fps=25
        ).read_bytes()
        for name, part in [("a", first), ("b", second)]
    ]
    joined = tmp_path / "joined.ts"
    joined.write_bytes(b"".join(parts))
    in_order = read_clip(joined)
    assert len(in_order.frames) == 24
    np.testing.assert_array_equal(read_clip(joined, fps=25).frames, in_order.frames)


def test_video_without_time_stamps(tmp_path: Path) -> None:
    frames = pictures(8, 32, 32)
    path = make_video(tmp_path / "a.h264", frames, codec="libx264", pix_fmt="yuv420p", fps=25)
    with av.open(str(path)) as container:
        assert {frame.pts for frame in container.decode(video=0)} == {None}
    in_order = read_clip(path)
    assert (len(in_order.frames), in_order.fps) == (8, 25.0)
    np.testing.assert_array_equal(read_clip(path, fps=12.5).frames, in_order.frames[::2])


def test_a_rate_that_is_not_stated_is_taken_from_the_frames(tmp_path: Path) -> None:
    """As of what a browser records: no DefaultDuration, and stamps that jitter."""
    times = [i / 30 + 0.012 * (-1) ** i * (i > 0) for i in range(40)]
    path = make_video(
        tmp_path / "a.webm", pictures(40, 32, 32), codec="libvpx", pix_fmt="yuv420p", times=times,
        fps=1000,
    )  # fmt: skip
    whole = path.read_bytes()
    at = whole.index(b"\x23\xe3\x83")  # DefaultDuration
    assert whole[at + 3] & 0x80
    size = whole[at + 3] & 0x7F
    path.write_bytes(whole[:at] + bytes([0xEC, 0x80 | (2 + size)]) + whole[at + 2 :])  # Void
    with av.open(str(path)) as container:
        assert not container.streams.video[0].average_rate
    assert read_clip(path).fps == pytest.approx(30, rel=0.03)


def test_held_frame_of_absurd_length_is_refused(tmp_path: Path, refused: Refused) -> None:
    path = make_video(tmp_path / "a.mkv", pictures(2), times=[0.0, 1e6])
    assert "frame 100000" in refused(read_clip, path, size=(2, 2), fps=30)
    assert len(read_clip(path, fps=30, max_frames=40).frames) == 40


# ---------------------------------------------------------------------------------------------
# Damaged and wrong files


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.mp4", b"", "empty"),
        ("empty.npz", b"", "empty"),
        ("text.mp4", b"this is no video\n" * 40, "cannot be decoded"),
        ("text.txt", b"this is no video\n" * 40, "text"),
        ("list.m3u8", b"#EXTM3U\n#EXTINF:9,\n/dev/zero\n#EXT-X-ENDLIST\n", "playlist"),
        ("list.mp4", b"ffconcat version 1.0\nfile a.mkv\n", "playlist"),
        ("zeros.avi", bytes(4096), "cannot be decoded"),
        ("zeros.npz", bytes(4096), "cannot be decoded"),
        ("zeros.npy", bytes(4096), "cannot be decoded"),
        ("zeros.png", bytes(4096), "expected an image"),
        ("wide.gif", b"", "17000 x 100"),
    ],
)
def test_wrong_content(
    tmp_path: Path, refused: Refused, name: str, content: bytes, says: str
) -> None:
    if name == "wide.gif":
        screen = struct.pack("<HHBBB", 17000, 100, 0xF0, 0, 0) + bytes(3) + b"\xff" * 3
        image = b"," + struct.pack("<HHHHB", 0, 0, 17000, 100, 0) + b"\x02\x02\x4c\x01\x00;"
        content = b"GIF89a" + screen + image
    path = tmp_path / name
    path.write_bytes(content)
    assert says in refused(read_clip, path)


def test_missing_file_and_pipe(tmp_path: Path, refused: Refused) -> None:
    assert "no such file" in refused(read_clip, tmp_path / "none.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    assert "pipe" in refused(read_clip, tmp_path / "pipe.mp4")


def test_too_few_frames_says_how_many(tmp_path: Path, refused: Refused) -> None:
    path = make_video(tmp_path / "a.mkv", pictures(3))
    assert "from 1e+15 s on, got 0" in refused(read_clip, path, start=1e15)
    message = refused(read_clip, path, min_frames=5)
    assert "at least 5 frames" in message
    assert "got 3" in message
    assert "got 0" in refused(read_clip, path, start=9.0)
    assert "got 0" in refused(read_clip, path, start=2.0, fps=5)
    assert len(read_clip(path, min_frames=3).frames) == 3


def test_truncated_video_gives_what_is_left(tmp_path: Path, refused: Refused) -> None:
    frames = pictures(30, 64, 64)
    whole = make_video(tmp_path / "whole.mkv", frames)
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    clip = read_clip(cut, min_frames=10)
    assert 10 <= len(clip.frames) < 30
    np.testing.assert_array_equal(clip.frames, frames[: len(clip.frames)])
    assert f"got {len(clip.frames)}" in refused(read_clip, cut, min_frames=30)


def test_damaged_packets_are_skipped_and_counted(tmp_path: Path) -> None:
    frames = pictures(20, 32, 32)
    path = make_video(tmp_path / "a.mov", frames, codec="png", pix_fmt="rgb24")
    data = bytearray(path.read_bytes())
    starts = [i for i in range(len(data)) if data[i : i + 8] == b"\x89PNG\r\n\x1a\n"]
    assert len(starts) == 20
    for hit in (7, 8):
        data[starts[hit] : starts[hit] + 8] = bytes(8)
    path.write_bytes(data)
    clip = read_clip(path, min_frames=18)
    np.testing.assert_array_equal(clip.frames, np.delete(frames, [7, 8], axis=0))
    assert clip.skipped == 2
    assert "damaged" in clip.notes[0]
    held = read_clip(path, fps=10)  # by time, the frame before the break stays on screen
    np.testing.assert_array_equal(held.frames[[6, 7, 8, 9]], frames[[6, 6, 6, 9]])
    assert read_clip(path, max_frames=5).skipped == 0  # the break is never reached


def test_frames_the_decoder_marks_as_damaged_are_left_out(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.avi", pictures(30, 64, 64), codec="mpeg4", pix_fmt="yuv420p")
    data = bytearray(path.read_bytes())
    for i in np.random.default_rng(0).integers(len(data) // 3, len(data) * 2 // 3, 12):
        data[i] ^= 0xFF
    path.write_bytes(data)
    with av.open(str(path)) as container:
        marked = [frame.is_corrupt for frame in container.decode(video=0)]
    assert 0 < sum(marked) < 10
    clip = read_clip(path)
    assert len(clip.frames) == marked.count(False)
    assert clip.skipped == marked.count(True)


def test_damaged_frames_of_h264_are_left_out(tmp_path: Path) -> None:
    """In slice threads its decoder marks none, and shows what lay in memory."""
    path = make_video(
        tmp_path / "a.mp4", pictures(12, 128, 128), codec="libx264", pix_fmt="yuv420p"
    )
    with av.open(str(path)) as container:
        packets = [
            (p.pos, p.size) for p in container.demux(video=0) if p.pos is not None and p.size
        ]
    data = bytearray(path.read_bytes())
    position, size = packets[5]
    data[position + size // 2] ^= 0xFF
    path.write_bytes(data)
    clip = read_clip(path)
    assert (len(clip.frames), clip.skipped) == (11, 1)
    assert "marks as damaged" in clip.notes[0]
    np.testing.assert_array_equal(read_clip(path).frames, clip.frames)


def test_size_change_needs_a_size(tmp_path: Path, refused: Refused) -> None:
    for i, side in enumerate([8, 12]):
        Image.fromarray(pictures(1, side, side)[0]).save(tmp_path / f"{i}.png")
    assert "pass size=" in refused(read_clip, tmp_path)
    assert read_clip(tmp_path, size=(8, 8)).frames.shape == (2, 8, 8, 3)


def test_clip_larger_than_the_budget(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_video(tmp_path / "a.mkv", pictures(10))
    monkeypatch.setattr(video, "MAX_CLIP_BYTES", 5 * 20 * 28 * 3)
    assert "max_frames" in refused(read_clip, path)
    assert len(read_clip(path, max_frames=5).frames) == 5
    assert len(read_clip(path, size=(10, 14)).frames) == 10


@pytest.mark.parametrize(
    "wrong",
    [
        {"fps": 0.0},
        {"fps": float("nan")},
        {"fps": 2000.0},
        {"size": (0, 4)},
        {"size": (4, 99999)},
        {"start": -1.0},
        {"start": float("inf")},
        {"min_frames": 0},
        {"max_frames": 0},
        {"max_frames": 3, "min_frames": 4},
        {"key": "frames"},
    ],
)
def test_options_out_of_range(tmp_path: Path, refused: Refused, wrong: dict[str, Any]) -> None:
    path = make_video(tmp_path / "a.mkv", pictures(5))
    refused(read_clip, path, **wrong)


def test_sound_with_a_cover_picture_is_no_video(tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "song.m4a"
    with av.open(str(path), "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=8000)
        cover = container.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = 16, 16, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        samples = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        samples.sample_rate = 8000
        container.mux(sound.encode(samples))
        container.mux(cover.encode(av.VideoFrame.from_ndarray(pictures(1, 16, 16)[0])))
        container.mux([*sound.encode(None), *cover.encode(None)])
    with av.open(str(path)) as container:
        assert container.streams.video  # the trap: the cover is a video stream
    assert "got only: audio" in refused(read_clip, path)


# ---------------------------------------------------------------------------------------------
# Folders and images


def test_folder_of_images_in_natural_order(tmp_path: Path) -> None:
    frames = pictures(12)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"f{i}.png")  # f10 sorts after f9
    (tmp_path / ".hidden.png").write_bytes(b"not an image")
    (tmp_path / "notes.txt").write_text("not a frame")
    clip = read_clip(tmp_path)
    np.testing.assert_array_equal(clip.frames, frames)
    assert clip.fps == video.UNTIMED_FPS
    assert "no frame rate" in clip.notes[0]
    asked = read_clip(tmp_path, fps=5, start=0.4, max_frames=3)
    np.testing.assert_array_equal(asked.frames, frames[2:5])
    assert (asked.fps, asked.notes) == (5.0, ())


def test_image_kinds(tmp_path: Path) -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    rgb = np.stack([grey] * 3, axis=-1)
    Image.fromarray(grey).save(tmp_path / "0.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "1.png")  # 16 bits
    Image.fromarray(rgb).save(tmp_path / "2.bmp")
    Image.fromarray(rgb).save(tmp_path / "3.webp", lossless=True)
    Image.fromarray(np.dstack([rgb, np.full_like(grey, 255)])).save(tmp_path / "4.png")
    Image.fromarray(rgb).save(tmp_path / "5.JPG", quality=100, subsampling=0)
    frames = read_clip(tmp_path).frames
    for exact in frames[:5]:
        np.testing.assert_array_equal(exact, rgb)
    assert np.abs(frames[5].astype(int) - rgb).max() <= 2
    half = np.dstack([rgb, np.full_like(grey, 128)])
    Image.fromarray(half).save(tmp_path / "half.png")
    halved = read_clip(tmp_path / "half.png").frames
    assert halved.shape == (1, 8, 8, 3)
    np.testing.assert_allclose(halved[0], rgb * (128 / 255), atol=0.51)


def test_exif_orientation(tmp_path: Path) -> None:
    frame = pictures(1, 8, 12)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to show
    Image.fromarray(frame).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_clip(tmp_path / "a.png").frames[0], np.rot90(frame, k=-1))


def test_bad_image_in_a_folder_is_named(tmp_path: Path, refused: Refused) -> None:
    Image.fromarray(pictures(1)[0]).save(tmp_path / "0.png")
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    assert "1.png" in refused(read_clip, tmp_path)


def test_an_image_is_what_its_name_says(tmp_path: Path, refused: Refused) -> None:
    """Other formats that Pillow knows are not looked for: of EPS it would start an interpreter."""
    Image.fromarray(pictures(1)[0]).save(tmp_path / "0.eps")
    (tmp_path / "0.eps").rename(tmp_path / "0.png")
    assert "0.png: expected an image" in refused(read_clip, tmp_path / "0.png")
    films = [Image.fromarray(picture) for picture in pictures(3)]
    for name in ("film.webp", "film.png"):
        films[0].save(tmp_path / name, save_all=True, append_images=films[1:])
        assert "expected a picture, got a film of 3 frames; convert it to .gif or .mp4" in (
            refused(read_clip, tmp_path / name)
        )


def test_image_with_a_huge_header(tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (15000, 15000)).save(path)  # 225 million pixels in a few KB
    assert path.stat().st_size < 100_000
    assert "decompression bomb" in refused(read_clip, path)


def test_find_clips(tmp_path: Path, refused: Refused) -> None:
    assert "found none" in refused(find_clips, tmp_path)
    for name in ["b10.mp4", "b9.MKV", "a.npz", ".c.mp4", "README.md"]:
        (tmp_path / name).touch()
    assert [path.name for path in find_clips(tmp_path)] == ["a.npz", "b9.MKV", "b10.mp4"]
    assert find_clips(tmp_path / "b10.mp4") == [tmp_path / "b10.mp4"]
    (tmp_path / "b10.actions.npy").touch()  # is of the clip, and none itself
    assert len(find_clips(tmp_path)) == 3
    (tmp_path / "frame.png").touch()
    assert "found both" in refused(find_clips, tmp_path)
    frames = tmp_path / "frames"
    frames.mkdir()
    (frames / "0.jpg").touch()
    (frames / "actions.npy").touch()
    assert find_clips(frames) == [frames]
    assert "no such file or folder" in refused(find_clips, tmp_path / "missing")
    assert "no path of this system (File name too long)" in refused(
        find_clips, tmp_path / ("x" * 256)
    )
    os.mkfifo(tmp_path / "pipe")
    assert "got a device, pipe or socket" in refused(find_clips, tmp_path / "pipe")
    (tmp_path / "empty").mkdir()
    assert "found none" in refused(read_clip, tmp_path / "empty")


# ---------------------------------------------------------------------------------------------
# Archives


def test_archive_picks_its_array(tmp_path: Path, refused: Refused) -> None:
    a, b = pictures(4), pictures(4, seed=1)
    actions = np.zeros((4, 4), np.float32)
    path = tmp_path / "a.npz"
    np.savez(path, image=a, aux1_image=b.astype(np.int64), action=actions)
    np.testing.assert_array_equal(read_clip(path).frames, b)
    np.testing.assert_array_equal(read_clip(path, key="image").frames, a)
    message = refused(read_clip, path, key="video")
    assert "image uint8[4, 20, 28, 3]" in message
    np.savez_compressed(path, left=a, action=actions)
    np.testing.assert_array_equal(read_clip(path).frames, a)
    np.savez(path, left=a, right=b)
    message = refused(read_clip, path)
    assert "left" in message
    assert "right" in message
    assert "save the one to read as 'frames'" in message
    assert "key=" in message
    np.savez(path, action=actions)
    assert "action float32[4, 4]" in refused(read_clip, path)


@pytest.mark.parametrize("dtype", ["u1", "i2", ">u2", "<i8", "u8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_dtypes_and_orders(tmp_path: Path, dtype: str, order: str) -> None:
    frames = pictures(5)
    np.save(tmp_path / "a.npy", np.array(frames, dtype=dtype, order=order))  # type: ignore[call-overload]
    np.testing.assert_array_equal(read_clip(tmp_path / "a.npy").frames, frames)
    np.testing.assert_array_equal(read_clip(tmp_path / "a.npy", max_frames=2).frames, frames[:2])


class _Unpickled:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("an object array was unpickled",))


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (pictures(2).astype(np.float32) / 255, "integer pixels"),
        (pictures(2) > 100, "integer pixels"),
        (pictures(2).astype(np.int64) + 200, "expected pixels in 0..255"),
        (np.full((1, 2, 2, 3), 256, np.uint16), "expected pixels in 0..255"),
        (pictures(2).astype(np.int16) - 1, "expected pixels in 0..255"),
        (np.array([[[[_Unpickled()] * 3]]], dtype=object), "never unpickled"),
        (pictures(2)[..., 0], "(T, H, W, 3)"),
        (pictures(2).transpose(0, 3, 1, 2), "(T, H, W, 3)"),
        (np.zeros((2, 0, 5, 3), np.uint8), "claims pictures of 5 x 0"),
        (np.zeros((0, 4, 5, 3), np.uint8), "got 0"),
        (np.zeros((2, 1, 20000, 3), np.uint8), "claims pictures of 20000 x 1"),
    ],
)
@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_arrays_that_are_no_pictures(
    tmp_path: Path, refused: Refused, array: Array, says: str, suffix: str
) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".npz":
        np.savez(path, frames=array)
    else:
        np.save(path, array)
    assert says in refused(read_clip, path)


def header_only(shape: tuple[int, ...], order: bool = False) -> bytes:
    text = repr({"descr": "|u1", "fortran_order": order, "shape": shape})
    text += " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def test_a_small_archive_cannot_ask_for_gigabytes(tmp_path: Path, refused: Refused) -> None:
    wide = header_only((1, 8192, 8192, 3), False).replace(b"|u1", b"<i8")
    with zipfile.ZipFile(tmp_path / "wide.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("frames.npy", wide + bytes(100))
    assert "takes 1536 MiB; save smaller ones" in refused(read_clip, tmp_path / "wide.npz")
    (tmp_path / "long.npy").write_bytes(b"\x93NUMPY\x02\x00" + struct.pack("<I", 600 << 20))
    assert "states a header of 629145600 bytes" in refused(read_clip, tmp_path / "long.npy")
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY\x02\x00\x01")
    assert "breaks off in its header" in refused(read_clip, tmp_path / "cut.npy")


def test_a_member_of_a_like_name_hides_nothing(tmp_path: Path) -> None:
    frames = pictures(3)
    np.savez(tmp_path / "a.npz", frames=frames)
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("frames", b"no array")
    np.testing.assert_array_equal(read_clip(tmp_path / "a.npz").frames, frames)


def test_transparency_that_is_not_read_is_said(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.webm"), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=10)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuva420p"
        frame = av.VideoFrame.from_ndarray(np.full((32, 32, 4), 200, np.uint8), format="rgba")
        for packet in (*stream.encode(frame.reformat(format="yuva420p")), *stream.encode(None)):
            container.mux(packet)
    assert any("transparency is not read" in n for n in read_clip(tmp_path / "a.webm").notes)


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_header_that_claims_more_than_there_is(
    tmp_path: Path, refused: Refused, suffix: str, order: bool
) -> None:
    data = header_only((10**7, 4096, 4096, 3), order) + bytes(1000)  # 500 TB
    path = tmp_path / f"a{suffix}"
    if suffix == ".npz":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("frames.npy", data)
    else:
        path.write_bytes(data)
    assert "the file holds 1000;" in refused(read_clip, path)


def test_zip_bomb_is_read_no_further_than_needed(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bomb.npz"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("frames.npy", "w") as member,
    ):
        member.write(header_only((600, 512, 512, 3)))
        for _ in range(450):
            member.write(bytes(1 << 20))  # 450 MiB in half a MiB
    assert path.stat().st_size < 1 << 20
    monkeypatch.setattr(video, "MAX_CLIP_BYTES", 10 << 20)
    assert "max_frames" in refused(read_clip, path)
    assert len(read_clip(path, max_frames=2).frames) == 2
    assert read_clip(path, size=(4, 4), max_frames=9).frames.shape == (9, 4, 4, 3)


def test_truncated_archive(tmp_path: Path, refused: Refused) -> None:
    np.savez_compressed(tmp_path / "a.npz", frames=pictures(9))
    np.save(tmp_path / "a.npy", pictures(9))
    for name in ("a.npz", "a.npy"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-600])
        refused(read_clip, path)


# ---------------------------------------------------------------------------------------------
# fit


def test_fit_is_identity_at_its_own_size() -> None:
    frames = pictures(3)
    assert fit(frames, (20, 28)) is frames


def test_fit_crops_the_centre_exactly() -> None:
    frames = pictures(2, 20, 28)
    np.testing.assert_array_equal(fit(frames, (20, 20)), frames[:, :, 4:24])
    np.testing.assert_array_equal(fit(frames, (10, 28)), frames[:, 5:15])
    np.testing.assert_array_equal(fit(frames[0], (20, 21)), frames[0, :, 3:24])  # odd difference


@pytest.mark.parametrize("size", [(16, 16), (8, 40), (200, 300)])
def test_fit_keeps_flat_colour_and_shape(size: tuple[int, int]) -> None:
    flat = np.full((2, 37, 61, 3), (10, 120, 250), np.uint8)
    np.testing.assert_array_equal(fit(flat, size), np.broadcast_to(flat[0, 0, 0], (2, *size, 3)))


def test_fit_does_not_alias() -> None:
    """One-pixel stripes shrink to even grey, where nearest or bilinear sampling shows moire."""
    stripes = np.zeros((1, 240, 320, 3), np.uint8)
    stripes[:, :, ::2] = 255
    small = fit(stripes, (64, 64))[0, :, 4:-4].astype(float)
    assert small.mean() == pytest.approx(127.5, abs=3)
    assert small.std() < 6


def test_fit_resizes_like_a_smooth_function() -> None:
    def wave(side: int) -> Array:
        x = (np.arange(side) + 0.5) / side
        value = 128 + 100 * np.sin(5 * x)[:, None] * np.cos(4 * x)[None]
        return np.asarray(np.rint(np.stack([value] * 3, -1)), dtype=np.uint8)

    for source, target in [(256, 64), (64, 256), (256, 100)]:
        error = np.abs(fit(wave(source), (target, target)).astype(int) - wave(target))
        assert error.max() <= 4
        assert error.mean() < 0.7


@pytest.mark.parametrize(
    "frames",
    [
        pictures(1).astype(np.float32),
        pictures(1)[..., :2],
        pictures(1)[0, 0],
        np.zeros((0, 4, 4, 3), np.uint8),
        [[1, 2, 3]],
    ],
)
def test_fit_refuses_what_is_no_picture(frames: Any) -> None:
    with pytest.raises(VideoError, match="expected"):
        fit(frames, (8, 8))


def test_read_clip_fits_while_reading(tmp_path: Path) -> None:
    frames = pictures(5, 40, 60)
    path = make_video(tmp_path / "a.mkv", frames)
    np.testing.assert_array_equal(
        read_clip(path, size=(16, 16)).frames, np.stack([fit(f, (16, 16)) for f in frames])
    )


# ---------------------------------------------------------------------------------------------
# Writing


def smooth(count: int, height: int, width: int) -> Array:
    """A moving gradient, which lossy codecs keep well."""
    y, x = np.mgrid[:height, :width]
    frames = [np.stack([4 * x + 3 * t, 3 * y + t, 255 - 2 * x - 2 * y], -1) for t in range(count)]
    return np.asarray(np.clip(np.stack(frames), 0, 255), dtype=np.uint8)


@pytest.mark.parametrize("size", [(64, 64), (33, 47), (2, 2)])
def test_mp4_round_trip(tmp_path: Path, size: tuple[int, int]) -> None:
    frames = smooth(9, *size)
    path = tmp_path / "new" / "folder" / "a.mp4"
    assert write_clip(path, frames, 30000 / 1001) == [path]
    clip = read_clip(path)
    height, width = size
    assert clip.frames.shape == (9, height + height % 2, width + width % 2, 3)
    assert clip.fps == pytest.approx(30000 / 1001)
    assert psnr(clip.frames[:, :height, :width], frames) > (38 if height > 2 else 20)
    if height % 2:
        last, pad = clip.frames[:, height - 1].astype(int), clip.frames[:, height]
        assert np.abs(last - pad).mean() < 3
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert (stream.color_range, stream.colorspace) == (1, 6)
    assert [entry.name for entry in path.parent.iterdir()] == ["a.mp4"]


def test_gif_keeps_its_length_and_colours(tmp_path: Path) -> None:
    frames = smooth(20, 40, 56)
    path = tmp_path / "a.gif"
    write_clip(path, frames, 15)
    with Image.open(path) as image:
        delays = [frame.info["duration"] for frame in ImageSequence.Iterator(image)]
    assert len(delays) == 20
    assert set(delays) == {60, 70}
    assert sum(delays) == pytest.approx(1000 * 20 / 15, abs=10)
    clip = read_clip(path)
    assert clip.fps == pytest.approx(15, rel=0.02)
    assert psnr(clip.frames, frames) > 30


def test_a_gif_has_the_colours_of_every_frame(tmp_path: Path) -> None:
    frames = np.asarray(smooth(64, 40, 56).mean(axis=-1, keepdims=True).repeat(3, -1), np.uint8)
    frames[63, 20:30, 20:30] = (255, 0, 0)  # in the last of many frames
    write_clip(tmp_path / "a.gif", frames, 10)
    clip = read_clip(tmp_path / "a.gif")
    assert np.abs(clip.frames[-1, 25, 25] - np.array([255, 0, 0])).max() < 8
    error = clip.frames.astype(float) - frames
    assert abs(error.mean()) < 0.8  # and is no darker than they are


def test_gif_with_still_frames_plays_the_same(tmp_path: Path) -> None:
    frames = pictures(3)[[0, 0, 0, 1, 1, 2]]
    write_clip(tmp_path / "a.gif", frames, 10)
    clip = read_clip(tmp_path / "a.gif", fps=10)
    assert len(clip.frames) == 6
    assert psnr(clip.frames, frames) > 25
    write_clip(tmp_path / "still.gif", frames[:3], 10)
    assert len(read_clip(tmp_path / "still.gif", fps=10).frames) == 3


def test_numbered_frames_are_exact(tmp_path: Path, refused: Refused) -> None:
    frames = pictures(11, 13, 17)
    paths = write_clip(tmp_path / "out" / "a.png", frames, 10)
    assert [path.name for path in paths] == [f"a_{i:04d}.png" for i in range(11)]
    np.testing.assert_array_equal(read_clip(tmp_path / "out").frames, frames)
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == [p.name for p in paths]
    assert all(path.stat().st_mode & 0o044 for path in paths)  # as readable as other files
    write_clip(tmp_path / "out" / "a.png", frames[::-1], 10)
    np.testing.assert_array_equal(read_clip(tmp_path / "out").frames, frames[::-1])
    with pytest.raises(VideoError, match=r"a_0005\.png: left from a longer clip"):
        write_clip(tmp_path / "out" / "a.png", frames[:5], 10)
    (tmp_path / "out" / "a_0005.png").rename(tmp_path / "out" / "b.png")
    with pytest.raises(VideoError, match=r"a_0006\.png: left from a longer clip"):
        write_clip(tmp_path / "out" / "a.png", frames[:5], 10)
    (tmp_path / "out" / "b.png").rename(tmp_path / "out" / "a_0005.png")
    np.testing.assert_array_equal(read_clip(tmp_path / "out").frames, frames[::-1])


def test_write_png(tmp_path: Path, refused: Refused) -> None:
    image = pictures(1)[0]
    write_png(tmp_path / "x" / "a.png", image)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "x" / "a.png")), image)
    refused(write_png, tmp_path / "a.jpg", image)
    refused(write_png, tmp_path / "a.png", image.astype(np.float32))


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.png"])
def test_failed_write_leaves_things_as_they_were(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    old = tmp_path / ("a_0000.png" if name == "a.png" else name)
    old.write_bytes(b"old")
    frames, calls = pictures(6, 16, 16), 0
    kind, method = (av.VideoFrame, "from_ndarray") if name == "a.mp4" else (Image.Image, "save")
    whole = getattr(kind, method)

    def full_disk(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if name == "a.gif":
            Path(args[1]).write_bytes(b"half")
        if name == "a.gif" or calls == 4:
            raise OSError(28, "No space left on device")
        return whole(*args, **kwargs)

    if name == "a.mp4":

        class Frames:
            from_ndarray = staticmethod(full_disk)

        monkeypatch.setattr(_video_writing, "VideoFrame", Frames)
    else:
        monkeypatch.setattr(kind, method, full_disk)
    assert "No space left" in refused(write_clip, tmp_path / name, frames, 10)
    assert calls in (1, 4)
    assert [entry.name for entry in tmp_path.iterdir()] == [old.name]
    assert old.read_bytes() == b"old"


def test_writing_refuses(tmp_path: Path, refused: Refused) -> None:
    frames = pictures(2)
    assert ".mp4, .gif or .png" in refused(write_clip, tmp_path / "a.avi", frames, 10)
    assert "no suffix" in refused(write_clip, tmp_path / "a", frames, 10)
    for fps in (0, -1, float("nan"), 5000):
        refused(write_clip, tmp_path / "a.mp4", frames, fps)
    assert "50 fps" in refused(write_clip, tmp_path / "a.gif", frames, 60)
    for wrong in (frames[0], frames[:0], frames.astype(np.float64), frames[..., :1], "frames"):
        refused(write_clip, tmp_path / "a.mp4", wrong, 10)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    refused(write_clip, tmp_path / "file" / "a.mp4", frames, 10)
    (tmp_path / "folder.mp4").mkdir()
    refused(write_clip, tmp_path / "folder.mp4", frames, 10)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder.mp4"]


# ---------------------------------------------------------------------------------------------
# Real clips: every file of the folder


GOOD = [
    ("bair_push_30f_64.npz", 30, (64, 64), 10, 0),
    ("bair_push_aux1_64_ffv1.mkv", 30, (64, 64), 10, 0),
    ("rt1_can_22f_256x320.npz", 22, (256, 320), 10, 0),
    ("rt1_can_256x320_ffv1.mkv", 22, (256, 320), 3, 0),
    ("ucf101_soccerjuggling_g23_c01.avi", 240, (240, 320), 30000 / 1001, 0),
    ("ucf101_cricketshot_g04_c01.gif", 79, (224, 224), 25, 0),
    ("kinetics_segway.mp4", 303, (256, 340), 30, 0),
    ("kinetics_armwrestling.mp4", 280, (256, 340), 28, 0),
    ("hmdb51_cartwheel_nonutf8meta.avi", 83, (240, 320), 30, 0),
    ("intel_asl_hungry.mkv", 49, (480, 640), 30, 0),
    ("intel_bottle_hand.mp4", 1189, (360, 640), 179 / 6, 0),
    ("cc0_flower_vp8.webm", 150, (540, 960), 30000 / 1001, 0),
    ("awkward/vfr_traffic_720p.mp4", 576, (720, 1280), 4800 / 287, 0),
    ("awkward/rotated90_3frames.mov", 3, (568, 320), 30, 0),
    ("awkward/corrupt_midstream_720p.mp4", 48, (720, 1280), 10, 2),
    ("awkward/hevc_10bit_200x200.mp4", 30, (200, 200), 30, 0),
    ("awkward/one_frame_av1_64.mp4", 1, (64, 64), 24, 0),
    ("awkward/odd_height_overlay_400x281.gif", 31, (281, 400), 25 / 3, 0),
]
BAD = [
    ("awkward/audio_only.mp4", "got only: audio"),
    ("awkward/made_truncated_no_moov.mp4", "cannot be decoded"),
    ("README.md", "cannot be decoded"),
]


@cache
def thumbnails(name: str) -> Clip:
    """All frames of a real clip, small, decoded once for all tests that compare with them."""
    return read_clip(CLIPS / name, size=(18, 32))


@needs_clips
@pytest.mark.parametrize(("name", "frames", "size", "fps", "skipped"), GOOD)
def test_real_clip(
    name: str, frames: int, size: tuple[int, int], fps: float, skipped: int, refused: Refused
) -> None:
    assert read_clip(CLIPS / name, max_frames=2).frames.shape == (min(frames, 2), *size, 3)
    clip = thumbnails(name)
    assert clip.frames.shape == (frames, 18, 32, 3)
    assert clip.fps == pytest.approx(fps)
    assert clip.skipped == skipped
    assert clip.frames.std() > 10  # pictures, not blanks
    if frames < 50:
        assert f"got {frames}" in refused(read_clip, CLIPS / name, size=(9, 16), min_frames=50)


@needs_clips
@pytest.mark.parametrize(("name", "says"), BAD)
def test_real_file_that_is_refused(name: str, says: str, refused: Refused) -> None:
    assert says in refused(read_clip, CLIPS / name)


@needs_clips
def test_every_real_clip_has_a_case() -> None:
    named = {case[0] for case in [*GOOD, *BAD]}
    there = {path.relative_to(CLIPS).as_posix() for path in CLIPS.rglob("*") if path.is_file()}
    assert there == named


@needs_clips
def test_find_clips_in_the_real_folder() -> None:
    assert len(find_clips(CLIPS)) == 12
    assert len(find_clips(CLIPS / "awkward")) == 8


@needs_clips
@pytest.mark.parametrize(
    ("archive", "key", "encoded"),
    [
        ("bair_push_30f_64.npz", "aux1_image", "bair_push_aux1_64_ffv1.mkv"),
        ("rt1_can_22f_256x320.npz", "image", "rt1_can_256x320_ffv1.mkv"),
    ],
)
def test_archive_and_lossless_video_agree(archive: str, key: str, encoded: str) -> None:
    with np.load(CLIPS / archive, allow_pickle=False) as arrays:
        expected = arrays[key]
    np.testing.assert_array_equal(read_clip(CLIPS / archive).frames, expected)
    np.testing.assert_array_equal(read_clip(CLIPS / encoded).frames, expected)


@needs_clips
def test_bair_views_are_told_apart() -> None:
    aux = read_clip(CLIPS / "bair_push_30f_64.npz").frames
    main = read_clip(CLIPS / "bair_push_30f_64.npz", key="image").frames
    assert np.abs(aux.astype(int) - main).mean() > 10


@needs_clips
@pytest.mark.parametrize(
    "name", ["ucf101_cricketshot_g04_c01.gif", "awkward/odd_height_overlay_400x281.gif"]
)
def test_gif_equals_another_decoder(name: str) -> None:
    clip = read_clip(CLIPS / name, max_frames=12)
    with Image.open(CLIPS / name) as image:
        for i, frame in enumerate(clip.frames):
            image.seek(i)
            np.testing.assert_array_equal(frame, np.asarray(image.convert("RGB")))


def planes(frame: av.VideoFrame, dtype: type) -> list[Array]:
    """Y, Cb, Cr of a 4:2:0 frame, chroma repeated to full size."""
    whole: list[Array] = []
    for i, plane in enumerate(frame.planes):
        pitch = plane.line_size // np.dtype(dtype).itemsize
        values: Array = np.frombuffer(bytes(plane), dtype).reshape(-1, pitch)[:, : plane.width]
        whole.append(values.repeat(2, 0).repeat(2, 1) if i else values)
    return [values[: frame.height, : frame.width].astype(float) for values in whole]


@needs_clips
@pytest.mark.parametrize(
    ("name", "matrix", "full", "bits"),
    [
        ("intel_asl_hungry.mkv", "601", True, 8),
        ("kinetics_segway.mp4", "601", False, 8),
        ("awkward/vfr_traffic_720p.mp4", "709", False, 8),
        ("awkward/hevc_10bit_200x200.mp4", "601", False, 10),
    ],
)
def test_colour_against_an_independent_conversion(
    name: str, matrix: str, full: bool, bits: int
) -> None:
    with av.open(str(CLIPS / name)) as container:
        frame = next(container.decode(video=0))
    y, cb, cr = planes(frame, np.uint8 if bits == 8 else np.uint16)
    got = read_clip(CLIPS / name, max_frames=1).frames[0].astype(float)
    # Where the chroma is flat its interpolation does not matter and only the conversion counts.
    flat = np.ones_like(y, dtype=bool)
    for c in (cb, cr):
        for shift in (-3, -2, -1, 1, 2, 3):
            for axis in (0, 1):
                flat &= np.abs(np.roll(c, shift, axis) - c) <= 2 ** (bits - 8)
    assert flat.mean() > 0.15
    expected = yuv_to_rgb(y, cb, cr, matrix=matrix, full=full, bits=bits)
    error = np.abs(got - expected)[flat]
    assert error.mean() < 0.7
    assert np.percentile(error, 99) < 3
    assert abs((got - expected)[flat].mean()) < 0.2
    wrong = yuv_to_rgb(y, cb, cr, matrix=matrix, full=not full, bits=bits)
    assert np.abs(got - wrong)[flat].mean() > 4


@needs_clips
def test_phone_video_is_upright() -> None:
    path = CLIPS / "awkward/rotated90_3frames.mov"
    clip = read_clip(path)
    assert clip.frames.shape == (3, 568, 320, 3)
    with av.open(str(path)) as container:
        stored = next(container.decode(video=0)).to_ndarray(format="rgb24").astype(float)
    turned = [np.abs(np.rot90(stored, k=k) - clip.frames[0]).mean() for k in (-1, 1)]
    assert turned[0] < 2  # clockwise
    assert turned[1] > 10


@needs_clips
def test_metadata_that_is_not_utf8() -> None:
    path = CLIPS / "hmdb51_cartwheel_nonutf8meta.avi"
    try:
        with av.open(str(path)) as container:  # PyAV 19 keeps the bytes
            metadata = {**container.metadata, **container.streams.video[0].metadata}
            assert any("\udc80" <= letter <= "\udcff" for letter in "".join(metadata.values()))
    except UnicodeDecodeError:  # PyAV 18
        pass
    in_order = read_clip(path, size=(60, 80)).frames
    # Packed B-frames: time stamps come as 1 4 3 6 5 .. 84, one of 84 frames is missing (2).
    by_time = read_clip(path, size=(60, 80), fps=30).frames
    np.testing.assert_array_equal(by_time, in_order[[0, *range(83)]])


@needs_clips
def test_variable_rate_by_time_and_by_index() -> None:
    name = "awkward/vfr_traffic_720p.mp4"
    path = CLIPS / name
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stamps = sorted(
            packet.pts / 12800 for packet in container.demux(stream) if packet.pts is not None
        )
        assert stream.time_base == Fraction(1, 12800)
    times = np.array(stamps) - stamps[0]
    assert times[288] == pytest.approx(11.52)
    assert np.diff(times)[[0, -1]] == pytest.approx([0.04, 0.08])
    by_index = thumbnails(name).frames
    by_time = read_clip(path, size=(18, 32), fps=25).frames
    assert (len(by_index), len(by_time)) == (576, 864)
    shown = np.searchsorted(times, np.arange(864) / 25 + 1e-4, side="right") - 1
    np.testing.assert_array_equal(by_time, by_index[shown])
    assert len(set(shown[:288])) == 288
    assert shown[288:292].tolist() == [288, 288, 289, 289]


@needs_clips
def test_break_in_the_middle(refused: Refused) -> None:
    path = CLIPS / "awkward/corrupt_midstream_720p.mp4"
    clip = read_clip(path, size=(36, 64), min_frames=48)
    assert (len(clip.frames), clip.skipped) == (48, 2)
    assert "damaged" in clip.notes[0]
    message = refused(read_clip, path, size=(36, 64), min_frames=49)
    assert "got 48" in message
    assert "2 damaged" in message
    before = read_clip(path, size=(36, 64), max_frames=28)
    assert (before.skipped, before.notes) == (0, ())


@needs_clips
@pytest.mark.parametrize(
    ("name", "start", "first"),
    [
        ("intel_bottle_hand.mp4", 25.0, 745),
        ("intel_bottle_hand.mp4", 39.5, 1178),
        ("kinetics_segway.mp4", 8.51, 255),
        ("awkward/vfr_traffic_720p.mp4", 30.0, 519),
    ],
)
def test_seeking_finds_the_same_frames(name: str, start: float, first: int) -> None:
    assert _video_streams._seek_point(CLIPS / name, start) is not None
    late = read_clip(CLIPS / name, size=(18, 32), start=start, max_frames=4)
    np.testing.assert_array_equal(late.frames, thumbnails(name).frames[first : first + 4])
    assert late.skipped == 0


@needs_clips
@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png"])
def test_real_frames_survive_writing(tmp_path: Path, suffix: str) -> None:
    frames = read_clip(CLIPS / "bair_push_30f_64.npz").frames
    written = write_clip(tmp_path / f"a{suffix}", frames, 10)
    clip = read_clip(written[0] if len(written) == 1 else tmp_path, fps=10)
    assert clip.frames.shape == frames.shape
    if suffix == ".png":
        np.testing.assert_array_equal(clip.frames, frames)
    else:
        assert psnr(clip.frames, frames) > (30 if suffix == ".mp4" else 35)
