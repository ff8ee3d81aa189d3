"""Runs `guard` as one types it: `guard` in this process, where its libraries are loaded already, `shell` in another.

What is a process's own, such as signals, terminals and imports, is tested by the latter.
"""

import asyncio
import io
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import pytest

from guard.cli import main

_GUARD = Path(sys.executable).with_name("guard")
# Of the settings of whoever runs the tests, none is to count, nor is the width of their terminal.
_IGNORED = [name for name in os.environ if name.startswith("GUARD_")]
_OURS = {"COLUMNS": "200"}

Argument = str | bytes | Path


@dataclass(frozen=True)
class Result:
    """How it ended, and what it wrote."""

    code: int | None
    out: str
    err: str


async def guard(*arguments: Argument, stdin: bytes = b"", **environment: str) -> Result:
    """One at a time. It has a thread of its own, so that a server of the test goes on answering."""
    return await asyncio.to_thread(_run, arguments, stdin, environment)


async def shell(*arguments: Argument, stdin: bytes = b"", **environment: str) -> Result:
    process = await start(*arguments, environment=environment)
    out, err = await process.communicate(stdin)
    return Result(process.returncode, out.decode(), err.decode())


async def start(
    *arguments: Argument, stderr: int = PIPE, environment: Mapping[str, str] = MappingProxyType({})
) -> Process:
    inherited = {name: value for name, value in os.environ.items() if name not in _IGNORED}
    return await asyncio.create_subprocess_exec(
        _GUARD, *arguments, stdin=PIPE, stdout=PIPE, stderr=stderr, env={**inherited, **_OURS, **environment}
    )


def _run(arguments: tuple[Argument, ...], stdin: bytes, environment: dict[str, str]) -> Result:
    streams = {"stdin": io.BytesIO(stdin), "stdout": io.BytesIO(), "stderr": io.BytesIO()}
    texts = {name: io.TextIOWrapper(stream, "utf-8", write_through=True) for name, stream in streams.items()}
    with pytest.MonkeyPatch.context() as patch:
        for name in _IGNORED:
            patch.delenv(name)
        for name, value in (_OURS | environment).items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["guard", *map(os.fsdecode, arguments)])
        for name, text in texts.items():
            patch.setattr(sys, name, text)
        with pytest.raises(SystemExit) as ended:
            main()
    code = ended.value.code or 0
    assert isinstance(code, int)
    return Result(code, *(streams[name].getvalue().decode() for name in ("stdout", "stderr")))
