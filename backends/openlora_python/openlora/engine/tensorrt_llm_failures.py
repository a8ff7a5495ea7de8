"""What TensorRT-LLM's errors mean for a client, and which of them end the engine."""

from __future__ import annotations

import re

from ..errors import AdapterInvalid, EngineRestarted, InvalidArgument, NotFinite, Overloaded, Unavailable
from .one_adapter.failures import Meaning

# Of no request alone: the executor is gone, or the GPU's context is (error_classification.py of TensorRT-LLM 1.3, where
# being out of memory is none of these).
FATAL = (
    r"illegal (memory access|address)|illegaladdress|launch ?failure|device-side assert|unrecoverable"
    r"|(cuda|nccl) error(?!.*out of memory)|shut ?down|executor.*(died|stopped)"
)
MEANINGS = (
    Meaning(FATAL, EngineRestarted, None, 2000, "TensorRT-LLM died while this request ran"),
    Meaning(r"LoRA task \d+ not found in cache", Unavailable, None, 1000),
    Meaning(r"PEFT Cache is full|no done tasks to evict", Overloaded, None, 1000),
    Meaning(r"Not enough space allocated to (host|device) LoRA cache", InvalidArgument, "engine.max_adapters"),
    Meaning(r"must have both lora_weights and lora_keys|lora_task_id must be set", AdapterInvalid),
    Meaning(r"lora weights to be the same data type", AdapterInvalid),
    Meaning(r"lora module \S+ not enabled", AdapterInvalid),
    Meaning(r"lora_weights has to few values", AdapterInvalid),
    Meaning(r"low_rank must be smaller|exceeds? .*max_lora_rank", AdapterInvalid),
    Meaning(r"prompt length|max_num_tokens|max_seq_len", InvalidArgument, "prompt"),
    Meaning(r"logprobs", InvalidArgument, "logprobs"),
    Meaning(r"guided|grammar", InvalidArgument, "guide"),
    Meaning(r"logits.*(nan|inf)\b", NotFinite),
)


def is_fatal(error: Exception, request_error: type[Exception]) -> bool:
    """Whether `error`, out of a call or an iteration of the LLM, is the end of it.

    What belongs to one request comes as a ValueError or as `request_error`, whose words may tell of more; anything else
    comes from its threads and processes, and it has shut itself down before it raised that.
    """
    of_one_request = isinstance(error, (ValueError, request_error))
    return not of_one_request or re.search(FATAL, str(error), re.IGNORECASE) is not None
