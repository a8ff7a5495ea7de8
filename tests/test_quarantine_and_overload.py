"""A server of which too much is asked: adapters that are no good, a queue that is full; everybody else is answered."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ALICE_KEY
from live_server import LiveServer, key_digest
from raw_calls import LONG, Stream, ask, books, http_error, post, refusal, running, stop
from safetensors.numpy import load_file, save_file
from usage_watch import UsageWatch
from waiting import wait_for

from openlora.adapters.catalog_reader import CatalogReader
from openlora.attribution.journal import STATUS_ERROR

MAX_RANK = 64


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def _weights(change: Callable[[dict[str, np.ndarray]], None]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return rewrite


def _poison(value: float) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[min(tensors)].flat[3] = value

    return change


def _pickle_only(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")


def _link_out(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").symlink_to("/etc/passwd")


def _cut_short(folder: Path) -> None:
    os.truncate(folder / "adapter_model.safetensors", 1000)


def _other_base(folder: Path) -> None:
    file = folder / "openlora.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base": "0" * 64}))


FOREIGN_KEY = "base_model.model.model.layers.99.self_attn.q_proj.lora_A.weight"
BAD_ADAPTERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "other-base": (_other_base, "made for base model 0000000000000000…, this server runs "),
    "other-shape": (
        _weights(lambda tensors: tensors.update({min(tensors): tensors[min(tensors)][:, :-1].copy()})),
        ": made for another base?",
    ),
    "rank": (_config(r=MAX_RANK + 1), f"rank {MAX_RANK + 1} is over the limit of {MAX_RANK}"),
    "unmatched": (
        _weights(lambda tensors: tensors.update({FOREIGN_KEY: tensors[min(tensors)]})),
        f"{FOREIGN_KEY!r} matches no module of the base model",
    ),
    "half": (_weights(lambda tensors: tensors.pop(min(tensors))), " has lora_B but no lora_A"),
    "nan": (_weights(_poison(np.nan)), " holds NaN or Inf"),
    "inf": (_weights(_poison(-np.inf)), " holds NaN or Inf"),
    "pickle": (
        _pickle_only,
        "holds only adapter_model.bin, a pickle file that could run code; save it as adapter_model.safetensors",
    ),
    "link": (
        _link_out,
        "adapter_model.safetensors is a symbolic link, which may lead anywhere; copy the file itself",
    ),
    "cut": (_cut_short, "adapter_model.safetensors is not safetensors or cut short: 1000 bytes"),
    "dora": (_config(use_dora=True), "DoRA is not supported"),
    "saved-modules": (
        _config(modules_to_save=["lm_head"]),
        "it brings whole modules (modules_to_save), only LoRA matrices are supported",
    ),
    "bias": (_config(bias="all"), "bias is 'all', only 'none' is supported"),
    "not-lora": (_config(peft_type="IA3"), "peft_type is 'IA3', only 'LORA' is supported"),
    "unknown-setting": (_config(use_magic=7), "the setting use_magic = 7 is not supported"),
    "no-config": (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    "hidden": (_weights(_poison(np.nan)), ""),  # private to alice as well
}


@pytest.fixture(scope="module")
def small(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server with one row, one place to wait, and adapters of which only `good` and `torn` are any good."""
    root = tmp_path_factory.mktemp("small")
    adapters = root / "adapters"
    for name in ("good", "torn", *BAD_ADAPTERS):
        shutil.copytree(demo / "adapters" / ("shout" if name == "torn" else "emoji"), adapters / name)
    for name, (spoil, _) in BAD_ADAPTERS.items():
        spoil(adapters / name)
    (adapters / "bad name").mkdir()
    (adapters / "linked").symlink_to(adapters / "good")
    live = LiveServer(
        demo / "model",
        adapters,
        root / "state",
        ["good"],
        {
            "engine": {"dtype": "float32", "max_batch": 1, "max_waiting": 1, "max_rank": MAX_RANK},
            "access": {"callers": {"alice": key_digest(ALICE_KEY)}, "private": {"hidden": ["alice"]}},
        },
    )
    try:
        yield live.start()
    finally:
        live.stop()


