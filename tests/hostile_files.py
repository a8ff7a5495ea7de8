"""Hostile adapters by their files: links, pipes, sizes and names; and by their card, `openlora.json`."""

from __future__ import annotations

import json
import os
import shutil
import stat
import zipfile
from pathlib import Path
from typing import Any

from hostile_kind import CARD, CONFIG, WEIGHTS, Hostile, Maker, file, harmless

ADDRESS = "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed"  # from EIP-55
GOOD_CARD: dict[str, Any] = {
    "schema": 1,
    "owner": ADDRESS,
    "licence": "MIT",
    "prices": {"version": 1, "input": 1, "output": 2},
}
TERABYTE = 1 << 40


def _sparse(name: str, size: int) -> Maker:
    def make(folder: Path) -> None:
        (folder / name).touch()
        os.truncate(folder / name, size)

    return make


def _link(name: str, target: str) -> Maker:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return make


def _node(name: str, kind: int, device: int = 0) -> Maker:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mknod(folder / name, kind | 0o644, device)

    return make


def _only(name: str | bytes) -> Maker:
    """The weights under another name."""

    def make(folder: Path) -> None:
        os.rename(os.fsencode(folder / WEIGHTS), os.path.join(os.fsencode(folder), os.fsencode(name)))

    return make


def _chain(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "real")
    (folder / "second").symlink_to("real")
    (folder / WEIGHTS).symlink_to("second")


def _loop(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "second").symlink_to(WEIGHTS)
    (folder / WEIGHTS).symlink_to("second")


def _linked_directory(folder: Path) -> None:
    folder.rename(folder.with_name(f".real-{folder.name}"))
    folder.symlink_to(f".real-{folder.name}")


