"""What the launcher tells the engine that was chosen: the settings that it knows, under its own names."""

from __future__ import annotations

from typing import Any

from ..config import EngineSettings, RunConfig
from ..errors import InvalidArgument

COMMON = ("dtype", "quantization", "max_batch", "max_adapters", "max_rank", "max_step_tokens")
TORCH = ("device", "kv_cache_tokens", "prefill_stretch", "host_adapter_bytes")


def engine_options(run: RunConfig) -> dict[str, Any]:
    """Keyword arguments of the engine's class.

    Raises:
        InvalidArgument: naming a setting that the chosen engine does not have.
    """
    engine = run.settings.engine
    options: dict[str, Any] = {
        "max_model_len": run.base.max_model_len,
        # Generation counts, and refuses; of what it accepted the engine refuses nothing.
        "max_waiting": engine.max_batch + engine.max_waiting,
        "prefix_cache": engine.prefix_cache != "off",
        **{name: getattr(engine, name) for name in COMMON},
    }
    if engine.kind == "torch":
        options["quantized_dir"] = str(run.state_dir / "quantized")
        return options | {name: getattr(engine, name) for name in TORCH}
    for name in TORCH:
        if getattr(engine, name) != EngineSettings.model_fields[name].default:
            raise InvalidArgument(f"the engine {engine.kind} does not have it", field=f"engine.{name}")
    options["threads"] = engine.threads
    options["staging_dir"] = str(run.state_dir / "staging")
    return options | (engine.vllm if engine.kind == "vllm" else engine.tensorrt_llm)
