"""A stand-in for NVIDIA's `tensorrt_llm`, for machines without its GPU: as strict, and with its traps.

Names, parameters and defaults are generated from `signatures.json`, which records them per version from its
documentation and source (1.1, 1.2, 1.3); behaviour is in `behaviour.py`; tokens are transformers' and PEFT's. The
version is the one that FAKE_TENSORRT_LLM names.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType

_table = json.loads(Path(__file__).with_name("signatures.json").read_text())[os.environ.get("FAKE_TENSORRT_LLM", "1.2")]
__version__ = _table["version"]


def _build() -> None:
    behaviour = importlib.import_module("tensorrt_llm.behaviour")
    names = behaviour.make_names(_table)
    for module, contents in _table["modules"].items():
        parts = module.split(".")
        for count in range(2, len(parts) + 1):  # packages on the way hold nothing else
            name = ".".join(parts[:count])
            if name not in sys.modules:
                sys.modules[name] = ModuleType(name)
                sys.modules[name].__path__ = []
        for name in contents:
            kind = names["BuiltEngineLLM"] if module.endswith("_tensorrt_engine") else names[name]
            setattr(sys.modules[module], name, kind)


_build()
