"""Files that their owner may change while they are served."""

from pathlib import Path

Stamp = tuple[int, int, int] | None


def stamp(file: Path) -> Stamp:
    """Differs between two states of a file; None where there is none."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
