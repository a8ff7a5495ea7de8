"""Puts the stand-in for `tensorrt_llm`, in one of its versions, where the engine imports it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FAKES = Path(__file__).with_name("fakes")
VERSIONS = ("1.1", "1.2", "1.3")
DEATH = "FAKE_TENSORRT_LLM_DEATH"  # names a file: once it is there, its text is the error that ends the executor


@contextmanager
def fake_tensorrt_llm(version: str) -> Iterator[None]:
    """For a `with` block."""
    before = os.environ.get("FAKE_TENSORRT_LLM")
    os.environ["FAKE_TENSORRT_LLM"] = version
    sys.path.insert(0, str(FAKES))
    try:
        yield
    finally:
        sys.path.remove(str(FAKES))
        for name in [name for name in sys.modules if name.partition(".")[0] == "tensorrt_llm"]:
            del sys.modules[name]
        if before is None:
            del os.environ["FAKE_TENSORRT_LLM"]
        else:
            os.environ["FAKE_TENSORRT_LLM"] = before


def make_built_engine(model_dir: str, directory: Path) -> str:
    """What the stand-in takes for the output of `trtllm-build`."""
    directory.mkdir()
    tree = {"pretrained_config": {"hf_dir": model_dir}, "build_config": {}}
    (directory / "config.json").write_text(json.dumps(tree))
    return str(directory)
