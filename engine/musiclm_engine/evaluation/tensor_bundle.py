"""Reads the tensors of a TensorFlow checkpoint without TensorFlow.

A checkpoint ("tensor bundle") is a pair of files. `.data-00000-of-00001` is the raw little-endian
bytes of all tensors. `.index` says where each lies: it is a LevelDB table, sorted blocks of (name,
entry), each entry a `BundleEntryProto`. Written from LevelDB's doc/table_format.md and TensorFlow's
core/protobuf/tensor_bundle.proto (both public descriptions). The checksums are not verified:
CRC-32C over megabytes is slow in Python, and the files come from a wheel that pip has already
hashed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

TABLE_MAGIC = 0xDB4775248B80FB57  # LevelDB's, the last eight bytes of every table
FOOTER_BYTES = 48
BLOCK_TRAILER_BYTES = 5  # one byte of compression type, four of checksum, after every block
DTYPES: dict[int, np.dtype] = {
    1: np.dtype("<f4"),
    2: np.dtype("<f8"),
    3: np.dtype("<i4"),
    9: np.dtype("<i8"),
}  # DataType


def read_tensor_bundle(prefix: str | Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint by its name.

    prefix: the path up to `.index` and `.data-00000-of-00001`. Raises ValueError for a file that is
    no such table, a compressed block, a checkpoint of more than one shard, a tensor stored in
    slices, or a dtype other than float32, float64, int32 and int64.
    """
    index = Path(f"{prefix}.index").read_bytes()
    data = Path(f"{prefix}.data-00000-of-00001").read_bytes()
    tensors = {}
    for key, entry in _table_entries(index):
        if key:  # the empty key holds the bundle's header
            name = key.decode()
            tensors[name] = _read_tensor(name, entry, data)
    return tensors


def _read_tensor(name: str, entry: bytes, data: bytes) -> np.ndarray:
    """BundleEntryProto: 1 dtype, 2 shape, 3 shard, 4 offset, 5 bytes, 7 slices."""
    numbers, messages = _proto_fields(entry)
    if numbers[1] not in DTYPES:
        raise ValueError(f"{name} has DataType {numbers[1]}; this reader knows {sorted(DTYPES)}")
    if numbers[3] != 0 or 7 in messages:
        raise ValueError(f"{name} is stored in another shard or in slices")
    dtype, start, size = DTYPES[numbers[1]], numbers[4], numbers[5]
    shape = []
    for shape_message in messages.get(2, []):  # TensorShapeProto: repeated 2 dim, its 1 the size
        for dim in _proto_fields(shape_message)[1].get(2, []):
            shape.append(_proto_fields(dim)[0][1])
    if size != dtype.itemsize * math.prod(shape) or start + size > len(data):
        raise ValueError(f"{name} of shape {shape} does not fit its {size} bytes at {start}")
    count = size // dtype.itemsize
    return np.frombuffer(data, dtype, count=count, offset=start).reshape(shape).copy()


def _table_entries(table: bytes) -> Iterator[tuple[bytes, bytes]]:
    """All (key, value) pairs: the footer leads to the index, the index to the data blocks."""
    footer = table[-FOOTER_BYTES:]
    if len(footer) < FOOTER_BYTES or int.from_bytes(footer[-8:], "little") != TABLE_MAGIC:
        raise ValueError("not a LevelDB table: its last eight bytes are not the table magic")
    _, _, position = _block_handle(footer, 0)  # the metaindex, unused
    offset, size, _ = _block_handle(footer, position)
    for _, handle in _block_entries(table, offset, size):
        offset, size, _ = _block_handle(handle, 0)
        yield from _block_entries(table, offset, size)


def _block_handle(buffer: bytes, position: int) -> tuple[int, int, int]:
    offset, position = _varint(buffer, position)
    size, position = _varint(buffer, position)
    return offset, size, position


def _block_entries(table: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """The entries share key prefixes; after them come uint32 restart offsets and their count."""
    if offset + size + BLOCK_TRAILER_BYTES > len(table):
        raise ValueError(f"a block of {size} bytes at {offset} runs past the table's {len(table)}")
    if table[offset + size] != 0:
        raise ValueError(f"block at {offset} is compressed (type {table[offset + size]})")
    block = table[offset : offset + size]
    end = size - 4 - 4 * int.from_bytes(block[-4:], "little")
    position, key = 0, b""
    while position < end:
        shared, position = _varint(block, position)
        unshared, position = _varint(block, position)
        length, position = _varint(block, position)
        key = key[:shared] + block[position : position + unshared]
        position += unshared
        yield key, block[position : position + length]
        position += length


def _proto_fields(message: bytes) -> tuple[defaultdict[int, int], dict[int, list[bytes]]]:
    """A message's number fields (0 where left out, as protobuf means it) and its nested ones."""
    numbers: defaultdict[int, int] = defaultdict(int)
    messages: dict[int, list[bytes]] = {}
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            numbers[number], position = _varint(message, position)
        elif wire_type == 2:
            length, position = _varint(message, position)
            messages.setdefault(number, []).append(message[position : position + length])
            position += length
        elif wire_type in (1, 5):
            width = 8 if wire_type == 1 else 4
            numbers[number] = int.from_bytes(message[position : position + width], "little")
            position += width
        else:
            raise ValueError(f"field {number} has protobuf wire type {wire_type}")
    return numbers, messages


def _varint(buffer: bytes, position: int) -> tuple[int, int]:
    """Little-endian base 128: seven bits a byte, the top bit says that more follow."""
    value = shift = 0
    while True:
        byte = buffer[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
