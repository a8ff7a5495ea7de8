"""Manifests: which bytes an adapter or a base model is made of, and the one digest that names them.

The digest is what receipts, tickets, catalog and cache speak of; names are only labels for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import rfc8785

from ..errors import AdapterInvalid, InvalidArgument, Unavailable

MANIFEST_DOMAIN = b"openlora/manifest/v1"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CARD_FILE = "openlora.json"  # terms: versioned apart from the bytes, so no part of the manifest

# Everything that decides which tokens a base model gives for a text.
MODEL_PATTERNS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*",
    "*.safetensors",
    "*.safetensors.index.json",
)
CHUNK_BYTES = 1 << 20
SETTLED_NS = 2_000_000_000  # a file younger than this may change again without its timestamps showing it


@dataclass(frozen=True, order=True)
class ManifestFile:
    """One file: path inside its directory with `/`, size in bytes, SHA-256 as 64 hex digits."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A sorted list of files."""

    files: tuple[ManifestFile, ...]

    @classmethod
    def of(cls, files: Iterable[ManifestFile]) -> Manifest:
        return cls(tuple(sorted(files)))

    @cached_property
    def digest(self) -> str:
        """SHA-256(`openlora/manifest/v1` ‖ JCS of `{"files": [{"path", "size", "sha256"} …]}`), 64 hex digits."""
        tree = {"files": [{"path": file.path, "size": file.size, "sha256": file.sha256} for file in self.files]}
        return hashlib.sha256(MANIFEST_DOMAIN + rfc8785.dumps(tree)).hexdigest()


class HashCache:
    """SHA-256 of big files by (path, size, times, inode), kept in a JSON file: an unchanged model is hashed once.

    ctime is part of the key: unlike mtime nobody can set it back. A file that changed less than two seconds ago isn't
    remembered, because a second change could leave the same timestamps.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            known = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):  # a lost or damaged cache only costs the hashing
            known = {}
        self._known: dict[str, list[int | str]] = known if isinstance(known, dict) else {}

    def get(self, path: Path, status: os.stat_result) -> str | None:
        entry = self._known.get(str(path))
        if isinstance(entry, list) and entry[:-1] == _identity(status):
            return str(entry[-1])
        return None

    def put(self, path: Path, status: os.stat_result, sha256: str) -> None:
        if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > SETTLED_NS:
            self._known[str(path)] = [*_identity(status), sha256]

    def save(self) -> None:
        """Replace the JSON file whole, so that a reader never sees half of it."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=self._path.parent, prefix=self._path.name)
        with os.fdopen(handle, "w") as file:
            json.dump(self._known, file, indent=1)
        os.replace(temporary, self._path)


def adapter_manifest(directory: Path) -> Manifest:
    """Of an adapter: `adapter_config.json` and `adapter_model.safetensors`, nothing else.

    Raises:
        AdapterInvalid: when one of the two is missing.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).is_file():
            raise AdapterInvalid(f"{name} is missing", field=f"adapter {directory.name}")
    return Manifest.of(_hashed(directory, directory / name, None, None) for name in (CONFIG_FILE, WEIGHTS_FILE))


def model_manifest(
    directory: Path, cache_file: Path | None = None, progress: Callable[[int], None] | None = None
) -> Manifest:
    """Of a base model: configuration, tokenizer, chat template and safetensors weights.

    Args:
        directory: a Hugging Face model directory; links are followed, because its owner is the operator.
        cache_file: JSON file of a `HashCache`, which remembers what was hashed before.
        progress: called with the number of bytes just dealt with.

    Raises:
        InvalidArgument: when it holds no configuration or no safetensors weights.
    """
    paths = sorted({path for pattern in MODEL_PATTERNS for path in directory.glob(pattern) if path.is_file()})
    if directory / "config.json" not in paths:
        raise InvalidArgument(
            f"{directory} has no config.json: a Hugging Face model directory is wanted", field="model"
        )
    if not any(path.suffix == ".safetensors" for path in paths):
        raise InvalidArgument(f"{directory} has no *.safetensors weights; pickle files are not loaded", field="model")
    cache = HashCache(cache_file) if cache_file is not None else None
    manifest = Manifest.of(_hashed(directory, path, cache, progress) for path in paths)
    if cache is not None:
        cache.save()
    return manifest


def _hashed(root: Path, path: Path, cache: HashCache | None, progress: Callable[[int], None] | None) -> ManifestFile:
    absolute = path.resolve()
    with open(absolute, "rb") as file:
        before = os.fstat(file.fileno())
        if not stat.S_ISREG(before.st_mode):
            raise InvalidArgument(f"{path} is not a regular file", field="model")
        sha256 = cache.get(absolute, before) if cache is not None else None
        if sha256 is None:
            state = hashlib.sha256()
            while chunk := file.read(CHUNK_BYTES):
                state.update(chunk)
                if progress is not None:
                    progress(len(chunk))
            sha256 = state.hexdigest()
            if _identity(os.fstat(file.fileno())) != _identity(before):
                raise Unavailable(f"{path} changed while it was read; try again when it is complete")
            if cache is not None:
                cache.put(absolute, before, sha256)
        elif progress is not None:
            progress(before.st_size)
    return ManifestFile(path.relative_to(root).as_posix(), before.st_size, sha256)


def _identity(status: os.stat_result) -> list[int | str]:
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]
