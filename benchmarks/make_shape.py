"""A random Llama of given dimensions, random adapters for it and a tokenizer: work to measure with, nothing to read.

    python benchmarks/make_shape.py --out DIR [--adapters 16x16 16x8 1x64]

DIR/model is a Hugging Face directory that the server takes, DIR/r16/000 … are PEFT adapter directories of rank 16. The
defaults are the 245 M parameters that the project's figures are about. The same arguments give the same files.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


@dataclass(frozen=True)
class AdapterSet:
    """`count` adapters of one rank, written `COUNTxRANK`."""

    count: int
    rank: int

    @classmethod
    def parse(cls, text: str) -> AdapterSet:
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
        if found is None:
            raise argparse.ArgumentTypeError(f"{text!r}: COUNTxRANK is right, 16x8 for instance")
        return cls(int(found[1]), int(found[2]))

    @property
    def directory(self) -> str:
        return f"r{self.rank}"


def make_model(directory: Path, config: LlamaConfig, dtype: torch.dtype, seed: int) -> dict[str, tuple[int, int]]:
    """Save a random model; the (out, in) of each of its linears that an adapter may target."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(directory)
    make_tokenizer(config.vocab_size, config.max_position_embeddings).save_pretrained(directory)
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


def make_adapter(
    directory: Path,
    shapes: dict[str, tuple[int, int]],
    rank: int,
    targets: Sequence[str],
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Save a random adapter whose effect shows, as PEFT would save it: scaling 1, B not zero."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (out_features, in_features) in shapes.items():
        if name.rpartition(".")[2] in targets:
            down = torch.randn(rank, in_features, generator=generator) / in_features**0.5
            up = torch.randn(out_features, rank, generator=generator) * 0.02
            tensors[f"base_model.model.{name}.lora_A.weight"] = down.to(dtype)
            tensors[f"base_model.model.{name}.lora_B.weight"] = up.to(dtype)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(targets),
        task_type="CAUSAL_LM",
        base_model_name_or_path="model",
        inference_mode=True,
    ).save_pretrained(directory)


def make_tokenizer(vocab_size: int, longest: int) -> PreTrainedTokenizerFast:
    """BPE with a token for every id: bytes as Llama writes them, letters, then all words of 2, 3 … letters."""
    vocabulary = {token: number for number, token in enumerate(SPECIAL)}
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    merges, letters = [], [chr(code) for code in range(ord("a"), ord("z") + 1)]
    for letter in ["▁", *letters]:
        vocabulary[letter] = len(vocabulary)
    words = ["▁", *letters]
    while len(vocabulary) < vocab_size:
        longer = [(word, letter) for word in words for letter in letters][: vocab_size - len(vocabulary)]
        for word, letter in longer:
            vocabulary[word + letter] = len(vocabulary)
        merges += longer
        words = [word + letter for word, letter in longer]
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    pad, begin, end, unknown = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=pad,
        bos_token=begin,
        eos_token=end,
        unk_token=unknown,
        model_max_length=longest,
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--mlp", type=int, default=2816)
    parser.add_argument("--vocab", type=int, default=32_000, help="at least 300: bytes and letters are in it")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--tied", action="store_true", help="lm_head is the embedding")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--adapters", type=AdapterSet.parse, nargs="*", metavar="COUNTxRANK",
                        default=[AdapterSet(16, 16), AdapterSet(16, 8), AdapterSet(1, 64)])  # fmt: skip
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.vocab < 300:
        parser.error(f"--vocab {options.vocab}: at least 300 is right")
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=options.mlp,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        max_position_embeddings=options.context,
        tie_word_embeddings=options.tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    console, dtype = Console(stderr=True), getattr(torch, options.dtype)
    with console.status(f"making the model in {options.out} …"):
        shapes = make_model(options.out / "model", config, dtype, options.seed)
    plan = [(one, number) for one in options.adapters for number in range(one.count)]
    for one, number in track(plan, "making adapters", console=console, transient=True):
        seed = options.seed + 1000 * one.rank + number
        directory = options.out / one.directory / f"{number:03d}"
        make_adapter(directory, shapes, one.rank, options.targets, dtype, seed)
    console.print(f"{options.out}: a model of {sum(o * i for o, i in shapes.values()) / 1e6:.0f} M parameters in its "
                  f"layers, {len(plan)} adapters")  # fmt: skip


if __name__ == "__main__":
    main()
