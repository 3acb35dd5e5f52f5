"""One weight file for all graphs: each tensor once, readable as safetensors and, by offset, as ONNX external data."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import onnx_ir as ir

from hcompress_export.narrow import parse_rows
from hcompress_export.passes import Region
from hcompress_runtime.files import write_atomically

INLINE_BYTES = 512  # smaller tensors stay inside the graphs
DTYPES = {
    ir.DataType.FLOAT: "F32",
    ir.DataType.FLOAT16: "F16",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.INT64: "I64",
    ir.DataType.INT8: "I8",
    ir.DataType.FLOAT8E4M3FN: "F8_E4M3",
    ir.DataType.INT4: "U8",  # which safetensors lacks: two to a byte, the lower half first
}


def write_weights(path: Path, models: Iterable[ir.Model]) -> dict[str, Region]:
    """Write what the initializers of `models` hold to `path` and say where each one lies, by name.

    Equal names must hold equal tensors (`passes.name_weights_by_content`); rows of a tensor lie inside it. Written here
    and not by the safetensors library because graphs point into the file, and because a model need not fit in memory
    twice.
    """
    tensors: dict[str, ir.TensorProtocol] = {}
    for model in models:
        for name, value in model.graph.initializers.items():
            if value.const_value is not None and value.const_value.nbytes >= INLINE_BYTES:
                tensors[name] = value.const_value
    parts = {name: part for name in tensors if (part := parse_rows(name)) and part[0] in tensors}
    for name in parts:
        del tensors[name]
    # The widest types first, as the library does it, so that every tensor is aligned; then by name.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        shape = [int(size) for size in tensor.shape.numpy()] if tensor.dtype.itemsize >= 1 else [tensor.nbytes]
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = _header(header)

    def content(file: BinaryIO) -> None:
        file.write(text)
        for _, tensor in ordered:
            file.write(tensor.tobytes())

    write_atomically(path, content)
    spans = {name: entry["data_offsets"] for name, entry in header.items()}
    regions = {name: Region(len(text) + begin, end - begin) for name, (begin, end) in spans.items()}
    for name, (whole, first, last) in parts.items():
        row_bytes = regions[whole].length // int(tensors[whole].shape.numpy()[0])
        regions[name] = Region(regions[whole].offset + first * row_bytes, (last - first) * row_bytes)
    return regions


def _header(header: dict[str, Any]) -> bytes:
    """The head of a safetensors file: length, then JSON padded to 8 bytes."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
