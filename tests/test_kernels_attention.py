"""Paged attention, native and through torch, against the plain formula over each sequence's own keys in float64.

All that a sequence must not read is NaN: other blocks, the rest of its last block, what lies beyond its context.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from native_operations import compute, cpu_kernels

from openlora.engine.attention import PagedStep, Span, paged_attention
from openlora.engine.kernels import ATTENTION
from openlora.engine.kv_cache import KVCache

CPU = torch.device("cpu")
ROUNDING = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}
KV_HEADS = 2
# (start, new tokens): decode and chunks, at and beside the borders of blocks, tiles and bands, in one step
SPANS = [(0, 1), (5, 2), (37, 1), (15, 1), (0, 63), (16, 17), (9, 70), (100, 1), (0, 5), (31, 16), (3, 64), (63, 3)]
KINDS = [(None, None), (1, None), (7, None), (24, 5.0), (None, 3.0)]  # (window, soft cap)


class Step:
    """Sequences over one layer of a cache, with their new queries, keys and values as parts of one product."""

    def __init__(self, spans, head_dim, sharing, block_size, dtype, native, whole_blocks=False) -> None:
        self.head_dim, self.heads, self.dtype = head_dim, KV_HEADS * sharing, dtype
        torch.manual_seed(head_dim + sharing + block_size)
        sizes = {"kv_heads": KV_HEADS, "head_dim": head_dim, "block_size": block_size}
        self.cache = KVCache(layers=2, tokens=1024, dtype=dtype, device=CPU, **sizes)
        self.cache.data[:, :, 1:] = float("nan")
        free = (torch.randperm(self.cache.total_blocks) + 1).tolist()
        self.spans, self.keys, self.values, row = [], [], [], 0
        for start, tokens in spans:
            blocks = [free.pop() for _ in range(-(-(start + tokens) // block_size) + 2)]
            span = Span(row, start, tokens, blocks)
            self.spans.append(span)
            keys, values = torch.randn(2, start + tokens, KV_HEADS, head_dim).to(dtype)
            self.keys.append(keys)
            self.values.append(values)
            if whole_blocks:  # gathered: the engine zeroes a block when it is taken
                self.cache.data[:, :, blocks[:-2]] = 0
            self.cache.write(1, self.slots(span)[:start], keys[:start], values[:start])
            row += tokens
        self.query = torch.randn(row, self.heads, head_dim).to(dtype)
        self.native = native

    def slots(self, span: Span) -> torch.Tensor:
        positions = torch.arange(span.start + span.tokens)
        block_size = self.cache.block_size
        return torch.tensor(span.blocks)[positions // block_size] * block_size + positions % block_size

    def run(self, window=None, softcap=None, order=None) -> list[torch.Tensor]:
        """Outputs `[tokens, heads, head_dim]` of the sequences in `order`, flat in that order."""
        order = range(len(self.spans)) if order is None else order
        queries, keys, values, spans, row = [], [], [], [], 0
        for index in order:
            span = self.spans[index]
            queries.append(self.query[span.row : span.row + span.tokens])
            keys.append(self.keys[index][span.start :])
            values.append(self.values[index][span.start :])
            spans.append(Span(row, span.start, span.tokens, span.blocks))
            row += span.tokens
        product = torch.cat([torch.cat(part) for part in (queries, keys, values)], dim=1)[None]
        query, key, value = product.transpose(1, 2).split([self.heads, KV_HEADS, KV_HEADS], dim=1)
        paged = PagedStep(spans, self.cache)
        if self.native is None:
            output, _ = paged_attention(
                SimpleNamespace(layer_idx=1), query, key, value, None, paged=paged,
                scaling=0.3, sliding_window=window, softcap=softcap,
            )  # fmt: skip
            output = output[0]
        else:
            self.cache.write(1, paged.slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
            output = torch.empty(row, self.heads, self.head_dim, dtype=self.dtype)
            keys, values = self.cache.layer_addresses[1]
            fields = {"kind": ATTENTION, "keys": keys, "values": values, "heads": self.heads, "kv_heads": KV_HEADS}
            fields |= {"head_dim": self.head_dim, "scaling": 0.3, "window": window or 0, "softcap": softcap or 0.0}
            compute(self.native, fields, [product[0].flatten(1), output.flatten(1)], paged=paged)
        return list(output.split([span.tokens for span in spans]))

    def expected(self, index: int, window, softcap) -> torch.Tensor:
        span = self.spans[index]
        query = self.query[span.row : span.row + span.tokens].double().transpose(0, 1)
        key, value = (
            part[index].double().transpose(0, 1).repeat_interleave(self.heads // KV_HEADS, dim=0)
            for part in (self.keys, self.values)
        )
        scores = query @ key.transpose(1, 2) * 0.3
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        places, own = torch.arange(key.shape[1]), torch.arange(span.start, span.start + span.tokens)[:, None]
        seen = places <= own
        if window is not None:
            seen &= places > own - window
        return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(0, 1)

    def assert_right(self, window, softcap) -> None:
        for index, found in enumerate(self.run(window, softcap)):
            expected = self.expected(index, window, softcap)
            # In bfloat16 torch rounds scores and weights too; the kernel rounds its result and nothing else.
            through_torch = self.native is None
            limit = ROUNDING[self.dtype] * expected.abs() + 2e-5
            limit += 16 * ROUNDING[self.dtype] if through_torch else 0
            assert ((found - expected).abs() <= limit).all(), (self.spans[index], (found - expected).abs().max())
            slots = self.slots(self.spans[index])
            for stored, given in zip(self.cache.data[1].flatten(1, 2), (self.keys, self.values), strict=True):
                assert torch.equal(stored[slots], given[index])


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture
def native(dtype):
    return cpu_kernels(dtype)


@pytest.mark.parametrize("sharing", [1, 2, 3, 4])
@pytest.mark.parametrize(("head_dim", "block_size"), [(16, 4), (64, 16), (80, 4), (128, 16)])
def test_the_kernel(native, dtype, head_dim, block_size, sharing):
    for window, softcap in KINDS:
        step = Step(SPANS, head_dim, sharing, block_size, dtype, native)
        step.assert_right(window, softcap)
        rest = set(range(1, step.cache.total_blocks + 1)) - {block for span in step.spans for block in span.blocks[:-2]}
        assert step.cache.data[:, :, sorted(rest)].isnan().all(), "written outside the sequences' blocks"


@pytest.mark.parametrize("block_size", [4, 16])
def test_without_the_library(dtype, block_size):
    for window, softcap in KINDS:
        Step(SPANS, 24, 2, block_size, dtype, None, whole_blocks=True).assert_right(window, softcap)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_sequence_depends_on_no_neighbour_and_on_no_place(native, dtype, threads):
    """In bits."""
    step = Step(SPANS, 64, 3, 4, dtype, native)
    together = step.run(24, 5.0)
    native.threads = threads
    order = torch.randperm(len(SPANS)).tolist()
    for index, found in zip(order, step.run(24, 5.0, order), strict=True):
        assert torch.equal(found, together[index])
    for index in range(len(SPANS)):
        assert torch.equal(step.run(24, 5.0, [index])[0], together[index])


@pytest.mark.parametrize("window", [None, 7])
def test_chunks_of_any_size_have_the_same_bits(native, dtype, window):
    """A row sees the same keys in the same order, whatever is computed beside it."""
    step = Step([(0, 63)], 64, 2, 4, dtype, native)
    [whole] = step.run(window)
    for start in (0, 1, 13, 32, 62):
        part = Step([(start, 63 - start)], 64, 2, 4, dtype, native)
        part.query, part.keys, part.values = step.query[start:], step.keys, step.values
        part.cache.write(1, part.slots(part.spans[0])[:start], step.keys[0][:start], step.values[0][:start])
        assert torch.equal(part.run(window)[0], whole[start:])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_sequence_that_is_not_finite_stays_alone(native, dtype, bad):
    step = Step(SPANS, 16, 2, 4, dtype, native)
    before = step.run()
    for index in (2, 5):
        step.cache.data[1, 0].flatten(0, 1)[step.slots(step.spans[index])[4]] = bad
        step.values[index][step.spans[index].start :] = bad
    for index, (found, expected) in enumerate(zip(step.run(), before, strict=True)):
        if index in (2, 5):
            assert not torch.isfinite(found).any()
        else:
            assert torch.equal(found, expected)
