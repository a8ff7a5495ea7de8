"""Native kernels against what they stand for, in float64 or as transformers has it; attention has its own file.

Beside the numbers: a row's bits depend on no neighbour, no number of rows and no thread, in either dtype.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil
import subprocess

import pytest
import torch
from native_operations import compute, cpu_kernels, lay_out
from tiny_models import FAMILIES, config_of
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

from openlora.engine import kernels
from openlora.engine.adapter_block import LoraPair, Member
from openlora.engine.attention import PagedStep, Span
from openlora.engine.decoder_plan import native_kernels
from openlora.engine.kernels import ACTIVATIONS, GATE, HEADS, LIBRARY, NORM, SOURCES, Kernels, _why_not, kernels_for
from openlora.engine.kernels.build import compile_kernels
from openlora.engine.kv_cache import KVCache
from openlora.engine.linear import PackedLinear, TorchLinear, pack_linears
from openlora.engine.lora import NativeLora, Segment, TorchLora, WeightedAdapter, make_lora
from openlora.engine.model import PagedModel

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
ROUNDING = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}  # relative, of one result
ROWS = (1, 2, 5, 12, 13, 16, 33, 130, 250)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture
def native(dtype) -> Kernels:
    return cpu_kernels(dtype)


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_within(found: torch.Tensor, expected: torch.Tensor, slack: torch.Tensor | float) -> None:
    """`found` is `expected` (float64) rounded once, give or take `slack`."""
    excess = (found.double() - expected).abs() - ROUNDING[found.dtype] * expected.abs() - slack
    assert excess.max() <= 0, f"off by {excess.max().item()} more than is right"


# Linears


def make_linears(features: int, outputs: tuple[int, ...], biased: int, dtype: torch.dtype) -> list[nn.Linear]:
    torch.manual_seed(features)
    linears = [nn.Linear(features, count, bias=place < biased, dtype=dtype) for place, count in enumerate(outputs)]
    return [linear.requires_grad_(False) for linear in linears]


def assert_linear(packed: nn.Module, linears: list[nn.Linear], inputs: torch.Tensor) -> torch.Tensor:
    outputs = packed(inputs)
    wide = inputs.double()
    expected = torch.cat([linear.double()(wide) for linear in linears], dim=-1)
    products = torch.cat([wide.abs() @ linear.weight.abs().T for linear in linears], dim=-1)
    assert (outputs.dtype, outputs.shape) == (inputs.dtype, expected.shape)
    assert_within(outputs, expected, 1e-6 * products)
    return outputs


@pytest.mark.parametrize("biased", [0, 1, 3])
@pytest.mark.parametrize("outputs", [(32,), (7,), (100,), (48, 17), (33, 64, 7), (96, 160, 32)], ids=str)
@pytest.mark.parametrize("features", [2, 50, 192])
def test_linear(native, dtype, features, outputs, biased):
    linears = make_linears(features, outputs, biased, dtype)
    packed = PackedLinear(linears, native)
    inputs = noise(max(ROWS), features, dtype=dtype)
    whole = assert_linear(packed, linears, inputs)
    for threads in (1, 3):
        native.threads = threads
        for rows in ROWS:
            start = (250 - rows) // 2
            assert torch.equal(packed(inputs[start : start + rows]), whole[start : start + rows]), (threads, rows)


def test_linear_takes_inputs_of_any_layout(native, dtype):
    linears = make_linears(64, (48, 24), 1, dtype)
    packed = PackedLinear(linears, native)
    inputs = noise(6, 64, dtype=dtype)
    expected = packed(inputs)
    strided = noise(6, 128, dtype=dtype)
    strided[:, 32:96] = inputs
    assert torch.equal(packed(strided[:, 32:96]), expected)
    assert torch.equal(packed(inputs.T.contiguous().T), expected)
    assert torch.equal(packed(inputs.view(1, 2, 3, 64)).view(6, -1), expected)
    assert packed(inputs[:0]).shape == (0, 72)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_stays_alone(native, dtype, bad):
    packed = PackedLinear(make_linears(64, (48,), 0, dtype), native)
    inputs = noise(20, 64, dtype=dtype)
    expected = packed(inputs)
    inputs[7, 3] = bad
    found = packed(inputs)
    assert not torch.isfinite(found[7]).any()
    assert torch.equal(torch.cat([found[:7], found[8:]]), torch.cat([expected[:7], expected[8:]]))


def test_linears_without_kernels_run_through_torch(dtype):
    for features in (33, 64):
        linears = make_linears(features, (20, 9), 1, dtype)
        packed = pack_linears(linears, None)
        assert isinstance(packed, TorchLinear)
        assert_linear(packed, linears, noise(5, features, dtype=dtype))


# LoRA

RANKS = (1, 2, 3, 7, 8, 16, 33, 64, 128)
OUTPUTS = {"q": 48, "k": 64, "v": 200, "down": 200}
GROUPS = [[Member("q", 0, 48), Member("k", 48, 64), Member("v", 112, 200)], [Member("down", 0, 200)]]
TOKENS = 200


class Lora:
    """Base linears and an adapter of each rank, those of odd place leaving `k` and `down` alone; native or torch's."""

    def __init__(self, native: Kernels | None, dtype: torch.dtype, features: int) -> None:
        self.native, self.dtype = native, dtype
        self.compute = make_lora(GROUPS, native)
        self.linears = [make_linears(features, tuple(m.columns for m in group), 1, dtype) for group in GROUPS]
        self.bases = [pack_linears(linears, native) for linears in self.linears]
        self.pairs = {}
        self.uses = {}
        for place, rank in enumerate(RANKS):
            self.pairs[rank] = {
                name: LoraPair(
                    noise(rank, features, dtype=dtype, seed=rank),
                    noise(outputs, rank, dtype=dtype, seed=rank + outputs),
                    scaling=(1 + place) / rank,
                )
                for name, outputs in OUTPUTS.items()
                if place % 2 == 0 or name not in ("k", "down")
            }
            self.uses[rank] = lay_out(self.compute, str(rank), self.pairs[rank])
        self.inputs = noise(1, TOKENS, features, dtype=dtype, seed=7)

    def segment(self, rank: int, weight: float, start: int, stop: int) -> Segment:
        return Segment(WeightedAdapter(self.uses[rank], weight), start, stop)

    def base(self, group: int) -> torch.Tensor:
        """What the base model's linears give, `[tokens, columns]`."""
        return self.bases[group](self.inputs)[0]

    def run(self, group: int, segments, rows: slice = slice(None)) -> torch.Tensor:
        """The outputs of these rows of the batch, which `segments` count from the first of them."""
        inputs = self.inputs[:, rows].contiguous()
        self.compute.begin(segments)
        if isinstance(self.compute, NativeLora):
            outputs = inputs.new_empty(1, inputs.shape[1], self.bases[group].out_features)
            operation = self.bases[group].operation.copy()
            operation["group"] = group
            compute(self.native, operation, [inputs[0], outputs[0]], lora=self.compute)
        else:
            outputs = self.bases[group](inputs)
            self.compute.add(group, inputs, outputs)
        self.compute.begin([])
        return outputs[0]

    def assert_right(self, group: int, segments) -> torch.Tensor:
        found = self.run(group, segments)
        wide = self.inputs[0].double()
        weight = torch.cat([linear.weight for linear in self.linears[group]]).double()
        expected = torch.cat([linear.double()(wide) for linear in copy.deepcopy(self.linears[group])], dim=1)
        slack = 1e-6 * wide.abs() @ weight.abs().T
        for segment in segments:
            for member in GROUPS[group]:
                pair = self.pairs[int(segment.use.adapter.digest)].get(member.name)
                if pair is not None:
                    place = (slice(segment.start, segment.stop), slice(member.column, member.column + member.columns))
                    inputs, a, b = self.inputs[0, place[0]].double(), pair.a.double().T, pair.b.double().T
                    scale = segment.use.weight * pair.scaling
                    expected[place] += scale * inputs @ a @ b
                    # Sums are rounded, then what was shrunk, then the output for every adapter.
                    slack[place] += 1e-6 * abs(scale) * inputs.abs() @ a.abs() @ b.abs()
                    rounded = (scale * inputs @ a).abs() @ b.abs() + expected[place].abs()
                    slack[place] += 2 * ROUNDING[self.dtype] * rounded
        assert_within(found, expected, slack + ROUNDING[self.dtype] * expected.abs())
        if self.dtype == torch.float32:
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
        return found


