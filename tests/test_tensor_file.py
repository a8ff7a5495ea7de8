"""Safetensors files as the library writes them, and what is refused of others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from openlora.engine.tensor_file import MAX_HEADER_BYTES, BadTensorFile, TensorFile

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int32, torch.bool)


def refusal(path: Path) -> str:
    with pytest.raises(BadTensorFile) as caught, TensorFile(path) as file:
        for tensor in file.tensors:
            file.read(tensor)
    return str(caught.value)


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def test_what_the_library_wrote_is_what_it_reads(tmp_path):
    torch.manual_seed(1)
    written = {f"{index} {dtype}": (torch.randn(3 + index, 5) * 4).to(dtype) for index, dtype in enumerate(DTYPES)}
    written |= {"none": torch.empty(0, 4), "scalar": torch.tensor(2.5), "odd": torch.ones(3, dtype=torch.uint8)}
    save_file(written, tmp_path / "file", metadata={"format": "pt"})
    read = {}
    with TensorFile(tmp_path / "file") as file:
        for tensor in file.tensors:
            found = file.read(tensor)
            assert (found.dtype, tuple(found.shape)) == (tensor.dtype, tensor.shape)
            read[tensor.name] = found.clone()
    expected = load_file(tmp_path / "file")
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name].double(), expected[name].double()) for name in expected)


def test_tensors_are_read_in_any_order_and_across_pieces(tmp_path):
    """Some larger than a piece, some across the end of one."""
    torch.manual_seed(2)
    written = {
        f"{number:02d}": torch.randn(size) for number, size in enumerate([700_000, 5, 90_000, 170_001, 1, 300_000] * 2)
    }
    save_file(written, tmp_path / "file")
    with TensorFile(tmp_path / "file") as file:
        for tensor in [*file.tensors, *reversed(file.tensors), *file.tensors[::3]]:
            assert torch.equal(file.read(tensor), written[tensor.name])


FLOATS = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
REFUSALS = [
    (b"not json", b"", "its header is not what safetensors writes: "),
    (b"\xff\xfe", b"", "its header is not what safetensors writes: "),
    ([], b"", "its header is not what safetensors writes: "),
    ({"a": {"dtype": "F32", "shape": [2]}}, b"", "its header is not what safetensors writes: "),
    ({"a": {**FLOATS, "shape": ["2"]}}, bytes(8), "its header is not what safetensors writes: "),
    ({"a": {**FLOATS, "dtype": "F31"}}, bytes(8), "a has the unknown dtype F31"),
    ({"a": {**FLOATS, "shape": [-2, -1]}}, bytes(8), "a has the shape (-2, -1)"),
    ({"a": {**FLOATS, "shape": [3]}}, bytes(8), "a is said to lie at (0, 8), (0, 12) is right"),
    ({"a": {**FLOATS, "shape": [1 << 60, 1 << 60]}}, bytes(8), "a is said to lie at (0, 8), "),
    ({"a": {**FLOATS, "data_offsets": [4, 12]}}, bytes(12), "a is said to lie at (4, 12), (0, 8) is right"),
    ({"a": FLOATS, "b": FLOATS}, bytes(8), "b is said to lie at (0, 8), (8, 16) is right"),
    ({"a": {**FLOATS, "data_offsets": [-8, 0]}}, bytes(8), "a is said to lie at (-8, 0), (0, 8) is right"),
    ({"a": FLOATS}, bytes(9), "it has "),
    ({"a": FLOATS}, bytes(7), "it has "),
]


@pytest.mark.parametrize(("header", "data", "reason"), REFUSALS)
def test_files_that_are_not_what_they_say_are_refused(tmp_path, header, data, reason):
    assert refusal(write(tmp_path / "file", header, data)).startswith(reason)


def test_files_that_end_too_early_are_refused(tmp_path):
    for data in (b"", b"1234567"):
        (tmp_path / "file").write_bytes(data)
        assert refusal(tmp_path / "file") == "it ends too early"
    assert refusal(write(tmp_path / "file", {}, length=100)) == "it ends too early"
    assert refusal(write(tmp_path / "file", {}, length=1 << 62)) == (
        f"its header is said to take {1 << 62} bytes, at most {MAX_HEADER_BYTES} are right"
    )


def test_a_file_that_was_cut_after_it_was_opened_is_refused(tmp_path):
    save_file({"a": torch.ones(1000)}, tmp_path / "file")
    with TensorFile(tmp_path / "file") as file:
        with open(tmp_path / "file", "r+b") as writable:
            writable.truncate(500)
        with pytest.raises(BadTensorFile, match="it ends too early"):
            file.read(file.tensors[0])
