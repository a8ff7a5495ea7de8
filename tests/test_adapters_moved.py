"""A name that moves between two versions on a live server: every answer is that of the version its receipt names."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from live_server import LiveServer
from parity import GAP, Oracle
from raw_calls import ask, running
from transformers import AutoTokenizer
from typer.testing import CliRunner

from openlora.adapters.commands import adapters_app
from openlora_client import AsyncOpenLoRAClient

NAME = "moved"
MAX_TOKENS = 24
PROMPTS = 4
IN_FLIGHT = 16


@dataclass(frozen=True)
class Moved:
    """Two versions under one name, and what each of them answers."""

    server: LiveServer
    digests: dict[int, str]  # by version
    prompts: list[str]
    expected: dict[tuple[int, str], list[int]]  # token ids by version and prompt

    def cli(self, *arguments: str) -> str:
        done = CliRunner().invoke(adapters_app, [*arguments, "--state-dir", str(self.server.state_dir)])
        assert done.exit_code == 0, done.stderr
        return done.stdout

    def use(self, version: int) -> None:
        assert json.loads(self.cli("use", NAME, str(version), "--json"))["digest"] == self.digests[version]

    def version_of(self, receipt: dict[str, Any]) -> int:
        (used,) = receipt["blobs"]["adapters"]["adapters"]
        return next(version for version, digest in self.digests.items() if digest == used["digest"])

    def check(self, prompt: str, token_ids: Sequence[int], receipt: dict[str, Any]) -> int:
        """The answer is that of the version that its receipt names, which is returned."""
        version = self.version_of(receipt)
        assert list(token_ids) == self.expected[version, prompt]
        return version


@pytest.fixture(scope="module")
def moved(server: LiveServer, demo: Path, demo_adapters: list[str], prompts: list[str]) -> Iterator[Moved]:
    folders = [demo / "adapters" / name for name in demo_adapters[:2]]
    oracle = Oracle(str(demo / "model"), {folder.name: str(folder) for folder in folders})
    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    eos = json.loads((demo / "model" / "config.json").read_text())["eos_token_id"]
    chosen: dict[str, list[list[int]]] = {}
    for prompt in prompts:
        ids = tokenizer(prompt).input_ids
        answers = [oracle.greedy(ids, ((folder.name, 1.0),), MAX_TOKENS, [eos]) for folder in folders]
        if answers[0].ids != answers[1].ids and all(min(answer.gaps) >= GAP for answer in answers):
            chosen[prompt] = [answer.ids for answer in answers]
        if len(chosen) == PROMPTS:
            break
    assert len(chosen) == PROMPTS
    case = Moved(server, {}, list(chosen), {})
    for version, folder in enumerate(folders, start=1):
        added = json.loads(case.cli("add", str(folder), "--name", NAME, "--json"))
        assert added["version"] == version
        case.digests[version] = added["digest"]
        case.expected.update({(version, prompt): ids[version - 1] for prompt, ids in chosen.items()})
    yield case
    case.cli("remove", NAME)


def test_a_request_in_flight_keeps_its_version_and_the_next_one_gets_the_new(moved: Moved) -> None:
    moved.use(1)
    prompt = moved.prompts[0]
    in_flight = running(moved.server, "in flight", tokens=200, adapters=NAME, text_input=prompt)
    moved.use(2)
    asked_after = ask(moved.server, prompt, {"temperature": 0, "max_tokens": MAX_TOKENS}, adapters=NAME)
    before = in_flight.wait()
    assert len(before.token_ids) == 200
    assert before.token_ids[:MAX_TOKENS] == moved.expected[1, prompt]
    assert moved.version_of(before.receipt) == 1
    assert asked_after.token_ids == moved.expected[2, prompt]
    assert moved.version_of(asked_after.receipt) == 2
    exactly = json.dumps([{"name": NAME, "version": moved.digests[1][:12]}])
    again = ask(moved.server, prompt, {"temperature": 0, "max_tokens": 200, "ignore_eos": True}, adapters=exactly)
    assert again.token_ids == before.token_ids


async def test_answers_are_those_of_their_receipts_while_a_name_moves(moved: Moved) -> None:
    await move_under_load(moved, requests=100, moves=10)


@pytest.mark.soak
@pytest.mark.timeout(900)
async def test_soak_of_moves(moved: Moved) -> None:
    await move_under_load(moved, requests=1000, moves=50)


async def move_under_load(moved: Moved, requests: int, moves: int) -> None:
    """`requests` of them, half streamed, with `IN_FLIGHT` on their way while the name moves `moves` times.

    The request after a move is asked when `adapters use` has ended: it must get the new version.
    """
    numbers, turns = iter(range(requests)), itertools.cycle([2, 1])
    seen: list[int] = []
    moving = asyncio.Lock()
    async with AsyncOpenLoRAClient(moved.server.grpc_url) as client:

        async def version_asked(number: int) -> int:
            prompt = moved.prompts[number % PROMPTS]
            how = {"adapters": NAME, "max_tokens": MAX_TOKENS, "temperature": 0}
            if number % 2:
                answer = await client.generate(prompt, **how)
                return moved.check(prompt, answer.token_ids, answer.receipt)
            chunks = [chunk async for chunk in client.stream(prompt, **how)]
            return moved.check(prompt, [token for chunk in chunks for token in chunk.token_ids], chunks[-1].receipt)

        async def work() -> None:
            for number in numbers:
                seen.append(await version_asked(number))
                if len(seen) % (requests // moves) == 0:
                    async with moving:
                        version = next(turns)
                        moved.use(version)
                        assert await version_asked(number) == version

        moved.use(1)
        await asyncio.gather(*(work() for _ in range(IN_FLIGHT)))
    assert len(seen) == requests
    assert next(turns) == 2 - moves % 2
    assert set(seen) == {1, 2}
