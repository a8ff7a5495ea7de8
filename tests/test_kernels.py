"""Native kernels against what they stand for, in float64 or as transformers has it; attention has its own file.

Beside the numbers: a row's bits depend on no neighbour, no number of rows and no thread, in either dtype.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess

import pytest
import torch
from tiny_models import FAMILIES, config_of
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.phi3.modeling_phi3 import Phi3Attention
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as apply_partial

from openlora.engine import kernels
from openlora.engine.fused import FusedMLP, FusedNorm, _with_rotation
from openlora.engine.kernels import LIBRARY, SOURCES, Kernels, _why_not, kernels_for
from openlora.engine.kernels.build import compile_kernels
from openlora.engine.kv_cache import KVCache
from openlora.engine.linear import PackedLinear
from openlora.engine.lora import LoraPair, Member, NativeLora, Segment, TorchLora, WeightedAdapter, make_lora
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
    found = kernels_for(dtype, CPU)
    assert found is not None, f"no native kernels to test: {_why_not(LIBRARY)}"
    return found


@pytest.fixture
def hidden(monkeypatch) -> None:
    """As on a machine without a compiler."""
    monkeypatch.setattr(kernels, "_load", lambda: None)


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


def assert_linear(packed: PackedLinear, linears: list[nn.Linear], inputs: torch.Tensor) -> torch.Tensor:
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
    packed = PackedLinear(linears)
    assert packed.native
    inputs = noise(max(ROWS), features, dtype=dtype)
    whole = assert_linear(packed, linears, inputs)
    for threads in (1, 3):
        packed._kernels.threads = threads
        for rows in ROWS:
            start = (250 - rows) // 2
            assert torch.equal(packed(inputs[start : start + rows]), whole[start : start + rows]), (threads, rows)


def test_linear_takes_inputs_of_any_layout(native, dtype):
    linears = make_linears(64, (48, 24), 1, dtype)
    packed = PackedLinear(linears)
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
    packed = PackedLinear(make_linears(64, (48,), 0, dtype))
    inputs = noise(20, 64, dtype=dtype)
    expected = packed(inputs)
    inputs[7, 3] = bad
    found = packed(inputs)
    assert not torch.isfinite(found[7]).any()
    assert torch.equal(torch.cat([found[:7], found[8:]]), torch.cat([expected[:7], expected[8:]]))


def test_linears_that_the_kernel_cannot_do_run_through_torch(dtype, monkeypatch):
    odd = make_linears(33, (20, 9), 1, dtype)
    packed = PackedLinear(odd)
    assert not packed.native
    assert_linear(packed, odd, noise(5, 33, dtype=dtype))
    monkeypatch.setattr(kernels, "_load", lambda: None)
    even = make_linears(64, (20, 9), 1, dtype)
    packed = PackedLinear(even)
    assert not packed.native
    assert_linear(packed, even, noise(5, 64, dtype=dtype))


# LoRA

RANKS = (1, 2, 3, 7, 8, 16, 33, 64, 128)
OUTPUTS = {"q": 48, "k": 64, "v": 200, "down": 200}
GROUPS = [[Member("q", 0, 48), Member("k", 48, 64), Member("v", 112, 200)], [Member("down", 0, 200)]]
TOKENS = 200


class Lora:
    """One form of the LoRA products, with an adapter of each rank; those of odd place leave `k` and `down` alone."""

    def __init__(self, compute, dtype: torch.dtype, features: int) -> None:
        self.compute, self.dtype, self.features = compute, dtype, features
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
            self.uses[rank] = compute.prepare(str(rank), self.pairs[rank])
        self.inputs = noise(1, TOKENS, features, dtype=dtype, seed=7)

    def segment(self, rank: int, weight: float, start: int, stop: int) -> Segment:
        return Segment(WeightedAdapter(self.uses[rank], weight), start, stop)

    def outputs(self, group: int) -> torch.Tensor:
        return noise(1, TOKENS, sum(member.columns for member in GROUPS[group]), dtype=self.dtype, seed=group)

    def run(self, group: int, segments, rows: slice = slice(None)) -> torch.Tensor:
        """The outputs of these rows of the batch, which `segments` count from the first of them."""
        outputs = self.outputs(group)[:, rows].contiguous()
        self.compute.begin(segments)
        self.compute.add(group, self.inputs[:, rows].contiguous(), outputs)
        self.compute.begin([])
        return outputs[0]

    def assert_right(self, group: int, segments) -> torch.Tensor:
        found = self.run(group, segments)
        expected = self.outputs(group)[0].double()
        slack = torch.zeros_like(expected)
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
        assert_within(found, expected, slack)
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


@pytest.fixture(params=[48, 100, 35], ids=lambda features: f"in{features}")
def lora(request, dtype, native) -> Lora:
    return Lora(NativeLora(GROUPS, native), dtype, request.param)


@pytest.mark.parametrize("group", [0, 1])
def test_lora_of_all_ranks_in_one_batch(lora, group):
    found = lora.assert_right(group, [lora.segment(*one) for one in BATCH])
    assert torch.equal(found[BASE_ROWS], lora.outputs(group)[0, BASE_ROWS])


@pytest.mark.parametrize("rank", RANKS)
def test_lora_of_one_rank(lora, rank):
    for group in (0, 1):
        for tokens in (1, 4, 33, 70):
            lora.assert_right(group, [lora.segment(rank, 1.0, 3, 3 + tokens)])


@pytest.mark.parametrize("threads", [1, 3])
def test_a_lora_row_depends_on_no_neighbour_and_on_no_place(lora, threads):
    for group in (0, 1):
        whole = lora.run(group, [lora.segment(*one) for one in BATCH])
        lora.compute._kernels.threads = threads
        for row in [1, 2, 19, 20, 21, 40, 71, 75, 77, 80, 86, 90, 122, 124, 130, 145, 199]:
            own = [(rank, weight) for rank, weight, start, stop in BATCH if start <= row < stop]
            alone = lora.run(group, [lora.segment(*one, 0, 1) for one in own], slice(row, row + 1))
            assert torch.equal(alone[0], whole[row]), row
            first = row - 5 if row > 5 else 0  # among others, which have other adapters than before
            others = [lora.segment(7, 2.0, 0, row - first)] if row > first else []
            mine = [lora.segment(*one, row - first, row - first + 1) for one in own]
            among = lora.run(group, [*others, *mine], slice(first, row + 1))
            assert torch.equal(among[-1], whole[row]), row


@pytest.mark.parametrize("threads", [1, 3])
def test_base_and_adapters_in_one_call_are_the_one_after_the_other(lora, threads):
    """In blocks of rows that segments lie across; with an odd number of inputs the base runs through torch."""
    lora.compute._kernels.threads = threads
    for group, members in enumerate(GROUPS):
        base = PackedLinear(make_linears(lora.features, tuple(member.columns for member in members), 1, lora.dtype))
        if base.native:
            base._kernels.threads = threads
        expected = base(lora.inputs)
        lora.compute.begin([lora.segment(*one) for one in BATCH])
        lora.compute.add(group, lora.inputs, expected)
        assert torch.equal(lora.compute.linear(group, base, lora.inputs), expected)


def test_lora_without_the_library_is_torchs(dtype, hidden):
    compute = make_lora(GROUPS, dtype, CPU)
    assert isinstance(compute, TorchLora)
    for group in (0, 1):
        lora = Lora(compute, dtype, 100)
        found = lora.assert_right(group, [lora.segment(*one) for one in BATCH])
        assert torch.equal(found[BASE_ROWS], lora.outputs(group)[0, BASE_ROWS])


# What lies between the products


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm, Gemma3RMSNorm])
@pytest.mark.parametrize(("rows", "features"), [(1, 16), (7, 48), (5, 100), (1030, 64)])
def test_rms_norm(native, dtype, kind, rows, features):
    module = kind(features, eps=1e-6).to(dtype).requires_grad_(False)
    module.weight.copy_(noise(features, dtype=dtype))
    offset = 0.0 if kind is LlamaRMSNorm else 1.0
    epsilon = module.variance_epsilon if kind is LlamaRMSNorm else module.eps
    fused = FusedNorm(module.weight, epsilon, offset, native)
    inputs = noise(rows, 3, features + 8, dtype=dtype)[:, 1, 4:-4] * 3  # rows lie apart, as those of q do
    found = fused(inputs)
    wide = inputs.double()
    expected = wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * (module.weight.double() + offset)
    assert_within(found, expected, 1e-6 + (ROUNDING[dtype] * expected.abs() if offset == 0 else 0))
    torch.testing.assert_close(found, module(inputs), rtol=2 * ROUNDING[dtype] + 1e-6, atol=1e-6)
    for row in (0, rows - 1):
        assert torch.equal(fused(inputs[row : row + 1])[0], found[row])
    assert torch.equal(fused(inputs.reshape(1, rows, 1, features)).view(rows, features), found)


@pytest.mark.parametrize(("rows", "features"), [(1, 16), (3, 50), (1, 7), (300, 96)])
def test_silu_multiply(native, dtype, rows, features):
    both = noise(rows, 2 * features, dtype=dtype) * 8
    both[0, :7] = torch.tensor([0.0, -0.0, 90, -90, 300, -300, 1e-20])
    gate, up = both[:, :features], both[:, features:]
    outputs = torch.empty(rows, features, dtype=dtype)
    native.silu_multiply(
        gate.data_ptr(), 2 * features, up.data_ptr(), 2 * features, outputs.data_ptr(), rows, features, native.threads
    )
    expected = functional.silu(gate.double()) * up.double()
    assert_within(outputs, expected, 1e-6 * (gate * up).abs() + ROUNDING[dtype] * expected.abs())


def test_silu_multiply_keeps_nan(native, dtype):
    for features in (16, 7):
        both = torch.ones(2, features, dtype=dtype)
        both[0, 3] = float("nan")
        outputs = torch.empty(1, features, dtype=dtype)
        native.silu_multiply(both.data_ptr(), 1, both[1].data_ptr(), 1, outputs.data_ptr(), 1, features, 1)
        assert outputs.isnan().nonzero().tolist() == [[0, 3]]


@pytest.mark.parametrize(("tokens", "head_dim"), [(1, 16), (5, 80), (70, 128), (3, 24)])
def test_rotate(native, dtype, tokens, head_dim):
    """Query and key are parts of one product, as in the model; the value lies behind them."""
    rotation = _with_rotation(LlamaAttention.forward, native).__globals__["apply_rotary_pos_emb"]
    projected = noise(1, tokens, 8, head_dim, dtype=dtype)
    query, key = projected[:, :, :4].transpose(1, 2), projected[:, :, 4:6].transpose(1, 2)
    angles = noise(1, tokens, head_dim // 2, seed=1).repeat(1, 1, 2) * 100
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    found = rotation(query, key, cos, sin)
    expected = apply_rotary_pos_emb(query.double(), key.double(), cos.double(), sin.double())
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert_within(one, other, 1e-6)


def test_where_a_part_of_each_head_turns_the_models_own_code_runs(native, dtype):
    rotation = _with_rotation(Phi3Attention.forward, native).__globals__["apply_rotary_pos_emb"]
    query, key = noise(1, 4, 5, 32, dtype=dtype), noise(1, 2, 5, 32, dtype=dtype, seed=1)
    cos, sin = noise(1, 5, 16, dtype=dtype, seed=2), noise(1, 5, 16, dtype=dtype, seed=3)
    for found, expected in zip(rotation(query, key, cos, sin), apply_partial(query, key, cos, sin), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_on_the_kernels(family):
    """Modules are found by name: a name that transformers changes would cost speed and nothing else."""
    config = config_of(family)
    model = AutoModelForCausalLM.from_config(config)
    cache = KVCache(layers=3, kv_heads=2, head_dim=16, tokens=64, block_size=4, dtype=torch.float32, device=CPU)
    paged = PagedModel(model, cache)
    layer = model.model.layers[0]
    assert isinstance(paged.lora, NativeLora) and paged._attention_kernels is not None
    assert not [name for name, module in model.named_modules() if type(module).__name__.endswith("RMSNorm")]
    assert isinstance(layer.mlp, FusedMLP) == (family not in ("gemma2", "gemma3_text", "phi3"))
    assert "_with_rotation" in layer.self_attn.forward.__func__.__globals__["apply_rotary_pos_emb"].__qualname__


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
