"""TFRecord files and tf.train.Example messages from their definition, byte by byte.

The oracle for the reader: it shares no code with it, neither protobuf nor a CRC library.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping

Feature = bytes | list[float] | list[int]


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli), table of one byte at a time."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _table_entry(value: int) -> int:
    for _ in range(8):
        value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value


_TABLE = [_table_entry(i) for i in range(256)]


def masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) % 2**32)


def record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def file_of(examples: Iterable[Mapping[str, Feature]]) -> bytes:
    return b"".join(record(example(features)) for features in examples)


def example(features: Mapping[str, Feature], *, packed: bool = True) -> bytes:
    entries = [
        _field(1, _field(1, name.encode()) + _field(2, _feature(value, packed)))
        for name, value in features.items()
    ]
    return _field(1, b"".join(entries))


def _feature(value: Feature, packed: bool) -> bytes:
    if isinstance(value, bytes):
        return _field(1, _field(1, value))
    if all(isinstance(number, int) for number in value):
        return _field(3, _field(1, b"".join(_varint(int(number)) for number in value)))
    floats = [struct.pack("<f", number) for number in value]
    if packed:
        return _field(2, _field(1, b"".join(floats)))
    return _field(2, b"".join(_varint(1 << 3 | 5) + number for number in floats))


def _field(number: int, payload: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
