"""`openlora generate`: ask a running server, and show the answer as it comes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console

from openlora_client import Answer, Chunk, OpenLoRAClient
from openlora_client.answer import join

from ..attribution.frames import STATUS_NAMES
from ..errors import EXIT_INTERRUPTED, InvalidArgument


def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", "-a", metavar="NAME[=WEIGHT]", help="Repeat it for an ensemble; none: base model."),
    ] = None,
    url: Annotated[str, typer.Option(help="Triton's gRPC address.")] = "localhost:8001",
    max_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 = greedy; default: the server's, 1.0.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Makes a sampled answer repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds until the server gives up.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENLORA_API_KEY", show_envvar=True)] = None,
    stream: Annotated[
        bool, typer.Option("--stream/--no-stream", help="Show text as it is made, or all at once.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object: text, token ids, usage, receipt.")] = False,
    receipt: Annotated[
        typer.FileTextWrite | None, typer.Option(lazy=False, help="Write the receipt here, for `receipts verify`.")
    ] = None,
) -> None:
    """Ask the base model, an adapter or a weighted ensemble. Ctrl-C stops the answer, on the server too."""
    screen, notes = Console(), Console(stderr=True)
    options = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "stop": stop, "timeout": timeout}
    adapters = [_adapter(spec) for spec in adapter] if adapter else None
    with OpenLoRAClient(url, api_key) as client:
        try:
            if stream and not as_json:
                with client.stream(prompt, adapters, **options) as chunks:
                    answer = join(_shown(chunks, screen))
                screen.out("")
            else:
                answer = client.generate(prompt, adapters, **options)
                screen.out(json.dumps(asdict(answer)) if as_json else answer.text, highlight=False)
        except KeyboardInterrupt:
            notes.print("\nstopped", style="yellow")
            raise typer.Exit(EXIT_INTERRUPTED) from None
    if receipt is not None:
        receipt.write(json.dumps(answer.receipt, indent=1) + "\n")
    if not as_json:
        notes.print(_summary(answer), style="dim", markup=False, highlight=False, soft_wrap=True)


def _adapter(spec: str) -> tuple[str, float]:
    name, equals, weight = spec.partition("=")
    try:
        return name, float(weight) if equals else 1.0
    except ValueError:
        raise InvalidArgument(f"{spec!r}: a number is wanted after '=', got {weight!r}", field="adapter") from None


def _shown(chunks: Iterable[Chunk], screen: Console) -> Iterable[Chunk]:
    for chunk in chunks:
        screen.out(chunk.text, end="", highlight=False)
        yield chunk


def _summary(answer: Answer) -> str:
    """The receipt in one line."""
    receipt: dict[str, Any] = answer.receipt
    used = receipt["blobs"]["adapters"]["adapters"]
    adapters = " + ".join(f"{one['digest'][:8]}×{one['weight'] / 1_000_000:g}" for one in used) or "base"
    return (
        f"receipt {receipt['seq']}: {STATUS_NAMES[receipt['status']]} ({answer.finish_reason}), {adapters}, "
        f"{receipt['in_tokens']} + {receipt['out_tokens']} tokens, price {receipt['price']}, "
        f"request {answer.request_id[:16]}…"
    )
