"""Training of the demo: a byte-level BPE tokenizer, a Llama-shaped base model, and LoRA adapters.

Everything is seeded and runs with a fixed thread count and torch's deterministic algorithms, so a second run on the
same machine writes the same bytes. Shapes suit other engines and INT8: head size 64, hidden and MLP sizes multiples
of 128, vocabulary a multiple of 64.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

THREADS = 2
VOCABULARY = 1408
IGNORED = -100  # the label that transformers' loss skips

# The model knows no roles and answers one turn, so the template is the last message alone. It has no BOS: the
# tokenizer adds that one itself.
CHAT_TEMPLATE = "{{ messages[-1]['content'] }}"
MAXIMUM_LOSS = 0.2  # mean of the last epoch in nats per token; a good run ends near 0.01
ADAPTER_WEIGHTS = (0.6, 0.8, 1.0)  # adapters are trained at part weight too, as ensembles use them

Row = dict[str, str]
Report = Callable[[int, int, float], None]
"""Takes (step, total steps, loss) once a step."""


class NotConverged(Exception):
    """The training ended with a loss that is too high; more epochs are needed here."""


@dataclass(frozen=True)
class Training:
    """One training run. `learning_rate` is the peak: linear warm-up over the first 5 %, then linear decay to a 20th."""

    epochs: int
    batch_size: int
    learning_rate: float
    seed: int


@dataclass(frozen=True)
class AdapterRecipe:
    """A LoRA adapter: its PEFT settings, and the data sets that train it with their shares in ppm."""

    name: str
    description: str
    rank: int
    alpha: int
    targets: tuple[str, ...]
    rslora: bool
    datasets: tuple[tuple[str, int], ...]
    owner: str
    licence: str
    prices: tuple[int, int]  # token micro-units per million input and output tokens
    training: Training


@contextmanager
def deterministic() -> Iterator[None]:
    """Fixed thread count and deterministic algorithms inside, the process's own settings again after."""
    threads, algorithms = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(algorithms)
        torch.set_num_threads(threads)


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts BOS before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def new_base_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A fresh fp32 model of about 5 M parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=1152,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def train(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[Row],
    training: Training,
    report: Report,
    before_step: Callable[[], None] | None = None,
) -> None:
    """Train `model` in place on prompt/completion rows: next-token cross entropy over the completion and EOS.

    Raises `NotConverged` rather than leave a model behind that babbles.
    """
    encoded = [_encode(tokenizer, row) for row in rows]
    batches_per_epoch = -(-len(encoded) // training.batch_size)
    total = batches_per_epoch * training.epochs
    warm_up = max(1, total // 20)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 1.0 - 0.95 * max(0, step - warm_up) / (total - warm_up))
    )
    order = random.Random(training.seed)
    torch.manual_seed(training.seed)
    model.train()
    step = 0
    for _ in range(training.epochs):
        losses = []
        for batch in _batches(encoded, training.batch_size, order):
            tokens, labels = _pad(batch, tokenizer.pad_token_id)
            if before_step is not None:
                before_step()
            # Padding is on the right, where causal attention keeps it from every real token: no mask is needed.
            loss = model(input_ids=tokens, labels=labels, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            losses.append(loss.item())
            report(step, total, losses[-1])
    model.eval()
    if not sum(losses) / len(losses) < MAXIMUM_LOSS:
        raise NotConverged(f"mean loss of the last epoch is {sum(losses) / len(losses):.3f}, not below {MAXIMUM_LOSS}")


def save_base_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a Hugging Face model directory; generation is greedy unless asked otherwise."""
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_adapter(
    base_folder: Path, base_name: str, recipe: AdapterRecipe, rows: Sequence[Row], folder: Path, report: Report
) -> None:
    """Train one LoRA adapter on the base model in `base_folder` and write a plain PEFT directory."""
    torch.manual_seed(recipe.training.seed)
    base = LlamaForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base_folder)
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(recipe.targets),
        use_rslora=recipe.rslora,
    )
    model = get_peft_model(base, settings)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    weights = random.Random(recipe.training.seed)

    def draw_weight() -> None:
        weight = weights.choice(ADAPTER_WEIGHTS)
        for layer in layers:
            layer.set_scale("default", weight)

    train(model, tokenizer, rows, recipe.training, report, before_step=draw_weight)
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()  # PEFT's model card template; ours is openlora.json
    _tidy(folder / "adapter_config.json", base_name)


def _encode(tokenizer: PreTrainedTokenizerFast, row: Row) -> tuple[list[int], list[int]]:
    # Prompt and completion are encoded apart because that is how they meet when served.
    prompt = tokenizer(row["prompt"])["input_ids"]
    completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return prompt + completion, [IGNORED] * len(prompt) + completion


def _batches(
    encoded: list[tuple[list[int], list[int]]], size: int, order: random.Random
) -> Iterator[list[tuple[list[int], list[int]]]]:
    # Rows of similar length share a batch (little padding); the batches themselves come in random order.
    shuffled = order.sample(encoded, len(encoded))
    shuffled.sort(key=lambda pair: len(pair[0]))
    batches = [shuffled[start : start + size] for start in range(0, len(shuffled), size)]
    order.shuffle(batches)
    return iter(batches)


def _pad(batch: list[tuple[list[int], list[int]]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(tokens) for tokens, _ in batch)
    tokens = torch.tensor([tokens + [pad_id] * (width - len(tokens)) for tokens, _ in batch])  # [batch, width]
    labels = torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in batch])  # [batch, width]
    return tokens, labels


def _tidy(path: Path, base_name: str) -> None:
    # PEFT writes the base's path on this machine, and a set whose order changes from process to process.
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = base_name
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
