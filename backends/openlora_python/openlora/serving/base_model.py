"""What the launcher reads of the base model, without loading it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..adapters.manifest import model_manifest
from ..attribution.card import parse_card
from ..config import BaseModelFacts
from ..errors import InvalidArgument


def read_base_model(directory: Path, digest_cache: Path, max_model_len: int | None) -> BaseModelFacts:
    """Facts of a Hugging Face causal-LM directory.

    Raises:
        InvalidArgument: it is none, or `max_model_len` is more than the model was made for.
    """
    if not (directory / "config.json").is_file():
        raise InvalidArgument(f"{directory} is no model directory: it has no config.json", field="model")
    config = _json(directory / "config.json")
    generation = _json(directory / "generation_config.json")
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    limit = config.get("text_config", config).get("max_position_embeddings")
    if not isinstance(limit, int):
        raise InvalidArgument(f"{directory}/config.json names no max_position_embeddings", field="model")
    if max_model_len is not None and max_model_len > limit:
        raise InvalidArgument(f"{max_model_len} is more than the model's {limit}", field="engine.max_model_len")
    card = _json(directory / "openlora.json") or None
    if card is not None:
        parse_card(card)
    return BaseModelFacts(
        name=directory.name,
        path=directory,
        digest=model_manifest(directory, digest_cache).digest,
        card=card,
        eos_token_ids=tuple(eos) if isinstance(eos, list) else (() if eos is None else (eos,)),
        max_model_len=max_model_len or limit,
    )


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        tree = json.loads(file.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InvalidArgument(f"{file} is not JSON: {error}", field="model") from error
    if not isinstance(tree, dict):
        raise InvalidArgument(f"{file} is not a JSON object", field="model")
    return tree
