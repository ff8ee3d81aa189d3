"""`guard unseal`: what was captured, for the owner of the key that it was sealed to."""

import base64
import binascii
import sys
from pathlib import Path
from typing import Annotated

import typer

from guard.errors import ConfigError


def unseal(
    file: Annotated[Path, typer.Argument(help="What `guard serve --capture` wrote.")],
    key: Annotated[Path, typer.Option(help="The X25519 private key, PEM.")],
) -> None:
    """Print captured conversations, a JSON object a line, with the decision's id, its actions and all turns.

    Exits with 2 where some lines are damaged, or were sealed to another key; the others are printed.
    """
    from guard.keys import unsealer

    unsealed = unsealer(key)
    try:
        lines = file.open("rb")
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    unreadable = []
    with lines:
        for number, line in enumerate(lines, 1):
            record = unsealed(_decoded(line))
            if record is None:
                unreadable.append(f"{file}:{number}: cannot be unsealed")
            else:
                sys.stdout.buffer.write(record + b"\n")
    if unreadable:
        raise ConfigError("\n".join(unreadable))


def _decoded(line: bytes) -> bytes:
    """Nothing, which is sealed for nobody, where it is no base64."""
    try:
        return base64.b64decode(line.strip(), validate=True)
    except binascii.Error:
        return b""
