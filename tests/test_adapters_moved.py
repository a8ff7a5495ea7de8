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
from tiny_models import make_adapter, make_model, make_prompt, save_word_tokenizer
from typer.testing import CliRunner

from openlora.adapters.commands import adapters_app
from openlora_client import AsyncOpenLoRAClient

NAME = "moved"
MAX_TOKENS = 24
LONG_TOKENS = 200
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
def moved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Moved]:
    root = tmp_path_factory.mktemp("moved")
    model = Path(make_model(root / "model"))
    save_word_tokenizer(model)
    folders = [
        make_adapter(str(model), root / str(version), version, r=4, target_modules=["q_proj", "v_proj"])
        for version in (1, 2)
    ]
    prompts, expected = asked_of(Oracle(str(model), dict(zip("12", folders, strict=True))))
    settings = {"engine": {"dtype": "float32", "threads": 1, "kv_cache_tokens": 8192}}
    server = LiveServer(model, None, root / "state", [], settings)
    try:
        case = Moved(server.start(), {}, prompts, expected)
        for folder in folders:
            added = json.loads(case.cli("add", folder, "--name", NAME, "--json"))
            case.digests[added["version"]] = added["digest"]
        yield case
    finally:
        server.stop()


def asked_of(oracle: Oracle) -> tuple[list[str], dict[tuple[int, str], list[int]]]:
    """Prompts that both versions answer, each in its own way, without a tie; and the answers by version and prompt."""
    expected: dict[tuple[int, str], list[int]] = {}
    prompts: list[str] = []
    for seed in itertools.count():
        ids = make_prompt(seed, 6 + seed % 10)
        one, two = (oracle.greedy(ids, ((version, 1.0),), MAX_TOKENS) for version in "12")
        if one.ids != two.ids and min(one.gaps + two.gaps) >= GAP:
            prompts.append(" ".join(f"t{token}" for token in ids))
            expected.update({(1, prompts[-1]): one.ids, (2, prompts[-1]): two.ids})
        if len(prompts) == PROMPTS:
            return prompts, expected


def test_a_request_in_flight_keeps_its_version_and_the_next_one_gets_the_new(moved: Moved) -> None:
    moved.use(1)
    prompt, greedy = moved.prompts[0], {"temperature": 0, "ignore_eos": True}
    in_flight = running(moved.server, "in flight", tokens=LONG_TOKENS, adapters=NAME, text_input=prompt)
    moved.use(2)
    after = ask(moved.server, prompt, {**greedy, "max_tokens": MAX_TOKENS}, adapters=NAME)
    before = in_flight.wait()
    assert moved.check(prompt, before.token_ids[:MAX_TOKENS], before.receipt) == 1
    assert moved.check(prompt, after.token_ids, after.receipt) == 2
    first = json.dumps([{"name": NAME, "version": moved.digests[1][:12]}])
    whole = ask(moved.server, prompt, {**greedy, "max_tokens": LONG_TOKENS}, adapters=first)
    assert len(whole.token_ids) == LONG_TOKENS
    assert before.token_ids == whole.token_ids


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
            how = {"adapters": NAME, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True}
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
