"""Video streams: from a file's packets to upright RGB frames with their times."""

from __future__ import annotations

import heapq
import math
import struct
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, dropwhile, repeat
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.buffer import Buffer
from av.codec.context import ThreadType
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, VideoReformatter
from av.video.stream import VideoStream

from canvasmar_rt._video_common import (
    SCALER,
    UNSTATED_FPS,
    Pixels,
    Shown,
    Track,
    brief,
    check_side,
    over_black,
)
from canvasmar_rt.errors import VideoError

_REORDER = 4  # frames whose time stamps may be out of order (packed B-frames in AVI)
_SEEK_FROM_S, _SEEK_MARGIN_S = 8.0, 3.0
# Demuxers that read no video of their own: text art by file name, and lists of other files.
_NOT_VIDEO = frozenset({"tty", "hls", "dash", "concat", "bin", "xbin", "idf", "adf", "rawvideo"})
# Of metadata that is not UTF-8. PyAV 19 reads it without being asked, and has no such option.
_TOLERANT: dict[str, Any] = (
    {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}
)
_PLAYLIST = (b"#EXTM3U", b"ffconcat", b"<?xml", b"<MPD")


@contextmanager
def open_video(source: Path, *, timed: bool, start: float = 0.0) -> Iterator[Track]:
    """Open a video file; `timed` puts its time stamps in order, `start` (s) is sought if far."""
    with source.open("rb") as file:
        head = file.read(64).lstrip()
    if head.startswith(_PLAYLIST):
        raise VideoError(f"{source}: this is a playlist or text, not a video; give the video")
    seek_to = _seek_point(source, start) if start > _SEEK_FROM_S else None
    with _container(source) as container:
        stream = _video_stream(source, container)
        tick = float(stream.time_base) if stream.time_base else 0.0
        rates = (stream.average_rate, stream.guessed_rate, stream.base_rate)
        fps = next((float(rate) for rate in rates if rate and rate > 0), 0.0)
        track = Track(shown=iter(()), fps=fps or UNSTATED_FPS, slack=0.0)
        # a delay for each frame; where no rate is stated, the guess is the clock's tick
        track.measured = container.format.name in ("gif", "apng") or not stream.average_rate
        # A clock as coarse as the frames themselves counts frames and rounds nothing.
        rounded = tick < 0.5 / track.fps
        track.slack = max(1e-6, min(tick, 0.25 / track.fps)) if rounded else 1e-6
        if stream.metadata.get("alpha_mode") == "1":  # VP8 and VP9 keep it beside their pictures
            track.notes.append("the video's transparency is not read: all of it shows")
        if not fps:
            track.notes.append(f"the video states no frame rate: {UNSTATED_FPS:g} fps is assumed")
        origin = None
        if seek_to is not None:
            origin, offset = seek_to
            container.seek(offset, stream=stream)
        frames = _decoded(source, container, stream, track)
        track.shown = _timed(source, frames, track.fps, _REORDER if timed else 0, origin)
        yield track


def frame_stamps(source: Path, *, exact: bool) -> tuple[list[int | None], float | None]:
    """The time stamps of a video's frames in the file's order, read without decoding, and the
    seconds of a tick; a stamp or the tick is None where the file has none.

    `exact` decodes MPEG-4 Part 2, where a packet may only repeat a frame."""
    with _container(source) as container:
        stream = _video_stream(source, container)
        tick = float(stream.time_base) if stream.time_base else None
        if exact and stream.codec_context.name == "mpeg4":
            track = Track(shown=iter(()), fps=UNSTATED_FPS, slack=0.0)
            return [frame.pts for frame in _decoded(source, container, stream, track)], tick
        packets = (p for p in container.demux(stream) if p.size)
        decodable = dropwhile(lambda packet: not packet.is_keyframe, packets)
        stamps = [
            packet.dts if packet.pts is None else packet.pts
            for packet in decodable
            if not packet.is_discard  # cut off by an edit list
        ]
        return stamps, tick


@contextmanager
def _container(source: Path) -> Iterator[InputContainer]:
    # An absolute path, so that no part of a file name is taken for a protocol; and no protocol
    # but local files, so that no header can send the reader to a network.
    with av.open(
        str(source.resolve()),
        container_options={"protocol_whitelist": "file"},
        **_TOLERANT,
    ) as container:
        if _NOT_VIDEO & set(container.format.name.split(",")):
            raise VideoError(
                f"{source}: expected a video, got {container.format.name} (text, raw bytes or a"
                " list of files); give a video with a header, such as .mp4"
            )
        yield container


def _video_stream(source: Path, container: InputContainer) -> VideoStream:
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        kinds = ", ".join(sorted({s.type for s in container.streams})) or "no streams"
        raise VideoError(f"{source}: expected a video stream, got only: {kinds}; give a video")
    stream = streams[0]
    if stream.codec_context is None:
        raise VideoError(f"{source}: this PyAV build has no decoder for its video; re-encode it")
    check_side(source, stream.height, stream.width)
    # In slice threads, PyAV's default, FFmpeg's H.264 decoder neither mends nor marks a damaged
    # frame: what it could not decode is whatever lay in memory.
    stream.codec_context.thread_type = ThreadType.NONE
    return stream


