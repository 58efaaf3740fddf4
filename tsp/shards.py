"""Safetensors files as bytes: rename and leave out tensors without reading their numbers.

A file is an 8-byte little-endian length, a JSON header `{name: {dtype, shape, data_offsets}}` and the data ("Format" in
https://github.com/huggingface/safetensors). Copying by bytes keeps every dtype as it is and takes a buffer of memory,
whatever the size of the shard.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from tsp.errors import ModelError

_CHUNK_BYTES = 2**20
"""What stays in a core's cache between reading and writing: 16 MiB took twice as long."""
_METADATA = "__metadata__"


@dataclass(frozen=True)
class Header:
    """What a file holds."""

    tensors: dict[str, dict[str, Any]]
    """By name: `dtype`, `shape`, and `data_offsets` from the start of the data, in their order in the file."""
    metadata: dict[str, str]
    data_start: int
    """Position of the data in the file, bytes."""


def read_header(path: Path) -> Header:
    """The header of a file.

    Raises:
        ValueError: it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        # Looks at all of the header: its length, names, dtypes, shapes, and that the data has no gap and no overlap.
        with safe_open(path, "np"):
            pass
    except SafetensorError as error:
        raise ValueError(str(error).removeprefix("Error while deserializing header: ")) from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        content = json.loads(file.read(length))
    metadata = content.pop(_METADATA, None) or {}
    tensors = dict(sorted(content.items(), key=lambda item: item[1]["data_offsets"]))
    return Header(tensors, metadata, 8 + length)


def copy_tensors(source: Path, target: Path, new_names: Mapping[str, str]) -> None:
    """Copy some tensors of a file into a new one.

    Args:
        source: safetensors file.
        target: file to write.
        new_names: of the tensors to copy, by their names in `source`.

    Raises:
        ModelError: the source cannot be read.
        OSError: the target cannot be written.
    """
    header = read_header(source)
    entries: dict[str, Any] = {_METADATA: header.metadata or {"format": "pt"}}
    spans, position = [], 0
    for name, entry in header.tensors.items():
        if name in new_names:
            start, end = entry["data_offsets"]
            entries[new_names[name]] = {**entry, "data_offsets": [position, position + end - start]}
            spans.append((header.data_start + start, end - start))
            position += end - start
    encoded = json.dumps(entries, separators=(",", ":")).encode()
    # The data begins at a multiple of 8 bytes; the format allows blanks for that.
    encoded += b" " * (-len(encoded) % 8)
    with source.open("rb", buffering=0) as read, target.open("wb") as write:
        write.write(len(encoded).to_bytes(8, "little") + encoded)
        for start, num_bytes in spans:
            for chunk in _chunks(read, start, num_bytes):
                write.write(chunk)


def _chunks(file: FileIO, start: int, num_bytes: int) -> Iterator[memoryview]:
    chunk = memoryview(bytearray(min(num_bytes, _CHUNK_BYTES)))
    while num_bytes:
        try:
            file.seek(start)
            count = file.readinto(chunk[:num_bytes])
        except OSError as error:
            raise ModelError(f"weight file {file.name} cannot be read: {error.strerror}") from None
        if not count:
            raise ModelError(f"weight file {file.name} became shorter while it was read")
        yield chunk[:count]
        start, num_bytes = start + count, num_bytes - count
