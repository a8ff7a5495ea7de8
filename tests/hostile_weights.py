"""Hostile adapters by their weights file: headers that lie, tensors of the wrong shape, strange keys and numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hostile_kind import WEIGHTS, Hostile, Maker, file, harmless
from safetensors.numpy import load_file, save_file

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
V2 = "base_model.model.model.layers.2.self_attn.v_proj"
A0, B0 = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"
Header = dict[str, Any]


def _framed(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def _raw(header: str | bytes, data: bytes = b"", length: int | None = None) -> Maker:
    return file(WEIGHTS, _framed(header if isinstance(header, bytes) else header.encode(), data, length))


def _header(change: Callable[[Header], None]) -> Maker:
    """The good file with another header before the same data."""

    def make(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        change(header)
        (folder / WEIGHTS).write_bytes(_framed(json.dumps(header).encode(), content[8 + length :]))

    return make


def _entry(**changes: Any) -> Maker:
    """The good file with another entry for one tensor."""
    return _header(lambda header: header[A0].update(changes))


def _bytes(change: Callable[[bytes], bytes]) -> Maker:
    def make(folder: Path) -> None:
        (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))

    return make


def _tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Maker:
    def make(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file({key: np.array(tensor, order="C") for key, tensor in tensors.items()}, folder / WEIGHTS)

    return make


def _put(key: str, tensor: np.ndarray) -> Maker:
    return _tensors(lambda tensors: tensors.update({key: tensor}))


def _rename(new: str) -> Maker:
    return _tensors(lambda tensors: tensors.update({new: tensors.pop(A0)}))


def _bigger_than_a_header_may_be(folder: Path) -> None:
    """10^6 keys take 60 MB of header: what it says at its start is true, the rest is a hole."""
    with open(folder / WEIGHTS, "wb") as weights:
        weights.write(_framed(_many_keys(1000)[:-1], length=60_000_000))
        weights.truncate(60_000_008)


def _many_keys(count: int) -> bytes:
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return ("{" + ",".join(f'"{number:x}":{entry}' for number in range(count)) + "}").encode()


def _moved(offset: int) -> Callable[[Header], None]:
    """All tensors after the first one `offset` bytes further on."""

    def change(header: Header) -> None:
        entries = sorted(
            (entry for key, entry in header.items() if key != "__metadata__"), key=lambda e: e["data_offsets"]
        )
        for entry in entries[1:]:
            entry["data_offsets"] = [place + offset for place in entry["data_offsets"]]

    return change


def _twice(folder: Path) -> None:
    """The same key with the same bytes twice: whole for who takes either, an error by the format's own words."""
    content = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    again = json.dumps({A0: header[A0]})[1:-1]
    (folder / WEIGHTS).write_bytes(_framed(f"{json.dumps(header)[:-1]},{again}}}".encode(), content[8 + length :]))


def _reversed(header: Header) -> None:
    entries = list(header.items())[::-1]
    header.clear()
    header.update(entries)


