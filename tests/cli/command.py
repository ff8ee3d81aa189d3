"""Runs `guard` as a shell does."""

import asyncio
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

_GUARD = Path(sys.executable).with_name("guard")
# Of the settings of whoever runs the tests, none is to count, nor is the width of their terminal.
_ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("GUARD_")} | {"COLUMNS": "200"}


@dataclass(frozen=True)
class Result:
    """How it ended, and what it wrote."""

    code: int | None
    out: str
    err: str


async def start(
    *arguments: str | bytes | Path, stderr: int = PIPE, environment: Mapping[str, str] = MappingProxyType({})
) -> Process:
    return await asyncio.create_subprocess_exec(
        _GUARD,
        *arguments,
        stdin=PIPE,
        stdout=PIPE,
        stderr=stderr,
        env={**_ENVIRONMENT, **environment},
    )


async def guard(*arguments: str | bytes | Path, stdin: bytes = b"", **environment: str) -> Result:
    process = await start(*arguments, environment=environment)
    out, err = await process.communicate(stdin)
    return Result(process.returncode, out.decode(), err.decode())