# (rank, weight, start, stop): gaps of base rows, ensembles over the same rows and over parts of others' rows
BATCH = [
    (1, 1.0, 1, 2),
    (2, 1.0, 2, 72),
    (3, -0.5, 75, 78),
    (7, 1.0, 78, 82),
    (8, 0.25, 82, 87),
    (16, 1.0, 90, 123),
    (33, 1.0, 123, 125),
    (64, 1.0, 126, 134),
    (128, 1.0, 134, 146),
    (16, 1.5, 2, 40),
    (128, -1.0, 20, 76),
    (3, 0.3, 20, 21),
    (64, 1.0, 199, 200),
]
BASE_ROWS = [0, 87, 88, 89, 125, *range(146, 199)]  # of BATCH


@pytest.fixture(params=[48, 100, 34], ids=lambda features: f"in{features}")
def lora(request, dtype, native) -> Lora:
    return Lora(native, dtype, request.param)


@pytest.mark.parametrize("group", [0, 1])
def test_lora_of_all_ranks_in_one_batch(lora, group):
    found = lora.assert_right(group, [lora.segment(*one) for one in BATCH])
    assert torch.equal(found[BASE_ROWS], lora.base(group)[BASE_ROWS])


@pytest.mark.parametrize("rank", RANKS)
def test_lora_of_one_rank(lora, rank):
    for group in (0, 1):
        for tokens in (1, 4, 33, 70):
            lora.assert_right(group, [lora.segment(rank, 1.0, 3, 3 + tokens)])


