"""What goes over a session's WebSocket: pictures as binary messages, and JSON texts.

A picture is a header of 12 bytes, little-endian, and a film strip: the tick's t pixel frames, one
below the other, as one JPEG or as raw RGB, uint8 (t*H, W, 3).

| bytes | type | |
|---|---|---|
| 0 | uint8 | 0: frames, 1: canvas (the blurred guess, before the frames) |
| 1 | uint8 | 0: JPEG, 1: raw |
| 2 | uint8 | AR steps it was made with; 0: the canvas alone |
| 3 | uint8 | 1: the deadline was met |
| 4-7 | uint32 | ticks since the session's start, from 0; a gap was dropped |
| 8-11 | float32 | milliseconds from the tick's start to these frames |
"""

from __future__ import annotations

import io
import struct
from typing import Annotated, Literal, NamedTuple

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError

from canvasmar_rt.errors import InputError
from canvasmar_rt.service.world import Picture

HEADER = struct.Struct("<BBBBIf")
FORMATS = ("jpeg", "raw")
JPEG_QUALITY = 90


class Header(NamedTuple):
    """The header's fields, in their order."""

    canvas: int
    format: int
    ar_steps: int
    deadline_met: int
    frame: int
    latency_ms: float


def pack(picture: Picture, format_: str) -> bytes:
    """A picture as a binary message; `format_` is one of `FORMATS`."""
    strip = picture.frames.reshape(-1, *picture.frames.shape[2:])
    header = HEADER.pack(
        picture.canvas, FORMATS.index(format_), picture.ar_steps, picture.deadline_met,
        picture.frame, picture.latency_ms,
    )  # fmt: skip
    if format_ == "raw":
        return header + np.ascontiguousarray(strip).tobytes()
    buffer = io.BytesIO()
    Image.fromarray(strip).save(buffer, "jpeg", quality=JPEG_QUALITY, subsampling=0)
    return header + buffer.getvalue()


def unpack(message: bytes) -> tuple[Header, bytes]:
    """Header and film strip of a binary message."""
    return Header(*HEADER.unpack_from(message)), message[HEADER.size :]


class _Text(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Action(_Text):
    """The action of every tick from now on: A numbers in the model's units."""

    type: Literal["action"]
    action: list[FiniteFloat]


class Reset(_Text):
    """Start again: from start number `start`, or the next in turn."""

    type: Literal["reset"]
    start: Annotated[int, Field(ge=0, lt=2**31)] | None = None


class Canvas(_Text):
    """Whether the canvas is sent, too."""

    type: Literal["canvas"]
    on: bool


_TEXTS: TypeAdapter[Action | Reset | Canvas] = TypeAdapter(
    Annotated[Action | Reset | Canvas, Field(discriminator="type")]
)


def read_text(text: str, action_dim: int, action_limit: float) -> Action | Reset | Canvas:
    """A client's text message.

    Raises:
        InputError: if it is not one of the three, or its action is not one of this model's.
    """
    try:
        told = _TEXTS.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{where}: {first['msg']}" if where else first["msg"]) from None
    if isinstance(told, Action):
        if len(told.action) != action_dim:
            raise InputError(f"action: expected {action_dim} numbers, got {len(told.action)}")
        if any(abs(value) > action_limit for value in told.action):
            raise InputError(f"action: numbers must lie within {action_limit:g} of 0")
    return told