def _directory(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def _zip(folder: Path) -> None:
    with zipfile.ZipFile(folder / WEIGHTS, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"cos\nsystem\n(S'true'\ntR.")
        archive.writestr("archive/data/0", bytes(8 << 20))


def _pickle(place: str) -> Maker:
    """A pickle that makes a file `ran` beside itself when it is loaded."""

    def make(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        code = f"cos\nsystem\n(S'touch {folder / 'ran'}'\ntR."
        (folder / place).write_bytes(code.encode())

    return make


def _hard_link(folder: Path) -> None:
    shutil.copy(folder / WEIGHTS, folder / "elsewhere")
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).hardlink_to(folder / "elsewhere")


LINKED = "adapter_model.safetensors is a symbolic link, which may lead anywhere; copy the file itself"
CUT = "adapter_model.safetensors is not safetensors or cut short"
NO_FILE = "adapter_model.safetensors is not a regular file"
FILES = {
    "pickle-only": Hostile(_pickle("adapter_model.bin"), "holds only adapter_model.bin, a pickle file that could run"),
    "pickle-pt-only": Hostile(_pickle("weights.pt"), "holds only weights.pt, a pickle file that could run code"),
    "pickle-named-safetensors": Hostile(_pickle(WEIGHTS), CUT),
    "zip-named-safetensors": Hostile(_zip, CUT),
    "pickle-with-escapes-in-its-name": Hostile(_pickle("\x1b[31m\n.bin"), r"holds only \x1b[31m\n.bin, a pickle"),
    "pickle-with-bytes-in-its-name": Hostile(_only(b"\xff\xfe.bin"), r"holds only \udcff\udcfe.bin, a pickle"),
    "weights-missing": Hostile(_only("weights"), "adapter_model.safetensors is missing"),
    "weights-in-capitals": Hostile(_only(WEIGHTS.upper()), "adapter_model.safetensors is missing"),
    "weights-in-cyrillic": Hostile(_only(WEIGHTS.replace("a", "\u0430")), "adapter_model.safetensors is missing"),
    "config-missing": Hostile(lambda folder: (folder / CONFIG).unlink(), "adapter_config.json is missing"),
    "weights-empty": Hostile(file(WEIGHTS, b""), f"{CUT}: 0 bytes"),
    "weights-of-a-terabyte": Hostile(_sparse(WEIGHTS, TERABYTE), f"adapter_model.safetensors is {TERABYTE} bytes"),
    "config-of-a-terabyte": Hostile(_sparse(CONFIG, TERABYTE), f"adapter_config.json is {TERABYTE} bytes"),
    "card-of-a-terabyte": Hostile(_sparse(CARD, TERABYTE), f"openlora.json is {TERABYTE} bytes, at most 65536"),
    "weights-link": Hostile(_link(WEIGHTS, "/etc/passwd"), LINKED),
    "weights-link-up": Hostile(_link(WEIGHTS, f"../good/{WEIGHTS}"), LINKED),
    "weights-link-to-zeros": Hostile(_link(WEIGHTS, "/dev/zero"), LINKED),
    "weights-link-to-memory": Hostile(_link(WEIGHTS, "/proc/self/mem"), LINKED),
    "weights-link-to-a-directory": Hostile(_link(WEIGHTS, "/etc"), LINKED),
    "weights-link-dangling": Hostile(_link(WEIGHTS, "nowhere"), LINKED),
    "weights-link-chain": Hostile(_chain, LINKED),
    "weights-link-loop": Hostile(_loop, LINKED),
    "config-link": Hostile(_link(CONFIG, "/etc/passwd"), "adapter_config.json is a symbolic link"),
    "card-link": Hostile(_link(CARD, "/etc/passwd"), "openlora.json is a symbolic link"),
    "directory-link": Hostile(_linked_directory, "is a symbolic link"),
    "weights-pipe": Hostile(_node(WEIGHTS, stat.S_IFIFO), NO_FILE),
    "config-pipe": Hostile(_node(CONFIG, stat.S_IFIFO), "adapter_config.json is not a regular file"),
    "card-pipe": Hostile(_node(CARD, stat.S_IFIFO), "openlora.json is not a regular file"),
    "weights-socket": Hostile(_node(WEIGHTS, stat.S_IFSOCK), "adapter_model.safetensors can't be read"),
    "weights-device": Hostile(_node(WEIGHTS, stat.S_IFCHR, os.makedev(1, 5)), NO_FILE),  # /dev/zero
    "weights-directory": Hostile(_directory, NO_FILE),
    "weights-hard-link": harmless(_hard_link),
}


def _card(**changes: Any) -> Maker:
    return file(CARD, json.dumps({**GOOD_CARD, **changes}).encode())


def _prices(amount: str) -> Maker:
    """`amount` is a number as JSON has it."""
    return file(CARD, json.dumps({**GOOD_CARD, "prices": 0}).replace('"prices": 0', _PRICES % amount).encode())


def _dataset(*shares: int, digest: str = "a" * 64) -> dict[str, Any]:
    contributors = [{"name": "x", "address": ADDRESS, "share_ppm": share} for share in shares[1:]]
    return {
        "id": "d",
        "digest": digest,
        "licence": "MIT",
        "share_ppm": shares[0],
        "contributors": contributors,
    }


_PRICES = '"prices": {"version": 1, "input": %s, "output": 2}'
WHOLE = 1_000_000
DEEP = b'{"a":' * 60_000
CARDS = {
    "card-empty-file": Hostile(file(CARD, b""), "openlora.json is not JSON"),
    "card-array": Hostile(file(CARD, b"[]"), "openlora.json holds a list, a JSON object is wanted"),
    "card-deep": Hostile(file(CARD, b'{"a":' * 500 + b"1" + b"}" * 500), "is not JSON: nested deeper than 32"),
    "card-too-deep-to-parse": Hostile(file(CARD, DEEP[: 60 << 10]), "openlora.json is not JSON"),
    "card-over-64-KiB": Hostile(_card(description="x" * (64 << 10)), "bytes, at most 65536 are possible here"),
    "card-twice-the-key": Hostile(file(CARD, b'{"schema": 1, "schema": 1}'), "comes twice"),
    "card-not-UTF-8": Hostile(file(CARD, b'{"licence": "\xff"}'), "openlora.json is not JSON"),
    "card-UTF-16": Hostile(file(CARD, json.dumps(GOOD_CARD).encode("utf-16")), "openlora.json is not JSON"),
    "card-NaN": Hostile(_prices("NaN"), "NaN is not a JSON number"),
    "card-1e400": Hostile(_prices("1e400"), "1e400 is out of range"),
    "card-negative-price": Hostile(_prices("-1"), "card.prices.input: Input should be greater than or equal to 0"),
    "card-price-of-a-half": Hostile(_prices("0.5"), "card.prices.input: Input should be a valid integer"),
    "card-price-over-2-53": Hostile(_prices(str(2**53)), "card.prices.input: Input should be less than 2^53"),
    "card-price-of-4000-digits": Hostile(_prices("9" * 4000), "card.prices.input: "),
    "card-price-of-5000-digits": Hostile(_prices("9" * 5000), "openlora.json is not JSON"),
    "card-price-as-a-word": Hostile(_prices('"one"'), "card.prices.input: 'one' is not a whole number"),
    "card-owner-malformed": Hostile(_card(owner="0x123"), "'0x123' is not a checksummed address"),
    "card-owner-zero": Hostile(_card(owner=f"0x{'0' * 40}"), "the zero address owns nothing"),
    "card-owner-number": Hostile(_card(owner=7), "card.owner: Input should be a valid string"),
    "card-owner-with-escapes": Hostile(_card(owner="\x1b[2J\x1b]0;x\x07"), r"'\x1b[2J\x1b]0;x\x07' is not"),
    "card-key-with-escapes": Hostile(_card(**{"\x1b[2J\r\n[/b]": 1}), r"card.\x1b[2J\r\n[/b]: Extra inputs"),
    "card-key-of-60000": Hostile(_card(**{"k" * 60_000: 1}), "kkkkkkkk…"),
    "card-surrogate": Hostile(file(CARD, b'{"schema": 1, "licence": "\\ud800"}'), "openlora.json: card."),
    "card-surrogate-key": Hostile(file(CARD, b'{"\\ud800": 1}'), "openlora.json: card: Input should be a valid string"),
    "card-shares-over-the-whole": Hostile(_card(datasets=[_dataset(WHOLE + 1, WHOLE)]), "less than or equal to"),
    "card-shares-of-two-wholes": Hostile(
        _card(datasets=[_dataset(WHOLE, WHOLE), {**_dataset(WHOLE, WHOLE), "id": "e"}]),
        "the shares of the data sets add up to 2000000 ppm, not 1000000",
    ),
    "card-share-negative": Hostile(_card(datasets=[_dataset(-1, WHOLE)]), "Input should be greater than 0"),
    "card-contributor-twice": Hostile(_card(datasets=[_dataset(WHOLE, 1, WHOLE - 1)]), "is there more than once"),
    "card-digest-malformed": Hostile(_card(datasets=[_dataset(WHOLE, WHOLE, digest="../x")]), "should match pattern"),
    "card-of-another-base": Hostile(_card(base="c" * 64), "made for base model cccccccccccccccc…, this server runs"),
    "card-base-no-digest": Hostile(_card(base="../../etc"), "base is '../../etc', a digest of 64 hex digits"),
    "card-base-number": Hostile(_card(base=1), "base is 1, a digest of 64 hex digits is wanted"),
    "card-with-HTML": harmless(_card(description="<script>alert(1)</script>[/bold]\x1b[2J\u202e")),
    "card-object-empty": harmless(file(CARD, b"{}")),
}
