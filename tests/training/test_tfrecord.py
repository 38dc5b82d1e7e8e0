"""TFRecord files against bytes made from the format's definition, whole and damaged."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from canvasmar_rt.errors import InputError
from tests.training.tfrecord_writer import crc32c, example, masked, record
from training.tfrecord import Example, masked_crc, read_record, scan_records

DATA = [b"first", b"", bytes(range(256)) * 5]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "some.tfrecords"
    path.write_bytes(b"".join(map(record, DATA)))
    return path


@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),  # RFC 3720, B.4, as are the next two
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ],
)
def test_checksums_of_known_data(data: bytes, crc: int) -> None:
    assert crc32c(data) == crc
    turned = (crc >> 15) + ((crc & 0x7FFF) << 17)
    assert masked_crc(data) == (turned + 0xA282EAD8) % 2**32


def test_records_come_back_bit_for_bit_in_any_order(file: Path) -> None:
    records, wrong = scan_records(file)
    assert wrong is None
    assert [(r.number, r.offset, r.size) for r in records] == [
        (0, 12, 5),
        (1, 33, 0),
        (2, 49, 1280),
    ]
    assert [read_record(records[i]) for i in (2, 0, 1)] == [DATA[2], DATA[0], DATA[1]]
    assert str(records[2]) == f"{file}#2"


@pytest.mark.parametrize("left", [1332, 700, 49, 44, 38], ids=str)
def test_a_cut_file_keeps_its_whole_records(file: Path, left: int) -> None:
    file.write_bytes(file.read_bytes()[:left])
    records, wrong = scan_records(file)
    whole = 2 if left >= 37 else 1
    assert [read_record(r) for r in records] == DATA[:whole]
    assert wrong is not None
    assert f"record {whole}, at byte 37, is cut short" in wrong


def test_a_file_cut_between_records_is_whole(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:37])
    records, wrong = scan_records(file)
    assert (len(records), wrong) == (2, None)


def test_wrong_data_are_found_by_their_checksum(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[49 + 100] ^= 1
    file.write_bytes(data)
    records, wrong = scan_records(file)
    assert wrong is None
    assert read_record(records[0]) == DATA[0]
    with pytest.raises(InputError, match=r"some.tfrecords#2: .* wrong checksum"):
        read_record(records[2])


def test_nothing_after_a_wrong_header_is_trusted(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[21] ^= 1  # the length of record 1
    file.write_bytes(data)
    records, wrong = scan_records(file)
    assert [r.number for r in records] == [0]
    assert wrong is not None
    assert "record 1, at byte 21, has a header of the wrong checksum" in wrong


def test_a_claimed_length_is_never_allocated(tmp_path: Path) -> None:
    length = struct.pack("<Q", 2**63)
    (tmp_path / "huge").write_bytes(length + masked(length) + bytes(100))
    records, wrong = scan_records(tmp_path / "huge")
    assert records == []
    assert wrong is not None
    assert "cut short" in wrong


def test_files_that_shrink_vanish_or_are_empty(file: Path, tmp_path: Path) -> None:
    records, _ = scan_records(file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="cut short"):
        read_record(records[2])
    file.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        read_record(records[0])
    assert scan_records(file) == ([], "cannot be read (No such file or directory)")
    (tmp_path / "empty").touch()
    assert scan_records(tmp_path / "empty") == ([], "the file is empty")
    os.mkfifo(tmp_path / "pipe")  # nobody ever writes into it
    records, wrong = scan_records(tmp_path / "pipe")
    assert (records, "a device, pipe or socket" in str(wrong)) == ([], True)


@pytest.mark.parametrize("packed", [True, False])
def test_features_come_back_as_written(packed: bool) -> None:
    made = example(
        {"0/pixels": b"\0\1\xff", "0/action": [0.5, -1.25, 3e-3], "step": [7, 300]}, packed=packed
    )
    read = Example(made, "here")
    assert "0/action" in read
    assert "1/action" not in read
    assert read.bytes("0/pixels", 3) == b"\0\1\xff"
    np.testing.assert_array_equal(
        read.floats("0/action", 3), np.array([0.5, -1.25, 3e-3], np.float32)
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "here: has no feature nothing"),
        ("short", "expected short to be 4 finite numbers"),
        ("infinite", "expected infinite to be 4 finite numbers"),
        ("text", "expected text to be 4 finite numbers"),
    ],
)
def test_features_that_are_no_actions(name: str, message: str) -> None:
    read = Example(
        example({"short": [1.5] * 3, "infinite": [1.5, 1.5, 1.5, float("inf")], "text": b"1234"}),
        "here",
    )
    assert name == "nothing" or name in read
    with pytest.raises(InputError, match=message):
        read.floats(name, 4)
    assert "nothing" not in read, "asking must not add a feature"


def test_pictures_of_another_size_and_other_messages() -> None:
    with pytest.raises(InputError, match=r"one string of 12 bytes, got \[4\]"):
        Example(example({"picture": b"1234"}), "here").bytes("picture", 12)
    with pytest.raises(InputError, match=r"one string of 12 bytes, got \[\]"):
        Example(example({"picture": [1.5]}), "here").bytes("picture", 12)
    with pytest.raises(InputError, match=r"here: expected a tf\.train\.Example"):
        Example(b"\xff\xff\xff no message", "here")
