"""Who holds which block of the cache: reference counts, published contents, and eviction of the least recently used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Blocks by number. Each is in one of three states:

    - free: nobody's, its content is worth nothing;
    - held: by one or more sequences;
    - idle: held by nobody, but published, so its content may be asked for again until the block is taken.

    free + held + idle = total, always. What is held more than once, or published, must not be written.
    """

    def __init__(self, blocks: Iterable[int]) -> None:
        self._free = list(blocks)[::-1]  # last in, first out: the resident memory follows the load
        self.total = len(self._free)
        self._holders: dict[int, int] = {}  # held blocks only
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently held first
        self._by_key: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}  # published blocks, held or idle

    @property
    def available(self) -> int:
        """How many `take` can give."""
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> int:
        return len(self._holders)

    @property
    def idle(self) -> int:
        return len(self._idle)

    def holders(self, block: int) -> int:
        return self._holders.get(block, 0)

    def writable(self, block: int) -> bool:
        """Whether its one holder may change its content."""
        return self._holders.get(block) == 1 and block not in self._keys

    def take(self, count: int) -> list[int]:
        """Hold `count` blocks of no content; idle ones are evicted only when no block is free.

        The caller has checked `available`.
        """
        taken = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._idle.popitem(last=False)
                self._unpublish(block)
            self._holders[block] = 1
            taken.append(block)
        return taken

    def hold(self, block: int) -> None:
        """Hold a published block, or one that is held already, once more."""
        self._idle.pop(block, None)
        self._holders[block] = self._holders.get(block, 0) + 1

    def release(self, blocks: Sequence[int]) -> None:
        """Undo one `take` or `hold` of each; `blocks` in token order.

        The last ones become evictable first: a prefix is worth something without its continuation, not the other way.
        """
        for block in reversed(blocks):
            holders = self._holders[block] - 1
            if holders:
                self._holders[block] = holders
                continue
            del self._holders[block]
            if block in self._keys:
                self._idle[block] = None
            else:
                self._free.append(block)

    def publish(self, block: int, key: bytes) -> None:
        """Let others find a held block. Where two were computed for one key, the first one stays the one to find."""
        if key not in self._by_key and block not in self._keys:
            self._by_key[key] = block
            self._keys[block] = key

    def find(self, key: bytes) -> int | None:
        return self._by_key.get(key)

    def withdraw(self, block: int) -> None:
        """Undo `publish`, if it was: nobody finds the block any more; who holds it keeps it."""
        if block in self._keys:
            self._unpublish(block)
            if block in self._idle:
                del self._idle[block]
                self._free.append(block)

    def _unpublish(self, block: int) -> None:
        del self._by_key[self._keys.pop(block)]
