"""TFRecord files and the tf.train.Example messages in them, read without TensorFlow.

A file is a row of records, each of them, in little-endian order:
  length of the data (8 bytes) | checksum of the length (4) | data | checksum of the data (4).
Source: tensorflow.org/tutorials/load_data/tfrecord, "TFRecords format details".
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import google_crc32c
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message
from numpy.typing import NDArray

from canvasmar_rt.errors import InputError
from canvasmar_rt.files import is_stream

_LENGTH_BYTES, _CRC_BYTES = 8, 4
_HEADER_BYTES = _LENGTH_BYTES + _CRC_BYTES


class Record(NamedTuple):
    """Where one record's data lie."""

    path: Path
    number: int  # from 0, in the file
    offset: int  # bytes from the beginning of the file
    size: int  # bytes

    def __str__(self) -> str:
        return f"{self.path}#{self.number}"


def scan_records(path: Path) -> tuple[list[Record], str | None]:
    """The whole records of a file in order, and what is wrong after the last, if anything.

    Only the headers are read, and their checksums checked; `read_record` checks the data.
    """
    records: list[Record] = []
    if is_stream(path):
        return records, "expected a file, got a device, pipe or socket"
    try:
        with path.open("rb", buffering=0) as file:
            end = path.stat().st_size
            at = 0
            while at < end:
                file.seek(at)
                header = file.read(_HEADER_BYTES)
                where = f"record {len(records)}, at byte {at},"
                if len(header) < _HEADER_BYTES:
                    return records, f"{where} is cut short; copy the file again"
                if masked_crc(header[:_LENGTH_BYTES]) != _u32(header[_LENGTH_BYTES:]):
                    return records, f"{where} has a header of the wrong checksum; copy it again"
                (size,) = struct.unpack("<Q", header[:_LENGTH_BYTES])
                start, at = at + _HEADER_BYTES, at + _HEADER_BYTES + size + _CRC_BYTES
                if at > end:
                    return records, f"{where} is cut short; copy the file again"
                records.append(Record(path, len(records), start, size))
    except OSError as error:
        return records, f"cannot be read ({error.strerror or error})"
    return records, None if records else "the file is empty"


def read_record(record: Record) -> bytes:
    """The data of one record.

    Raises:
        InputError: the file cannot be read, has become shorter, or the checksum is wrong.
    """
    try:
        with record.path.open("rb") as file:
            file.seek(record.offset)
            data = file.read(record.size)
            stored = file.read(_CRC_BYTES)
    except OSError as error:
        raise InputError(f"{record}: cannot be read ({error.strerror or error})") from error
    if len(data) < record.size or len(stored) < _CRC_BYTES:
        raise InputError(f"{record}: the record is cut short; copy the file again")
    if masked_crc(data) != _u32(stored):
        raise InputError(f"{record}: the data have the wrong checksum; copy the file again")
    return data


def masked_crc(data: bytes) -> int:
    """CRC-32C rotated right by 15 bits plus a constant, as the format stores it."""
    crc = int(google_crc32c.value(data))
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


class Example:
    """The features of one tf.train.Example by name.

    Raises:
        InputError: the data are no such message. `what` names them in every message.
    """

    def __init__(self, data: bytes, what: str) -> None:
        self._what = what
        message = cast(Any, _example_type()())
        try:
            message.ParseFromString(data)
        except DecodeError as error:
            raise InputError(f"{what}: expected a tf.train.Example, got other data") from error
        self._features: Mapping[str, Any] = message.features.feature

    def __contains__(self, name: str) -> bool:
        return name in self._features

    def bytes(self, name: str, size: int) -> bytes:
        """The one byte string called `name`.

        Raises:
            InputError: there is none, or not of `size` bytes.
        """
        values = self._values(name, "bytes_list")
        if len(values) != 1 or len(values[0]) != size:
            raise InputError(
                f"{self._what}: expected {name} to be one string of {size} bytes, got"
                f" {[len(value) for value in values[:4]]}"
            )
        return bytes(values[0])

    def floats(self, name: str, count: int) -> NDArray[np.float32]:
        """The (count,) finite numbers called `name`.

        Raises:
            InputError: there are none, not as many, or one is not finite.
        """
        values = np.array(self._values(name, "float_list"), np.float32)
        if values.shape != (count,) or not np.isfinite(values).all():
            raise InputError(
                f"{self._what}: expected {name} to be {count} finite numbers, got {values[:8]}"
            )
        return values

    def _values(self, name: str, kind: str) -> Any:
        if name not in self:
            raise InputError(f"{self._what}: has no feature {name}")
        return getattr(self._features[name], kind).value


def _u32(data: bytes) -> int:
    return int.from_bytes(data, "little")


@cache
def _example_type() -> type[Message]:
    """The message class, in a pool of its own so that it cannot clash with TensorFlow's.

    Source: tensorflow/core/example/{example,feature}.proto (field names, numbers and types).
    """
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="canvasmar_rt/example.proto", package="canvasmar_rt", syntax="proto3"
    )

    def add(parent: Any, name: str, number: int, kind: int | str, *, repeated: bool = False) -> Any:
        label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
        made = parent.field.add(name=name, number=number, label=label)
        if isinstance(kind, str):
            made.type, made.type_name = field.TYPE_MESSAGE, f".canvasmar_rt.{kind}"
        else:
            made.type = kind
        return made

    lists = {
        "BytesList": field.TYPE_BYTES,
        "FloatList": field.TYPE_FLOAT,
        "Int64List": field.TYPE_INT64,
    }
    for name, kind in lists.items():
        add(file.message_type.add(name=name), "value", 1, kind, repeated=True)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, name in enumerate(lists, 1):
        member = name.replace("List", "_list").lower()
        add(feature, member, number, name).oneof_index = 0
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    add(entry, "key", 1, field.TYPE_STRING)
    add(entry, "value", 2, "Feature")
    add(features, "feature", 1, "Features.FeatureEntry", repeated=True)
    add(file.message_type.add(name="Example"), "features", 1, "Features")

    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("canvasmar_rt.Example"))
