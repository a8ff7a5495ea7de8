"""The demo: start a real server, ask the base model, every adapter and an ensemble, verify every receipt, stop.

    python build_scripts/run_demo.py [--keep]

Needs `make_demo.py` to have run. Exits with 0 only if every answer came and every receipt holds against the log's key.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from openlora.attribution.log_key import load_log_key
from openlora.attribution.verify import verify_receipt
from openlora.errors import OpenLoRAError
from openlora_client import Adapters, Answer, OpenLoRAClient
from openlora_client.answer import join

DEMO = Path("var/demo")
STATE = Path("var")
PROMPT = "Tell me about the cat."
ENSEMBLE = (("pirate", 0.6), ("shout", 0.6))

console = Console(highlight=False, soft_wrap=True)


def openlora(*arguments: str) -> None:
    """Run a command of the CLI as a user would."""
    console.print(f"[dim]$ openlora {' '.join(arguments)}[/dim]")
    subprocess.run([sys.executable, "-m", "openlora.cli", *arguments], check=True)


def ask(client: OpenLoRAClient, title: str, adapters: Adapters) -> Answer:
    """Stream one answer to the screen as it is made."""
    console.print(f"\n[bold]{title:<26}[/bold] ", end="")

    def shown():
        for chunk in client.stream(PROMPT, adapters, max_tokens=60, temperature=0):
            console.print(chunk.text, end="", markup=False)
            yield chunk

    answer = join(shown())
    console.print()
    return answer


def run() -> None:
    began = time.monotonic()
    openlora("serve", "--model", str(DEMO / "model"), "--adapters", str(DEMO / "adapters"), "--detach")
    console.print(f"serving after {time.monotonic() - began:.1f} s\n\nprompt: [italic]{PROMPT}[/italic]")
    log_key = load_log_key(str(STATE / "log.pub"))
    names = sorted(folder.name for folder in (DEMO / "adapters").iterdir())
    questions: list[tuple[str, Adapters]] = [("base model", None), *((name, name) for name in names)]
    questions.append((" + ".join(f"{weight} {name}" for name, weight in ENSEMBLE), list(ENSEMBLE)))
    with OpenLoRAClient() as client:
        for title, adapters in questions:
            answer = ask(client, title, adapters)
            verify_receipt(answer.receipt, log_key, prompt=PROMPT, output=answer.text)
            receipt = answer.receipt
            console.print(
                f"{'':<26} [green]receipt {receipt['seq']} verified[/green] [dim]{answer.usage.input_tokens} + "
                f"{answer.usage.output_tokens} tokens, price {receipt['price']}, signed by {receipt['signer']}[/dim]"
            )
    console.print()
    openlora("receipts", "list", "--limit", str(len(questions)))
    openlora("receipts", "verify", "--all", "--log", str(STATE / "log.pub"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="leave the server running")
    keep = parser.parse_args().keep
    try:
        run()
    except (OpenLoRAError, subprocess.CalledProcessError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 1
    finally:
        if not keep:
            subprocess.run([sys.executable, "-m", "openlora.cli", "stop"], check=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
