"""Asking witnesses (c2sp.org/tlog-witness): for cosignatures on a checkpoint, and for what they saw of a log."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass

import httpx

from ..errors import InvalidArgument, OpenLoRAError, Unavailable
from .checkpoint import Checkpoint, verify_checkpoint, verify_cosignatures
from .log_key import LogKey
from .merkle_tree import MerkleTree
from .signed_note import COSIGNATURE_V1, NoteKey, SignedNote, parse_note, parse_signature_lines

SECONDS = 5.0
"""How long one request may take."""

_SIZE = re.compile(r"(0|[1-9][0-9]{0,18})\n")


@dataclass(frozen=True)
class WitnessAddress:
    """Where a witness is and what its key is; written `URL vkey`."""

    url: str
    key: NoteKey

    @classmethod
    def parse(cls, line: str) -> WitnessAddress:
        """InvalidArgument: not `URL vkey`, or not a key that cosigns."""
        url, _, vkey = line.strip().partition(" ")
        if not url.startswith(("http://", "https://")):
            raise InvalidArgument(f"{line!r} is not a URL and a verifier key", field="witness")
        key = NoteKey.parse(vkey.strip())
        if key.kind != COSIGNATURE_V1:
            raise InvalidArgument(f"{vkey!r} is not a cosignature key (type 4)", field="witness")
        return cls(url.rstrip("/"), key)


class WitnessClient:
    """One witness, over one connection. Unavailable: it does not answer, or not what a witness answers."""

    def __init__(self, address: WitnessAddress) -> None:
        self.address = address
        self._http = httpx.Client(timeout=SECONDS)
        self._size = 0  # of the last checkpoint that the witness is known to have

    def cosign(self, note: SignedNote, checkpoint: Checkpoint, tree: Callable[[], MerkleTree]) -> SignedNote:
        """The note with the witness's cosignature added. `tree` gives the log's tree when a proof is needed.

        Unavailable: the witness refuses; its words say why.
        """
        answer = self._add(note, checkpoint, tree)
        if answer.status_code == 409 and (found := _SIZE.fullmatch(answer.text)):
            self._size = int(found[1])
            if self._size > checkpoint.size:
                raise Unavailable(f"{self.address.url} has cosigned {self._size} already, this is {checkpoint.size}")
            answer = self._add(note, checkpoint, tree)
        if answer.status_code != 200:
            raise Unavailable(f"{self.address.url} refuses: {answer.status_code} {answer.text[:200].strip()}")
        try:
            lines = parse_signature_lines(answer.text)
        except OpenLoRAError as error:
            raise Unavailable(f"{self.address.url} answers {answer.text[:80]!r}") from error
        ours = tuple(one for one in lines if (one.name, one.key_id) == (self.address.key.name, self.address.key.key_id))
        cosigned = SignedNote(note.text, note.signatures + ours)
        if not verify_cosignatures(cosigned, [self.address.key]):
            raise Unavailable(f"{self.address.url} did not sign with {self.address.key.vkey}")
        self._size = checkpoint.size
        return cosigned

    def newest(self, key: LogKey) -> Checkpoint | None:
        """The newest checkpoint of the log that the witness cosigned; None if it never did."""
        origin = hashlib.sha256(key.origin.encode()).hexdigest()
        answer = self._ask("GET", f"{origin}/checkpoint")
        if answer.status_code == 404:
            return None
        try:
            note = parse_note(answer.content)
            if answer.status_code != 200 or not verify_cosignatures(note, [self.address.key]):
                raise Unavailable(f"{self.address.url} answers {answer.status_code} without its cosignature")
            return verify_checkpoint(note, key)
        except OpenLoRAError as error:
            raise Unavailable(f"{self.address.url}: {error}") from error

    def close(self) -> None:
        self._http.close()

    def _add(self, note: SignedNote, checkpoint: Checkpoint, tree: Callable[[], MerkleTree]) -> httpx.Response:
        proof = tree().consistency_proof(self._size, checkpoint.size) if 0 < self._size < checkpoint.size else []
        lines = [f"old {self._size}", *(base64.b64encode(one).decode() for one in proof)]
        return self._ask("POST", "add-checkpoint", "\n".join(lines) + "\n\n" + str(note))

    def _ask(self, method: str, path: str, body: str | None = None) -> httpx.Response:
        try:
            return self._http.request(method, f"{self.address.url}/{path}", content=body and body.encode())
        except httpx.HTTPError as error:
            raise Unavailable(f"{self.address.url} does not answer: {error}") from error
