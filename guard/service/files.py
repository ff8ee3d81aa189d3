"""Files that their owner may change while they are served."""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from pathlib import Path

from watchfiles import awatch

Stamp = tuple[int, int, int] | None


def stamp(file: Path) -> Stamp:
    """Differs between two states of a file; None where there is none."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def stamps(directory: Path) -> dict[str, Stamp]:
    """Those of all that a directory holds, by name; none where there is no directory."""
    try:
        return {path.name: stamp(path) for path in directory.iterdir()}
    except OSError:
        return {}


async def changes(directory: Path, every: float, stop: asyncio.Event) -> AsyncIterator[bool]:
    """True when something changes in a directory, and False every so many seconds, until `stop`.

    The latter is the time to look for oneself: network file systems tell of no change, and nobody tells when another
    directory takes the place of the one that is watched, as with a link.
    """
    while not stop.is_set():
        watched = _identity(directory)
        told = awatch(
            directory,
            watch_filter=None,
            recursive=False,
            rust_timeout=round(every * 1000),
            yield_on_timeout=True,
            stop_event=stop,
        )
        try:
            async with aclosing(told):
                async for found in told:
                    yield bool(found)
                    if _identity(directory) != watched:
                        break
        except Exception:  # it is not there, or the system has no watch left; one can still look
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), every)
            yield False


def replace(file: Path, content: bytes) -> None:
    """Puts a content in the place of a file's, whole or not at all. Raises OSError."""
    new = file.with_name(f".{file.name}.new")
    try:
        with new.open("wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        shutil.copymode(file, new)
        new.replace(file)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def _identity(directory: Path) -> tuple[int, int] | None:
    try:
        status = directory.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
