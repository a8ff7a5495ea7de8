"""Paged forward passes: nothing depends on chunks, neighbours, order, block contents; wrong models are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, digest_of, make_adapter, make_model, make_prompt, projections
from transformers import GPT2Config, GPT2LMHeadModel

from openlora.engine import attention, decoder_plan, kernels
from openlora.engine.adapter_file import AdapterReader
from openlora.engine.kv_cache import KVCache
from openlora.engine.lora import WeightedAdapter
from openlora.engine.model import Chunk, PagedModel, head_dim, load, longest_context, read_config
from openlora.engine.selfcheck import check, probe_tokens, reference_logits
from openlora.engine.torch_engine import TorchEngine
from openlora.errors import InvalidArgument, UnsupportedModel

CPU = torch.device("cpu")
NEIGHBOURS = 1e-5  # of max|logit|


class Paged:
    """A paged model, adapters for it, and the bookkeeping that a scheduler would do."""

    def __init__(self, directory: Path, family: str) -> None:
        # Well conditioned: what is measured here is our arithmetic, not how a wild model amplifies rounding.
        self.model_dir = make_model(directory / "model", family, initializer_range=0.1)
        model = load(self.model_dir, "float32", CPU)
        config = model.config
        self.cache = KVCache(
            layers=config.num_hidden_layers,
            kv_heads=config.num_key_value_heads,
            head_dim=head_dim(config),
            tokens=2048,
            block_size=4,
            dtype=torch.float32,
            device=CPU,
        )
        self.model = PagedModel(model, self.cache)
        reader = AdapterReader(self.model.linears, self.model.lora, torch.float32, 64)
        names = projections(family)
        paths = [
            make_adapter(self.model_dir, directory / str(seed), seed, std=0.1, **settings)
            for seed, settings in enumerate(
                [
                    {"r": 4, "lora_alpha": 8, "target_modules": names},
                    {"r": 7, "lora_alpha": 7, "target_modules": names[:1]},
                    {"r": 2, "lora_alpha": 5, "target_modules": names},
                ]
            )
        ]
        self.adapters = [reader.read(digest_of(path), path) for path in paths]

    def uses(self, *weights: float) -> tuple[WeightedAdapter, ...]:
        return tuple(
            WeightedAdapter(adapter, weight) for adapter, weight in zip(self.adapters, weights, strict=False) if weight
        )

    def run(self, sequences, splits) -> list[torch.Tensor]:
        """Logits of all tokens of each (tokens, adapters), computed side by side; `splits` are the chunk ends."""
        blocks = [self.cache.reserve(len(tokens)) for tokens, _ in sequences]
        parts: list[list[torch.Tensor]] = [[] for _ in sequences]
        for turn in range(max(len(ends) for ends in splits)):
            chunks, owners = [], []
            for index, ((tokens, uses), ends) in enumerate(zip(sequences, splits, strict=True)):
                if turn < len(ends):
                    start = ends[turn - 1] if turn else 0
                    self.cache.grow([(blocks[index], ends[turn])])
                    part = tokens[start : ends[turn]]
                    chunks.append(Chunk(part, start, blocks[index].ids, uses, logits=len(part)))
                    owners.append(index)
            logits = self.model.forward(chunks).split([len(chunk.token_ids) for chunk in chunks])
            for index, part in zip(owners, logits, strict=True):
                parts[index].append(part)
        for held in blocks:
            self.cache.release(held)
        return [torch.cat(part) for part in parts]


@pytest.fixture(scope="module", params=FAMILIES)
def paged(request, tmp_path_factory):
    return Paged(tmp_path_factory.mktemp(request.param), request.param)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    difference = (found - expected).abs().max().item()
    assert difference <= NEIGHBOURS * expected.abs().max().item(), difference


def test_chunks_change_nothing(paged):
    tokens, uses = make_prompt(1, 45), paged.uses(0.7, 0.0, 1.0)
    [whole] = paged.run([(tokens, uses)], [(45,)])
    for ends in [(44, 45), (1, 45), (16, 32, 45), tuple(range(1, 46)), (3, 4, 20, 21, 45)]:
        [chunked] = paged.run([(tokens, uses)], [ends])
        assert_close(chunked, whole)


def test_neighbours_and_their_order_change_nothing(paged):
    """Base, single adapters and ensembles in one batch, at all lengths, in prefill and in decode."""
    mixes = [(), (1.0,), (0.0, 1.0), (0.5, 0.5, -0.5), (0.0, 0.0, 1.0), (1.0,), ()]
    lengths = [60, 9, 33, 21, 40, 5, 2]
    sequences = [
        (make_prompt(index, length), paged.uses(*mix))
        for index, (length, mix) in enumerate(zip(lengths, mixes, strict=True))
    ]
    splits = [(length - 1, length) for length in lengths]
    alone = [paged.run([sequence], [ends])[0] for sequence, ends in zip(sequences, splits, strict=True)]
    for seed in range(3):
        order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(seed)).tolist()
        together = paged.run([sequences[index] for index in order], [splits[index] for index in order])
        for index, found in zip(order, together, strict=True):
            assert_close(found, alone[index])


def test_an_adapter_touches_only_its_own_rows(paged):
    """A huge neighbour makes Inf and NaN; the others do not see it."""
    tokens = make_prompt(3, 30)
    [expected] = paged.run([(tokens, paged.uses(1.0))], [(29, 30)])
    huge = (WeightedAdapter(paged.adapters[2], 1e38),)
    bad, found = paged.run([(make_prompt(4, 20), huge), (tokens, paged.uses(1.0))], [(19, 20), (29, 30)])
    assert not torch.isfinite(bad).all()
    assert_close(found, expected)


def test_what_an_earlier_owner_left_in_a_block_is_never_read(paged):
    tokens = make_prompt(5, 13)
    [expected] = paged.run([(tokens, ())], [(6, 13)])
    paged.cache.data[:, :, 1:] = float("nan")
    found, again = paged.run([(tokens, ()), (tokens, ())], [(6, 13), (12, 13)])
    assert_close(found, expected)
    assert_close(again, expected)


def test_the_self_check_passes_and_can_fail(paged):
    model = load(paged.model_dir, "float32", CPU)
    tokens = probe_tokens(model.config.vocab_size)
    expected = reference_logits(model, tokens).clone()
    used = paged.cache.used_blocks
    check(paged.model, tokens, expected)
    assert paged.cache.used_blocks == used
    expected[9, 3] += 0.05 * expected.abs().max()
    with pytest.raises(
        UnsupportedModel, match=r"self-check failed: logits on 16 tokens differ from transformers by \d"
    ):
        check(paged.model, tokens, expected)


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
def test_the_engine_refuses_a_model_whose_attention_it_would_get_wrong(tmp_path, monkeypatch, native):
    """A scaling that the engine reads wrongly is what an unknown architecture looks like."""
    model_dir = make_model(tmp_path / "model", "llama")
    if native:
        right = decoder_plan._Planner._attention

        def wrong(*args):
            operation = right(*args)
            operation["scaling"] *= 1.1
            return operation

        monkeypatch.setattr(decoder_plan._Planner, "_attention", wrong)
    else:
        monkeypatch.setattr(kernels, "_load", lambda: None)
        through_torch = attention.paged_attention
        monkeypatch.setattr(
            attention,
            "paged_attention",
            lambda *args, scaling, **rest: through_torch(*args, scaling=scaling * 1.1, **rest),
        )
    with pytest.raises(UnsupportedModel, match="self-check failed"):
        TorchEngine(model_dir, "0" * 64, device="cpu")


def test_other_architectures_are_refused_by_name(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="architecture 'gpt2' is not supported; supported: llama, qwen2, "):
        TorchEngine(str(tmp_path), "0" * 64, device="cpu")
    with pytest.raises(UnsupportedModel, match="no config.json"):
        TorchEngine(str(tmp_path / "missing"), "0" * 64, device="cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"quantization": "int4"},
            "[INVALID_ARGUMENT] quantization: 'int4' is unknown, one of none, int8, int8-weight-only is right",
        ),
        ({"device": "tpu"}, "[INVALID_ARGUMENT] device: 'tpu' is not a device; auto, cpu or cuda is right"),
        ({"dtype": "int4"}, "[INVALID_ARGUMENT] dtype: 'int4' is unknown; one of auto, float32, bfloat16, float16"),
        ({"max_batch": 0}, "[INVALID_ARGUMENT] max_batch: 0 is too small, at least 1 is right"),
        ({"max_step_tokens": 4}, "[INVALID_ARGUMENT] max_step_tokens: 4 is too small, at least max_batch = 64"),
        ({"max_model_len": 257}, "[INVALID_ARGUMENT] max_model_len: 257 is out of range, 16 to 256 is right"),
        ({"kv_cache_tokens": 16}, "[INVALID_ARGUMENT] kv_cache_tokens: 16 is too small, at least 32 is right"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path_factory, settings, message):
    directory = tmp_path_factory.getbasetemp() / "settings"
    model_dir = str(directory) if directory.exists() else make_model(directory)
    with pytest.raises(InvalidArgument) as refusal:
        TorchEngine(model_dir, "0" * 64, **{"device": "cpu", **settings})
    assert str(refusal.value).startswith(message)


def test_rotary_embeddings_that_depend_on_the_batch_limit_the_context(tmp_path):
    """longrope and dynamic scaling switch for the whole batch past the original length."""
    model_dir = make_model(
        tmp_path / "model",
        "phi3",
        original_max_position_embeddings=64,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 1.0,
            "original_max_position_embeddings": 64,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
        },
    )
    assert longest_context(read_config(model_dir)) == 64
    engine = TorchEngine(model_dir, "0" * 64, device="cpu")
    assert engine.info.max_model_len == 64
    with pytest.raises(InvalidArgument, match="16 to 64 is right"):
        TorchEngine(model_dir, "0" * 64, device="cpu", max_model_len=128)


def test_quantized_checkpoints_are_refused(tmp_path):
    model_dir = make_model(tmp_path / "model")
    path = Path(model_dir, "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UnsupportedModel, match="already quantized"):
        TorchEngine(model_dir, "0" * 64, device="cpu")


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
def test_the_engine_starts_in_every_dtype(tmp_path, dtype):
    engine = TorchEngine(make_model(tmp_path / "model", "gemma2"), "a" * 64, dtype=dtype, device="cpu")
    assert engine.info.dtype == ("float32" if dtype == "auto" else dtype)
    assert (engine.info.engine, engine.info.base_digest, engine.info.max_model_len) == ("torch", "a" * 64, 256)
