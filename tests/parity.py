"""What "equal to transformers and PEFT" means, in one place.

Greedy token ids are equal up to the first position where the oracle's two largest logits are closer than `GAP`. From
there on the token is a matter of rounding, so log-probabilities along the oracle's own tokens are compared instead; at
most one prompt in a hundred may need that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, GenerationConfig

GAP = 1e-4
TOLERANCE = 1e-4  # of max|logit|
EXCUSED_SHARE = 0.01

Adapters = Sequence[tuple[str, float]]  # (name, weight)


@dataclass(frozen=True)
class Greedy:
    """The oracle's answer: its tokens, and how far its best logit was ahead of the second at each."""

    ids: list[int]
    gaps: list[float]


class Oracle:
    """A base model and its adapters in transformers and PEFT, fp32, one request at a time."""

    def __init__(self, model_dir: str, adapters: Mapping[str, str]) -> None:
        self.base = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        ).eval()
        self.base.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
        self.peft: PeftModel | None = None
        for name, path in adapters.items():
            if self.peft is None:
                self.peft = PeftModel.from_pretrained(self.base, path, adapter_name=name)
            else:
                self.peft.load_adapter(path, adapter_name=name)
        if self.peft is not None:
            self.peft.eval()

    def greedy(
        self,
        prompt: Sequence[int],
        adapters: Adapters = (),
        max_tokens: int = 16,
        eos_token_ids: Sequence[int] = (),
    ) -> Greedy:
        """transformers' own `generate` without sampling; an EOS token is part of the answer."""
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_tokens,
            pad_token_id=0,
            eos_token_id=list(eos_token_ids) or None,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = torch.tensor([list(prompt)])
        result = self._call(
            adapters,
            lambda model: model.generate(
                input_ids=tokens, attention_mask=torch.ones_like(tokens), generation_config=config
            ),
        )
        best = torch.cat(result.logits).topk(2, dim=-1).values
        return Greedy(result.sequences[0, len(prompt) :].tolist(), (best[:, 0] - best[:, 1]).tolist())

    def logits(self, token_ids: Sequence[int], adapters: Adapters = ()) -> torch.Tensor:
        """float32 `[tokens, vocab]`, for every position."""
        tokens = torch.tensor([list(token_ids)])
        return self._call(adapters, lambda model: model(input_ids=tokens, use_cache=False)).logits[0]

    @torch.no_grad()
    def _call(self, adapters: Adapters, run: Callable):
        if self.peft is None:
            assert not adapters, "this oracle has no adapters"
            return run(self.base)
        if not adapters:
            with self.peft.disable_adapter():
                return run(self.peft)
        self.peft.set_adapter(self._combined(adapters))
        return run(self.peft)

    def _combined(self, adapters: Adapters) -> str:
        if len(adapters) == 1 and adapters[0][1] == 1:
            return adapters[0][0]
        combined = "_".join(f"{name}x{weight}".replace(".", "p").replace("-", "m") for name, weight in adapters)
        if combined not in self.peft.peft_config:
            names, weights = zip(*adapters, strict=True)
            self.peft.add_weighted_adapter(list(names), list(weights), combined, combination_type="cat")
            for module in self.peft.modules():
                if isinstance(module, LoraLayer) and combined in module.scaling:
                    # The matrices hold weights and scalings already. PEFT copies `use_rslora` from the first adapter,
                    # which would multiply the whole once more by the root of the new rank.
                    module.scaling[combined] = 1.0
        return combined


@dataclass(frozen=True)
class Case:
    """One answer to judge. `next_logprobs` gives the system's own log-probabilities (any subset of the vocabulary)
    for the token after a given sequence; without it a tie can't be excused."""

    prompt: Sequence[int]
    adapters: Adapters
    ids: Sequence[int]
    max_tokens: int
    eos_token_ids: Sequence[int] = ()
    next_logprobs: Callable[[list[int]], Mapping[int, float]] | None = None


def assert_equal(oracle: Oracle, cases: Iterable[Case]) -> None:
    """Every case equals the oracle, as the head of this file defines it."""
    count = excused = 0
    for case in cases:
        count += 1
        expected = oracle.greedy(case.prompt, case.adapters, case.max_tokens, case.eos_token_ids)
        if list(case.ids) == expected.ids:
            continue
        where = next(
            (i for i, (own, other) in enumerate(zip(case.ids, expected.ids, strict=False)) if own != other),
            min(len(case.ids), len(expected.ids)),
        )
        tie = next((i for i, gap in enumerate(expected.gaps) if gap < GAP), len(expected.gaps))
        assert tie <= where, (
            f"prompt {list(case.prompt)} with {list(case.adapters)}: {list(case.ids)} instead of {expected.ids}, "
            f"first at {where}, where the oracle is ahead by {expected.gaps[where : where + 1]}"
        )
        assert case.next_logprobs is not None, (
            f"a tie at {tie} of prompt {list(case.prompt)}, and no way to look closer"
        )
        excused += 1
        _assert_logprobs(oracle, case, expected, tie)
    assert count > 0
    assert excused <= count * EXCUSED_SHARE, f"{excused} of {count} prompts needed the excuse of a tie"


def _assert_logprobs(oracle: Oracle, case: Case, expected: Greedy, start: int) -> None:
    for position in range(start, len(expected.ids)):
        sequence = [*case.prompt, *expected.ids[:position]]
        logits = oracle.logits(sequence, case.adapters)[-1]
        logprobs = torch.log_softmax(logits, dim=-1)
        limit = TOLERANCE * logits.abs().max().item()
        for token, logprob in case.next_logprobs(sequence).items():
            difference = abs(logprobs[token].item() - logprob)
            assert difference <= limit, f"token {token} at {position}: off by {difference}, at most {limit} is right"