def _seek_point(source: Path, start: float) -> tuple[float, int] | None:
    """Time stamp (s) of the first frame, and an offset from which `start` can be reached.

    None where the file cannot be trusted to seek; it is then decoded from its beginning.
    """
    try:
        with _container(source) as container:
            stream = _video_stream(source, container)
            first = next(container.decode(stream))
            if first.pts is None or not stream.time_base:
                return None
            offset = int((first.time + start - _SEEK_MARGIN_S) / stream.time_base)
            container.seek(offset, stream=stream)
            landed = next(container.decode(stream))
            if landed.pts is None or landed.time > first.time + start - 0.5 * _SEEK_MARGIN_S:
                return None
            return first.time, offset
    except (av.FFmpegError, StopIteration, OverflowError):
        return None


def _decoded(
    source: Path, container: InputContainer, stream: VideoStream, track: Track
) -> Iterator[VideoFrame]:
    """Frames in display order, past damaged packets, which are counted on `track`."""
    packets = container.demux(stream)
    while True:
        frames: list[VideoFrame] = []
        try:
            packet = next(packets, None)
        except av.FFmpegError as error:  # the container itself breaks off
            track.skip(error)
            packet = None
        if packet is not None and packet.is_corrupt:
            track.skip("a packet the container marks as damaged")
        try:
            frames = stream.codec_context.decode(packet)
        except av.EOFError:  # already flushed by the demuxer's own last packet
            return
        except av.FFmpegError as error:
            track.skip(error)
        for frame in frames:
            check_side(source, frame.height, frame.width)
            if frame.is_corrupt:
                track.skip("a frame the decoder marks as damaged")
            else:
                yield frame
        if packet is None:
            return


def _timed(
    source: Path, frames: Iterator[VideoFrame], fps: float, reorder: int, origin: float | None
) -> Iterator[Shown]:
    """Give each frame its time: frames come in display order, their time stamps may not.

    The smallest stamp among the next few frames belongs to the first of them. A frame without a
    stamp follows the last one at the nominal rate, and so does a clock that starts again.
    """
    step, convert = 1.0 / fps, VideoReformatter()
    ahead: deque[VideoFrame] = deque()
    stamps: list[float] = []
    shift, newest, last = 0.0, -math.inf, -math.inf
    for frame in chain(frames, repeat(None, reorder + 1)):
        if frame is not None:
            ahead.append(frame)
            if frame.pts is not None:
                stamp = frame.time + shift
                if stamp < newest - 2 * _REORDER * step:  # the clock started again
                    shift += newest + step - stamp
                    stamp = newest + step
                newest = max(newest, stamp)
                heapq.heappush(stamps, stamp)
            if len(ahead) <= reorder:
                continue
        if not ahead:
            return
        shown = ahead.popleft()
        if shown.pts is not None:
            time = max(heapq.heappop(stamps), last)
        else:
            time = last + step if last > -math.inf else 0.0
        last = time
        origin = time if origin is None else origin
        stays = float(shown.duration * (shown.time_base or 0)) or step
        now = time - origin
        yield Shown(now, now + stays, lambda frame=shown: _upright_rgb(source, frame, convert))  # type: ignore[misc]


def _upright_rgb(source: Path, frame: VideoFrame, convert: VideoReformatter) -> Pixels:
    """One decoded frame as (H, W, 3) uint8, over black, turned as its display matrix says."""
    pixel_format = frame.format
    seethrough = pixel_format.has_palette or any(c.is_alpha for c in pixel_format.components)
    target = "rgba" if seethrough else "rgb24"
    try:
        picture = convert.reformat(frame, format=target, interpolation=SCALER).to_ndarray()
    except av.FFmpegError as error:
        raise VideoError(
            f"{source}: its colours (matrix {int(frame.colorspace)}) cannot be turned into RGB"
            f" ({brief(error)}); convert it to BT.709"
        ) from error
    rgb = np.asarray(picture, dtype=np.uint8)
    grey = not seethrough and len(pixel_format.components) == 1
    if grey and frame.color_range == ColorRange.MPEG:  # which the scaler takes for full range
        rgb = np.clip((rgb - 16.0) * (255 / 219), 0, 255).round().astype(np.uint8)
    if seethrough:
        rgb = over_black(rgb)
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return rgb
    # x' = a x + c y, y' = b x + d y (16.16 fixed point): one of eight turns and mirrorings.
    a, b, _, c, d = struct.unpack("=9i", bytes(cast(Buffer, matrix)))[:5]
    x_sign, y_sign = (a, d) if abs(a) >= abs(c) else (c, b)
    if abs(a) < abs(c):
        rgb = rgb.transpose(1, 0, 2)
    return np.ascontiguousarray(rgb[:: -1 if y_sign < 0 else 1, :: -1 if x_sign < 0 else 1])