@pytest.mark.parametrize("name", [name for name in BAD_ADAPTERS if name != "hidden"])
def test_a_quarantined_adapter_says_why_to_whom_it_is_named(small: LiveServer, name: str) -> None:
    before = books(small)
    said = refusal(small, adapters=name)
    assert said.startswith(f"[ADAPTER_INVALID] adapter '{name}': ")
    assert BAD_ADAPTERS[name][1] in said
    assert refusal(small, adapters=json.dumps(["good", name])) == said
    assert books(small) == before
    assert len(ask(small, adapters="good", max_tokens=2).token_ids) == 2


def test_quarantine_tells_nobody_of_a_private_adapter(small: LiveServer) -> None:
    assert refusal(small, adapters="hidden") == "[ADAPTER_NOT_FOUND] no adapter 'hidden'"
    assert refusal(small, adapters="hidden", api_key=ALICE_KEY).startswith("[ADAPTER_INVALID] adapter 'hidden': ")


def test_folders_that_are_no_adapters(small: LiveServer) -> None:
    assert refusal(small, adapters="bad name").startswith("[INVALID_ARGUMENT] adapters: 'bad name' is no adapter name")
    assert refusal(small, adapters="linked").startswith("[ADAPTER")


def test_bytes_that_were_torn_after_they_were_checked(small: LiveServer) -> None:
    """The engine finds out when it loads them: an error for that request, and nothing of the base model's answer."""
    digest = CatalogReader(small.state_dir / "catalog.sqlite").lookup("torn").digest
    cached = small.state_dir / "adapters" / digest
    cached.chmod(0o700)
    (cached / "adapter_model.safetensors").chmod(0o600)
    os.truncate(cached / "adapter_model.safetensors", 1000)
    before = books(small)
    said = refusal(small, adapters="torn", max_tokens=4)
    assert said == f"[ADAPTER_INVALID] adapter {digest}: adapter_model.safetensors can't be read: it ends too early"
    assert books(small) == (before[0] + 1, before[1] + 1)
    newest = list(UsageWatch(small.state_dir).read().completions.values())[-1]
    assert (newest.status, newest.out_tokens) == (STATUS_ERROR, 0)
    assert len(ask(small, adapters="good", max_tokens=2).token_ids) == 2


def test_overload_is_told_at_once_and_what_was_accepted_is_answered(small: LiveServer) -> None:
    before = books(small)
    first = running(small, "first", tokens=2000)
    second = running(small, "second", tokens=8)  # its first response is an empty delta: it waits
    assert second.reply.token_ids == []
    for _ in range(3):
        said = refusal(small, max_tokens=1)
        assert said == "[OVERLOADED] 2 requests run and wait already retry_after_ms=1000"
    over_http = post(small, {"text_input": "a", "max_tokens": 1})
    assert (over_http.status_code, http_error(over_http)) == (400, said)
    assert len(stop(small, "first").responses) == 1  # `stop` needs no place in the queue
    ended = second.wait()
    assert (ended.finish_reason, len(ended.token_ids)) == ("length", 8)
    assert first.wait().finish_reason == "cancelled"
    assert books(small) == (before[0] + 2, before[1] + 2)


def test_a_burst_over_the_limit(small: LiveServer) -> None:
    """All at once, so that checks overlap: whoever is let in is answered in full, the others leave no trace."""
    before = books(small)
    streams = [Stream(small) for _ in range(12)]
    for stream in streams:
        stream.start({"text_input": "Hello.", "max_tokens": 100, **LONG})
    replies = [stream.wait() for stream in streams]
    answered = [reply for reply in replies if not reply.errors]
    refused = {reply.error for reply in replies if reply.errors}
    assert refused == {"[OVERLOADED] 2 requests run and wait already retry_after_ms=1000"}
    assert 2 <= len(answered) < 12
    assert all((reply.finish_reason, len(reply.token_ids)) == ("length", 100) for reply in answered)
    assert books(small) == (before[0] + len(answered), before[1] + len(answered))


def test_an_echo_comes_once_even_if_the_request_had_to_wait(small: LiveServer) -> None:
    """While it waits a stream gets an empty response each second; the first one brings the prompt."""
    first = running(small, "first", tokens=2000)
    second = running(small, "second", tokens=4, exclude_input_in_output=False)
    wait_for("responses while it waits", lambda: len(second.reply.responses) >= 3)
    stop(small, "first")
    first.wait()
    text = second.wait().text
    assert text.startswith("Tell me about the cat.")
    assert text.count("Tell me about the cat.") == 1