def _full_size(folder: Path) -> None:
    """As large as any adapter of the base at rank 16 in F32, one tensor of zeros."""
    size = 4 * 16 * 3 * (64 + 64 + 2 * (32 + 64) + 64 + 64 + 3 * (64 + 96))
    header = json.dumps({A0: {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    with open(folder / WEIGHTS, "wb") as weights:
        weights.write(_framed(header))
        weights.truncate(8 + len(header) + size)


CUT = "adapter_model.safetensors is not safetensors or cut short"
BROKEN = "adapter_model.safetensors is not valid safetensors"
NO_JSON = "adapter_model.safetensors: its header is not JSON"
RAW = {
    "cut-in-the-length": Hostile(_bytes(lambda content: content[:5]), f"{CUT}: 5 bytes"),
    "cut-in-the-header": Hostile(_bytes(lambda content: content[:100]), f"{CUT}: 100 bytes"),
    "cut-in-the-data": Hostile(_bytes(lambda content: content[:-4]), BROKEN),
    "bytes-after-the-data": Hostile(_bytes(lambda content: content + b"\0"), BROKEN),
    "header-beyond-the-file": Hostile(_raw("{}", length=1 << 40), f"{CUT}: 10 bytes"),
    "header-of-2-to-the-64": Hostile(_raw("{}", length=2**64 - 1), f"{CUT}: 10 bytes"),
    "header-one-too-long": Hostile(_raw("{}", length=3), f"{CUT}: 10 bytes"),
    "header-over-8-MiB": Hostile(
        _raw(b"{}" + b" " * 8_400_000), "header of 8400002 bytes, at most 8388608 are allowed"
    ),
    "header-of-no-bytes": Hostile(_raw(""), NO_JSON),
    "header-no-JSON": Hostile(_raw("rank eight, please"), NO_JSON),
    "header-array": Hostile(_raw("[]"), "its header holds a list, a JSON object is wanted"),
    "header-of-8-MiB-of-lists": Hostile(_raw('{"a":[' + "[]," * 2_700_000 + "0]}"), BROKEN),
    "header-empty": Hostile(_raw("{}"), "no weights for model.layers.0.self_attn.q_proj"),
    "header-deep": Hostile(_raw("[" * 1_000_000), NO_JSON),
    "header-deep-objects": Hostile(_raw('{"a":' * 100_000), NO_JSON),
    "header-not-UTF-8": Hostile(_raw(b'{"\xff": {}}'), NO_JSON),
    "header-with-BOM": Hostile(_raw(b"\xef\xbb\xbf{}"), NO_JSON),
    "header-with-NaN": Hostile(_raw('{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,0]}}'), NO_JSON),
    "header-without-offsets": Hostile(_header(lambda header: header[A0].pop("data_offsets")), BROKEN),
    "header-metadata-of-numbers": Hostile(_header(lambda header: header.update(__metadata__={"a": 1})), BROKEN),
    "header-unknown-field": harmless(_entry(strides=[1, 2])),
    "header-keys-backwards": harmless(_header(_reversed)),
    "header-metadata-of-7-MiB": harmless(_header(lambda header: header.update(__metadata__={"a": "x" * (7 << 20)}))),
    "key-twice": Hostile(_twice, "its header is not JSON: the key"),
    "keys-10-to-the-6": Hostile(_bigger_than_a_header_may_be, "adapter_model.safetensors is 60000008 bytes, at most"),
    "keys-as-many-as-fit": Hostile(_raw(_many_keys(148_000)), "has 148000 tensors, at most 4096 are allowed"),
    "keys-4096": Hostile(_raw(_many_keys(4096)), "unexpected tensor '0'"),
    "offsets-overlap": Hostile(_header(_moved(-4)), BROKEN),
    "offsets-with-a-hole": Hostile(_header(_moved(4)), BROKEN),
    "offsets-beyond-the-file": Hostile(_entry(data_offsets=[1 << 40, (1 << 40) + 1024]), BROKEN),
    "offsets-negative": Hostile(_entry(data_offsets=[-1024, 0]), BROKEN),
    "offsets-backwards": Hostile(_entry(data_offsets=[1024, 0]), BROKEN),
    "offsets-over-64-bit": Hostile(_entry(data_offsets=[0, 2**64]), BROKEN),
    "offsets-all-of-the-file": Hostile(
        _header(lambda header: [entry.update(data_offsets=[0, 1024]) for entry in header.values() if "shape" in entry]),
        BROKEN,
    ),
    "shape-other-than-bytes": Hostile(_entry(shape=[4, 65]), BROKEN),
    "shape-product-wraps-to-0": Hostile(_entry(shape=[2**32, 2**32]), BROKEN),
    "shape-bytes-wrap-to-0": Hostile(_entry(shape=[2**31, 2**31]), BROKEN),
    "shape-negative": Hostile(_entry(shape=[-4, -64]), BROKEN),
    "shape-of-floats": Hostile(_entry(shape=[4.0, 64.0]), BROKEN),
    "dtype-unknown": Hostile(_entry(dtype="F99"), BROKEN),
    "dtype-number": Hostile(_entry(dtype=32), BROKEN),
    "dtype-of-half-the-size": Hostile(_entry(dtype="F16"), BROKEN),
    "dtype-integers-in-disguise": Hostile(_entry(dtype="I32"), "q_proj.lora_A has dtype I32, one of F32, F16, BF16 is"),
    "dtype-F8": Hostile(
        _raw(
            json.dumps({A0: {"dtype": "F8_E4M3", "shape": [4, 64], "data_offsets": [0, 256]}}).replace(A0, "a"),
            bytes(256),
        ),
        "unexpected tensor 'a'",
    ),
    "as-large-as-can-be": Hostile(_full_size, "model.layers.0.self_attn.q_proj has lora_A but no lora_B"),
}

OTHER = "made for another base?"
TENSORS = {
    "transposed": Hostile(
        _tensors(lambda tensors: tensors.update({key: tensor.T for key, tensor in tensors.items()})),
        "q_proj.lora_A has shape [64, 4], this base model needs [4, 64]: made for another base?",
    ),
    "A-and-B-swapped": Hostile(
        _tensors(lambda tensors: tensors.update({A0: tensors[B0], B0: tensors[A0]})), "q_proj.lora_A has shape [64, 4]"
    ),
    "flat": Hostile(_tensors(lambda tensors: tensors.update({A0: tensors[A0].ravel()})), "has shape [256], this base"),
    "three-dimensions": Hostile(_tensors(lambda tensors: tensors.update({A0: tensors[A0][None]})), "[1, 4, 64], this"),
    "no-dimensions": Hostile(_put(A0, np.float32(1).reshape(())), "q_proj.lora_A has shape [], this base model needs"),
    "zero-rows": Hostile(_put(A0, np.zeros((0, 64), "f4")), "q_proj.lora_A has rank 0, adapter_config.json says 4"),
    "zero-columns": Hostile(_put(A0, np.zeros((4, 0), "f4")), "q_proj.lora_A has shape [4, 0], this base model needs"),
    "zero-times-2-to-the-62": Hostile(
        _header(lambda header: header.update({f"{Q0}.lora_C.weight": _empty([0, 2**62])})), "unexpected tensor"
    ),
    "other-hidden-size": Hostile(_put(A0, np.ones((4, 128), "f4")), OTHER),
    "other-output-size": Hostile(_put(B0, np.ones((128, 4), "f4")), OTHER),
    "rank-other-than-configured": Hostile(_put(A0, np.ones((8, 64), "f4")), "has rank 8, adapter_config.json says 4"),
    "doubles": Hostile(_put(A0, np.ones((4, 64), "f8")), "q_proj.lora_A has dtype F64, one of F32, F16, BF16 is"),
    "bytes": Hostile(_put(A0, np.ones((4, 64), "i1")), "q_proj.lora_A has dtype I8, one of F32, F16, BF16 is wanted"),
    "booleans": Hostile(_put(A0, np.ones((4, 64), "?")), "q_proj.lora_A has dtype BOOL, one of F32, F16, BF16 is"),
    "A-without-B": Hostile(_tensors(lambda tensors: tensors.pop(B0)), "q_proj has lora_A but no lora_B"),
    "B-without-A": Hostile(_tensors(lambda tensors: tensors.pop(A0)), "q_proj has lora_B but no lora_A"),
    "a-module-is-missing": Hostile(
        _tensors(lambda tensors: (tensors.pop(A0), tensors.pop(B0))),
        "no weights for model.layers.0.self_attn.q_proj, which the configuration targets",
    ),
}


def _empty(shape: list[int]) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}


def _one_more(key: str) -> Maker:
    return _put(key, np.ones((4, 64), "f4"))


NO_MODULE = "matches no module of the base model"
KEYS = {
    "key-up-the-path": Hostile(_one_more("../../../etc/passwd"), "unexpected tensor '../../../etc/passwd'"),
    "key-absolute": Hostile(_one_more("/etc/passwd"), "unexpected tensor '/etc/passwd'"),
    "key-empty": Hostile(_one_more(""), "unexpected tensor ''"),
    "key-with-escapes": Hostile(_one_more("\x1b]0;owned\x07\r\n\x00"), r"unexpected tensor '\x1b]0;owned\x07\r\n\x00'"),
    "key-with-escapes-inside": Hostile(
        _one_more("base_model.model.\x1b[31m\u202e.lora_embedding_A"), r"LoRA on \x1b[31m\u202e (embeddings, output"
    ),
    "key-with-markup": Hostile(_one_more("[/red][link=http://x]"), "unexpected tensor '[/red][link=http://x]'"),
    "key-of-a-megabyte": Hostile(_one_more("x" * (1 << 20)), f"unexpected tensor '{'x' * 159}"),
    "key-in-capitals": Hostile(_rename(A0.replace("q_proj", "Q_PROJ")), NO_MODULE),
    "key-in-cyrillic": Hostile(_rename(A0.replace("q_proj", "q_pr\u043ej")), NO_MODULE),
    "key-decomposed": Hostile(_rename(A0.replace("q_proj", "q_proj\u0301")), NO_MODULE),
    "key-of-a-layer-too-many": Hostile(_one_more(A0.replace("layers.0", "layers.3")), NO_MODULE),
    "key-of-layer-00": Hostile(_one_more(A0.replace("layers.0", "layers.00")), NO_MODULE),
    "key-without-prefix": Hostile(_rename(A0.removeprefix("base_model.model.")), "unexpected tensor 'model.layers.0."),
    "key-with-the-prefix-twice": Hostile(_one_more(f"base_model.model.{A0}"), NO_MODULE),
    "key-of-an-adapter-name": Hostile(_rename(A0.replace(".weight", ".default.weight")), "unexpected tensor"),
    "key-of-a-module-not-targeted": Hostile(
        _one_more(A0.replace("q_proj", "k_proj")), "belongs to a module that adapter_config.json does not target"
    ),
    "key-of-a-norm": Hostile(_put("base_model.model.model.norm.weight", np.ones(64, "f4")), "unexpected tensor"),
    "key-of-a-bias": Hostile(_put(f"{Q0}.lora_B.bias", np.ones(64, "f4")), "unexpected tensor"),
    "key-of-base-weights": Hostile(_put(f"{Q0}.base_layer.weight", np.ones((64, 64), "f4")), "unexpected tensor"),
    "key-of-DoRA": Hostile(_put(f"{Q0}.lora_magnitude_vector", np.ones(64, "f4")), "unexpected tensor"),
    "key-of-the-embedding": Hostile(
        _put("base_model.model.model.embed_tokens.lora_embedding_A", np.ones((4, 128), "f4")),
        "LoRA on model.embed_tokens (embeddings, output head) is not supported",
    ),
    "key-of-the-output-head": Hostile(
        _one_more("base_model.model.lm_head.lora_A.weight"),
        "LoRA on lm_head (embeddings, output head) is not supported",
    ),
}


def _number(value: float, dtype: str = "f4", key: str = V2 + ".lora_B.weight") -> Maker:
    """One number among the others, which are of the same dtype."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].astype(dtype)
        tensors[key].flat[-1] = value

    return _tensors(change)


def _bfloat16(pattern: int) -> Maker:
    """All tensors cut to bfloat16, the last number of one of them made of `pattern`."""

    def make(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        header, data = {}, b""
        for key, tensor in tensors.items():
            halves = (tensor.view("<u4") >> 16).astype("<u2")
            if key == f"{V2}.lora_B.weight":
                halves.flat[-1] = pattern
            header[key] = {
                "dtype": "BF16",
                "shape": list(tensor.shape),
                "data_offsets": [len(data), len(data) + halves.nbytes],
            }
            data += halves.tobytes()
        (folder / WEIGHTS).write_bytes(_framed(json.dumps(header).encode(), data))

    return make


SIGNALLING = float(np.array(0x7F800001, "<u4").view("<f4"))
NOT_FINITE = "model.layers.2.self_attn.v_proj.lora_B holds NaN or Inf"
NUMBERS = {
    "NaN": Hostile(_number(np.nan), NOT_FINITE),
    "NaN-signalling": Hostile(_number(SIGNALLING), NOT_FINITE),
    "NaN-half": Hostile(_number(np.nan, "f2"), NOT_FINITE),
    "NaN-bfloat16": Hostile(_bfloat16(0xFFC1), NOT_FINITE),
    "Inf": Hostile(_number(np.inf), NOT_FINITE),
    "Inf-negative": Hostile(_number(-np.inf), NOT_FINITE),
    "Inf-half": Hostile(_number(-np.inf, "f2"), NOT_FINITE),
    "Inf-bfloat16": Hostile(_bfloat16(0x7F80), NOT_FINITE),
    "zero-negative": harmless(_number(-0.0)),
    "denormal": harmless(_number(1e-42)),
    "denormal-bfloat16": harmless(_bfloat16(0x0001)),
    "large-in-16-bit": harmless(_number(3e38)),  # Inf in float16, which an engine that computes in it refuses
}
