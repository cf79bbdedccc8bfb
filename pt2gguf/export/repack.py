"""Changing the ternary type of a GGUF file without changing a value."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from pt2gguf.blocks import BLOCK_TYPES, BlockType
from pt2gguf.errors import Pt2Error
from pt2gguf.export.output import complete_file


def repack(source: Path, output: Path, block_type: BlockType, gguf: ModuleType) -> None:
    """Copies the file `source` to `output` with its ternary tensors as `block_type`.

    Args:
        gguf: the gguf package of the patched source tree, which knows the types.

    Raises:
        Pt2Error: `source` is not a GGUF file, or holds no ternary tensors.
    """
    try:
        reader = gguf.GGUFReader(source)
    except (OSError, ValueError, IndexError) as error:
        raise Pt2Error(f"{source} is not a readable GGUF file ({error}): check the name") from None
    ternary = [t for t in reader.tensors if t.tensor_type.name.lower() in BLOCK_TYPES]
    if not ternary:
        raise Pt2Error(f"{source} holds no ternary tensors: make it with 'pt2gguf convert'")

    architecture = reader.get_field(gguf.Keys.General.ARCHITECTURE).contents()
    with complete_file(output) as part:
        writer = gguf.GGUFWriter(part, architecture)
        _copy_metadata(reader, writer, block_type, gguf)
        for tensor in reader.tensors:
            writer.add_tensor_info(
                tensor.name,
                _repacked_shape(tensor, block_type),
                tensor.data.dtype,
                _repacked_bytes(tensor, block_type),
                raw_dtype=_repacked_type(tensor, block_type, gguf),
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in reader.tensors:
            writer.write_tensor_data(_repacked_data(tensor, block_type))
        writer.close()


def _copy_metadata(reader: Any, writer: Any, block_type: BlockType, gguf: ModuleType) -> None:
    file_type = gguf.LlamaFileType[f"MOSTLY_{block_type.name.upper()}"]
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == gguf.Keys.General.ARCHITECTURE:
            continue  # the writer's own
        value = file_type if field.name == gguf.Keys.General.FILE_TYPE else field.contents()
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, field.types[0], sub_type=sub_type)


def _source_type(tensor: Any) -> BlockType | None:
    return BLOCK_TYPES.get(tensor.tensor_type.name.lower())


def _repacked_type(tensor: Any, block_type: BlockType, gguf: ModuleType) -> Any:
    if _source_type(tensor) is None:
        return tensor.tensor_type
    return gguf.GGMLQuantizationType[block_type.name.upper()]


def _repacked_shape(tensor: Any, block_type: BlockType) -> tuple[int, ...]:
    """As add_tensor_info wants it: in bytes for tensors of bytes."""
    shape = tuple(tensor.data.shape)
    source_type = _source_type(tensor)
    if source_type is None:
        return shape
    return (*shape[:-1], shape[-1] // source_type.block_bytes * block_type.block_bytes)


def _repacked_bytes(tensor: Any, block_type: BlockType) -> int:
    source_type = _source_type(tensor)
    if source_type is None:
        return int(tensor.n_bytes)
    return int(tensor.n_bytes) // source_type.block_bytes * block_type.block_bytes


def _repacked_data(tensor: Any, block_type: BlockType) -> Any:
    source_type = _source_type(tensor)
    if source_type is None:
        return tensor.data
    rows = tensor.data.reshape(-1, tensor.data.shape[-1])
    return block_type.pack(*source_type.unpack(rows))