@pytest.mark.parametrize("threads", [1, 3])
def test_a_lora_row_depends_on_no_neighbour_and_on_no_place(lora, threads):
    for group in (0, 1):
        whole = lora.run(group, [lora.segment(*one) for one in BATCH])
        lora.native.threads = threads
        for row in [1, 2, 19, 20, 21, 40, 71, 75, 77, 80, 86, 90, 122, 124, 130, 145, 199]:
            own = [(rank, weight) for rank, weight, start, stop in BATCH if start <= row < stop]
            alone = lora.run(group, [lora.segment(*one, 0, 1) for one in own], slice(row, row + 1))
            assert torch.equal(alone[0], whole[row]), row
            first = row - 5 if row > 5 else 0  # among others, which have other adapters than before
            others = [lora.segment(7, 2.0, 0, row - first)] if row > first else []
            mine = [lora.segment(*one, row - first, row - first + 1) for one in own]
            among = lora.run(group, [*others, *mine], slice(first, row + 1))
            assert torch.equal(among[-1], whole[row]), row


def test_lora_without_kernels_is_torchs(dtype):
    lora = Lora(None, dtype, 100)
    assert isinstance(lora.compute, TorchLora)
    for group in (0, 1):
        found = lora.assert_right(group, [lora.segment(*one) for one in BATCH])
        assert torch.equal(found[BASE_ROWS], lora.base(group)[BASE_ROWS])


