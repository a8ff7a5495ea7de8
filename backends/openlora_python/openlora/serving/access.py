"""The access policy: who a caller is, and which adapters it may know of."""

from __future__ import annotations

import hashlib
import hmac

from ..config import Access
from ..errors import InvalidArgument

ANONYMOUS = "anonymous"


class AccessPolicy:
    """Callers are recognised by the SHA-256 of their key; adapters not listed as private are for everybody."""

    def __init__(self, access: Access) -> None:
        self._callers = access.callers
        self._require_key = access.require_key
        self._private = {name: frozenset(callers) for name, callers in access.private.items()}

    def caller(self, api_key: str | None) -> str:
        """The caller's name.

        Raises:
            InvalidArgument: the key is unknown, or none was given where the policy wants one.
        """
        if api_key:
            digest = hashlib.sha256(api_key.encode()).hexdigest()
            for name, expected in self._callers.items():
                if hmac.compare_digest(digest, expected.lower()):
                    return name
            raise InvalidArgument("unknown key", field="api_key")
        if self._require_key:
            raise InvalidArgument("this server wants a key", field="api_key")
        return ANONYMOUS

    def allows(self, caller: str, adapter: str) -> bool:
        allowed = self._private.get(adapter)
        return allowed is None or caller in allowed
