"""The export of a log (docs/settlement.md §1): leaves, signatures and blobs in files that anybody can serve and check.

C2SP entry bundles of 256 leaves, the same cut for signatures, blobs by their hash, `log.pub`, and the checkpoint that
all of it is complete for. The checkpoint is replaced last, so that a reader at any moment finds a whole export.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

from ..errors import Internal, InvalidArgument, ReceiptInvalid, Unavailable
from .checkpoint import verify_checkpoint
from .frames import sync_directory
from .log import ReceiptLog
from .log_key import load_log_key
from .prove import cosigned_note, newest_note
from .signed_note import SignedNote

BUNDLE = 256
SIGNATURE_BYTES = 65

_LENGTH_BYTES = 2
ENTRIES, SIGNATURES = KINDS = Path("tile/entries"), Path("signatures")


class LogExport:
    """An export to be read. InvalidArgument: there is none. ReceiptInvalid: a file of it is not what it must be.

    Leaves and signatures are given as they lie there; `fsck` checks them against the checkpoint.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        if not (directory / "log.pub").exists():
            raise InvalidArgument(f"no export of a log in {directory}", field="export")
        self.key = load_log_key(str(directory / "log.pub"))
        self.checkpoint = verify_checkpoint(_read(directory / "checkpoint"), self.key)
        self.size = self.checkpoint.size
        self._leaf_bundle = lru_cache(4)(self._read_leaves)
        self._signature_bundle = lru_cache(4)(self._read_signatures)

    def leaves(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """The leaves from number `start` to before `stop`, by default to the last one under the checkpoint."""
        stop = self.size if stop is None else stop
        if not 0 <= start <= stop <= self.size:
            raise InvalidArgument(f"leaves {start} to {stop} of {self.size}", field="leaves")
        for index in range(start, stop):
            yield self._leaf_bundle(index // BUNDLE)[index % BUNDLE]

    def signature(self, index: int) -> bytes | None:
        """The signature of receipt `index`, 65 bytes; None if the export has none for it."""
        bundle = self._signature_bundle(index // BUNDLE)
        return bundle[index % BUNDLE] if bundle is not None and 0 <= index < self.size else None

    def blob(self, sha256: bytes) -> bytes | None:
        """The blob with this hash; None if it is not there, or has another hash."""
        try:
            content = (self.directory / "blobs" / sha256.hex()).read_bytes()
        except FileNotFoundError:
            return None
        return content if hashlib.sha256(content).digest() == sha256 else None

    def _read_leaves(self, number: int) -> list[bytes]:
        path = self._find(ENTRIES, number)
        if path is None:
            raise ReceiptInvalid(f"bundle {number} is missing in {self.directory}", field="export")
        content, place, leaves = path.read_bytes(), 0, []
        while place < len(content):
            end = place + _LENGTH_BYTES + int.from_bytes(content[place : place + _LENGTH_BYTES], "big")
            leaves.append(content[place + _LENGTH_BYTES : end])
            place = end
        if place != len(content) or len(leaves) < self._width(number):
            raise ReceiptInvalid(f"{path} does not hold {self._width(number)} whole leaves", field="export")
        return leaves

    def _read_signatures(self, number: int) -> list[bytes] | None:
        path = self._find(SIGNATURES, number)
        if path is None:
            return None
        content = path.read_bytes()
        if len(content) % SIGNATURE_BYTES or len(content) < self._width(number) * SIGNATURE_BYTES:
            raise ReceiptInvalid(f"{path} does not hold {self._width(number)} signatures", field="export")
        return [content[place : place + SIGNATURE_BYTES] for place in range(0, len(content), SIGNATURE_BYTES)]

    def _find(self, kind: Path, number: int) -> Path | None:
        """A bundle's file: the one for this size, or the full one that a newer export made of it."""
        width = self._width(number)
        paths = [bundle_path(kind, number, one) for one in dict.fromkeys((width, BUNDLE))]
        return next((self.directory / path for path in paths if (self.directory / path).exists()), None)

    def _width(self, number: int) -> int:
        return max(0, min(BUNDLE, self.size - number * BUNDLE))


def bundle_path(kind: Path, number: int, width: int = BUNDLE) -> Path:
    """`x001/x234/067`, with `.p/<width>` if it is not full."""
    digits = f"{number:03d}"
    digits = digits.zfill(-(-len(digits) // 3) * 3)
    groups = [digits[place : place + 3] for place in range(0, len(digits), 3)]
    path = kind.joinpath(*(f"x{group}" for group in groups[:-1]), groups[-1])
    return path if width == BUNDLE else path.with_name(path.name + ".p") / str(width)


def write_export(log: ReceiptLog, directory: Path, progress: Callable[[int, int], None] = lambda done, of: None) -> int:
    """Write or bring up to date the export of a log for its newest checkpoint; the number of receipts in it.

    Full bundles that are there stay, and what has gone missing among older ones is written again. `progress` gets how
    many receipts are done, and of how many. InvalidArgument: the directory has another log's export, or a newer one.
    Unavailable: nothing was signed yet.
    """
    note = _note(log)
    size = verify_checkpoint(note, log.key).size
    before = _size_before(log, directory, size)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "blobs").mkdir(exist_ok=True)
    known = {path.name for path in (directory / "blobs").iterdir()}
    for name in log.blob_hashes() if before else ():
        if name.hex() not in known:
            _write(directory / "blobs" / name.hex(), _blob(log, name))
            known.add(name.hex())
    for number in range(-(-size // BUNDLE)):
        if number < before // BUNDLE and all((directory / bundle_path(kind, number)).exists() for kind in KINDS):
            continue
        first = number * BUNDLE
        receipts = log.list(first, min(BUNDLE, size - first))
        for name in dict.fromkeys(one for logged in receipts for one in logged.receipt.blob_hashes):
            if name.hex() not in known:
                _write(directory / "blobs" / name.hex(), _blob(log, name))
                known.add(name.hex())
        entries = b"".join([len(one.leaf).to_bytes(_LENGTH_BYTES, "big") + one.leaf for one in receipts])
        _write(directory / bundle_path(ENTRIES, number, len(receipts)), entries)
        signatures = b"".join([one.signature for one in receipts])
        _write(directory / bundle_path(SIGNATURES, number, len(receipts)), signatures)
        progress(min(first + BUNDLE, size), size)
    _write(directory / "log.pub", (log.key.line + "\n").encode())
    _write(directory / "checkpoint", str(note).encode())
    for number in range(before // BUNDLE, size // BUNDLE + 1):
        _drop_partial(directory, number, size - number * BUNDLE)
    return size


def _note(log: ReceiptLog) -> SignedNote:
    """The newest checkpoint, with the cosignatures if it has some."""
    note, cosigned = newest_note(log), cosigned_note(log)
    if note is None:
        raise Unavailable("the log has no checkpoint yet: a running server signs one about every second")
    return cosigned if cosigned is not None and cosigned.text == note.text else note


def _blob(log: ReceiptLog, sha256: bytes) -> bytes:
    content = log.blob(sha256)
    if content is None:
        raise Internal(f"the log lacks the blob {sha256.hex()}: `openlora receipts fsck` says of which receipts")
    return content


def _size_before(log: ReceiptLog, directory: Path, size: int) -> int:
    if not (directory / "checkpoint").exists():
        if directory.exists() and any(directory.iterdir()) and not (directory / "blobs").exists():
            raise InvalidArgument(f"{directory} is not empty and no export", field="DIR")
        return 0
    before = LogExport(directory)
    if before.key != log.key or before.size > size:
        raise InvalidArgument(
            f"{directory} has {before.size} receipts of log {before.key.log_id.hex()}, this is {size} of "
            f"{log.key.log_id.hex()}",
            field="DIR",
        )
    return before.size


def _drop_partial(directory: Path, number: int, width: int) -> None:
    """Remove what shorter exports had of a bundle that has `width` leaves now."""
    for kind in KINDS:
        partial = directory / bundle_path(kind, number, 1).parent
        for path in partial.glob("*"):
            if path.name != str(width):
                path.unlink()
        if partial.exists() and not any(partial.iterdir()):
            partial.rmdir()


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all, and durable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".new")
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.rename(path)
    sync_directory(path.parent)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ReceiptInvalid(f"can't read {path}: {error.strerror}", field="export") from error