# What lies between the products


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm, Gemma3RMSNorm])
@pytest.mark.parametrize(("rows", "features"), [(1, 16), (7, 48), (5, 100), (1030, 64)])
def test_rms_norm(native, dtype, kind, rows, features):
    module = kind(features, eps=1e-6).to(dtype).requires_grad_(False)
    module.weight.copy_(noise(features, dtype=dtype))
    offset = 0.0 if kind is LlamaRMSNorm else 1.0
    epsilon = module.variance_epsilon if kind is LlamaRMSNorm else module.eps
    fields = {"kind": NORM, "weight": module.weight.data_ptr(), "features": features}
    fields |= {"epsilon": epsilon, "offset": offset}
    inputs = noise(rows, 3, features + 8, dtype=dtype)[:, 1, 4:-4] * 3  # rows lie apart, as those of q do
    found = torch.empty(rows, features, dtype=dtype)
    compute(native, fields, [inputs, found])
    wide = inputs.double()
    expected = wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * (module.weight.double() + offset)
    assert_within(found, expected, 1e-6 + (ROUNDING[dtype] * expected.abs() if offset == 0 else 0))
    torch.testing.assert_close(found, module(inputs), rtol=2 * ROUNDING[dtype] + 1e-6, atol=1e-6)
    residual = noise(rows, features, dtype=dtype, seed=3)
    hidden, normed = residual.clone(), torch.empty(rows, features, dtype=dtype)
    compute(native, fields | {"residual": 2}, [inputs, normed, hidden])
    assert torch.equal(hidden, residual + inputs)
    of_sum = torch.empty(rows, features, dtype=dtype)
    compute(native, fields, [hidden, of_sum])
    assert torch.equal(normed, of_sum)
    for row in (0, rows - 1):  # alone, and in place
        alone = inputs[row : row + 1].clone()
        compute(native, fields | {"output": 0}, [alone])
        assert torch.equal(alone[0], found[row])


