"""Who calls, and how often they may: API tokens from a file, and a rate for each client."""

import hashlib
import hmac
import time
from collections import OrderedDict
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path

from structlog.typing import FilteringBoundLogger

from guard.errors import ConfigError, Unauthenticated
from guard.service.files import stamp

caller: ContextVar[str] = ContextVar("caller", default="")
"""The name of whose call is being served."""


class Tokens:
    """The tokens of a file with a `name:token` a line; blank lines and lines that begin with # are passed over.

    The file is read again when it changes. A name may have several tokens, so that they can be rotated. What cannot be
    used is logged, and the tokens that were known stay in force. Raises ConfigError where the first reading fails.
    """

    def __init__(self, file: Path, log: FilteringBoundLogger) -> None:
        self._file = file
        self._log = log
        self._stamp = stamp(file)
        self._names = _read(file)

    def name_of(self, token: str) -> str:
        """The name that the token stands for; raises Unauthenticated where it is not known."""
        self._refresh()
        presented = _digest(token)
        found = None
        for digest, name in self._names.items():  # to the end, that the time taken tells nothing
            if hmac.compare_digest(digest, presented):
                found = name
        if found is None:
            raise Unauthenticated
        return found

    def _refresh(self) -> None:
        found = stamp(self._file)
        if found == self._stamp:
            return
        self._stamp = found
        try:
            self._names = _read(self._file)
        except ConfigError as error:
            self._log.error("tokens_kept", problem=str(error))
        else:
            self._log.info("tokens_reloaded", tokens=len(self._names))


def _read(file: Path) -> dict[bytes, str]:
    """Digests of tokens, which are all that is kept, to names."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read ({type(error).__name__})") from None
    names: dict[bytes, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, token = (part.strip() for part in line.partition(":"))
        if not name or not token:
            raise ConfigError(f"{file}:{number}: should be name:token")
        if names.setdefault(_digest(token), name) != name:
            raise ConfigError(f"{file}:{number}: the token of {name} is that of another name too")
    if not names:
        raise ConfigError(f"{file}: holds no token")
    return names


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


class RateLimit:
    """Lets each client make `burst` requests at once and `rate` a second in the long run."""

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval = 1 / rate
        self._ahead = (burst - 1) / rate
        self._clock = clock
        # When each client's requests so far would be used up at `rate`; least recently seen first.
        self._due: OrderedDict[str, float] = OrderedDict()

    def take(self, client: str) -> float:
        """0 where the client may go on; otherwise the seconds until it may, and nothing is taken."""
        now = self._clock()
        due = max(self._due.get(client, now), now)
        if due - now > self._ahead:
            return due - now - self._ahead
        self._due[client] = due + self._interval
        self._due.move_to_end(client)
        while self._due and (oldest := next(iter(self._due.items())))[1] <= now:  # as good as never seen
            del self._due[oldest[0]]
        return 0.0