def gate(native: Kernels, activation: str, both: torch.Tensor) -> torch.Tensor:
    outputs = both.new_empty(len(both), both.shape[1] // 2)
    fields = {"kind": GATE, "activation": ACTIVATIONS[activation], "features": outputs.shape[1]}
    compute(native, fields, [both, outputs])
    return outputs


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "features"), [(1, 16), (3, 50), (1, 7), (300, 96)])
def test_gate(native, dtype, activation, rows, features):
    both = noise(rows, 2 * features, dtype=dtype) * 8
    both[0, :7] = torch.tensor([0.0, -0.0, 90, -90, 300, -300, 1e-20])
    wide, up = both.double().split(features, dim=1)
    exact = functional.silu(wide) if activation == "silu" else functional.gelu(wide, approximate="tanh")
    found, expected = gate(native, activation, both), exact * up
    # Of gelu, 1 + tanh(u) loses in float64 what x · sigmoid(2u) keeps: a difference of 1e-16 · |x|.
    assert_within(found, expected, 1e-6 * (wide * up).abs() + ROUNDING[dtype] * expected.abs())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate_keeps_nan(native, dtype, activation):
    for features in (16, 7):
        both = torch.ones(1, 2 * features, dtype=dtype)
        both[0, 3] = float("nan")
        assert gate(native, activation, both).isnan().nonzero().tolist() == [[0, 3]]


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("tokens", "head_dim", "rotated"), [(1, 16, 16), (5, 80, 80), (70, 128, 96), (3, 32, 24)])
def test_heads(native, dtype, tokens, head_dim, rotated, normed):
    """Query, key and value are one product: the first is turned where it lies, the others go into the cache."""
    heads, kv_heads = 4, 2
    product = noise(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    query, key, value = product.clone().view(1, tokens, -1, head_dim).split([heads, kv_heads, kv_heads], dim=2)
    sizes = {"kv_heads": kv_heads, "head_dim": head_dim, "block_size": 4}
    cache = KVCache(layers=1, tokens=128, dtype=dtype, device=CPU, **sizes)
    cache.data[:] = float("nan")
    blocks = list(range(30, 0, -1))
    paged = PagedStep([Span(0, 5, tokens, blocks)], cache)
    angles = noise(1, tokens, rotated // 2, seed=1).repeat(1, 1, 2) * 100
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    norms = [LlamaRMSNorm(head_dim).to(dtype).requires_grad_(False) for _ in range(2)]
    for seed, norm in enumerate(norms):
        norm.weight.copy_(noise(head_dim, dtype=dtype, seed=seed))
    fields = {"kind": HEADS, "output": 0, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    fields |= {"rotated": rotated, "keys": cache.data[0, 0].data_ptr(), "values": cache.data[0, 1].data_ptr()}
    if normed:
        query, key = norms[0](query), norms[1](key)
        fields |= {"weight": norms[0].weight.data_ptr(), "key_weight": norms[1].weight.data_ptr(), "epsilon": 1e-6}
    compute(native, fields, [product], paged=paged, tables=(cos, sin))
    wide = (part.double().transpose(1, 2) for part in (query, key))
    expected = [part[0].transpose(0, 1) for part in apply_rotary_pos_emb(*wide, cos.double(), sin.double())]
    found = product.view(tokens, -1, head_dim)[:, :heads], cache.data[0, 0].flatten(0, 1)[paged.slots]
    for one, other in zip(found, expected, strict=True):
        assert_within(one, other, 1e-6 + (8 * ROUNDING[dtype] if normed else 0))
    assert torch.equal(cache.data[0, 1].flatten(0, 1)[paged.slots], value[0])
    rest = torch.ones(cache.data[0].flatten(1, 2).shape[1], dtype=torch.bool)
    rest[paged.slots] = False
    assert cache.data[0].flatten(1, 2)[:, rest].isnan().all(), "written beside the tokens' own places"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_on_the_kernels(family):
    """Modules are found by name: a name that transformers changes would cost speed and nothing else."""
    config = config_of(family)
    model = AutoModelForCausalLM.from_config(config)
    cache = KVCache(layers=3, kv_heads=2, head_dim=16, tokens=64, block_size=4, dtype=torch.float32, device=CPU)
    assert native_kernels(model) is not None
    paged = PagedModel(model, cache)
    assert isinstance(paged.lora, NativeLora) and paged._native is not None


@pytest.mark.parametrize("change", [{"head_dim": 24}, {"hidden_act": "relu"}, {"intermediate_size": 97}], ids=str)
def test_what_the_kernels_do_not_know_runs_through_torch(change):
    config = config_of("llama")
    for name, value in change.items():
        setattr(config, name, value)
    assert native_kernels(AutoModelForCausalLM.from_config(config)) is None


# Whether there are kernels


def test_no_kernels_for_other_dtypes_and_devices():
    assert kernels_for(torch.float16, CPU) is None
    assert kernels_for(torch.float32, torch.device("cuda")) is None


def test_why_a_library_cannot_be_used(tmp_path, monkeypatch):
    assert _why_not(LIBRARY) == ""
    again = "run `python -m openlora.engine.kernels.build`"
    assert _why_not(tmp_path / "native.so") == f"not compiled, {again}"
    old = shutil.copy(LIBRARY, tmp_path / "old.so")
    os.utime(old, (1, 1))
    assert _why_not(old) == f"older than their sources, {again}"
    source = tmp_path / "other.cpp"
    source.write_text('extern "C" int cpu_is_right() { return 0; }\n')
    other = tmp_path / "other.so"
    subprocess.run([os.environ.get("CXX", "g++"), "-shared", "-fPIC", source, "-o", other], check=True)
    assert _why_not(other) == f"compiled for another CPU, {again}"


def test_a_missing_library_is_told_in_the_log(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(kernels, "LIBRARY", tmp_path / "native.so")
    monkeypatch.setattr(kernels, "_load", kernels._load.__wrapped__)
    with caplog.at_level(logging.WARNING):
        assert kernels_for(torch.float32, CPU) is None
    assert "native kernels are not used: not compiled, run" in caplog.text


def test_a_compiler_that_fails_is_told_and_leaves_the_library(monkeypatch):
    before = LIBRARY.stat()
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(RuntimeError, match="^false -O3 .* failed:"):
        compile_kernels()
    assert LIBRARY.stat() == before
    assert list(SOURCES.glob(".native-*")) == []
