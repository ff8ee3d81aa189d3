"""`guard check`: a verdict by the model in this process, without a server."""

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from guard.cli import options

if TYPE_CHECKING:
    from guard.cli.render import Checked
    from guard.settings import Settings
    from guard.v1 import moderation_pb2 as pb


def check(
    text: options.Text = None,
    role: options.Role = "user",
    policy: options.Policy = "",
    policies: Annotated[Path | None, typer.Option(help="Directory of policies.", show_default=False)] = None,
    model: Annotated[Path | None, typer.Option(help="Directory of a model.", show_default=False)] = None,
    config: options.Config = None,
    every: Annotated[bool, typer.Option("--all", help="Judge every turn of the conversation.")] = False,
    streamed: Annotated[
        bool,
        typer.Option("--stream", help="Judge an agent's turn on standard input as it comes, after TEXT."),
    ] = False,
    mode: Annotated[str, typer.Option(help="Of --stream: hold, lag or monitor.")] = "hold",
    as_json: options.Json = False,
) -> None:
    """Judge a text or a conversation here, without a server.

    A conversation is {"turns": [{"role": "user", "text": "…"}, …], "target": 0}, where target is the turn to judge,
    the last one if absent; or as chat APIs write it, {"messages": [{"role": "user", "content": "…"}, …]}.

    Exits with 1 when blocked or redirected, and with 0 when allowed or flagged.
    """
    from guard.cli import read, render
    from guard.settings import Settings

    given = {"policies": policies, "model": model, "default_policy": policy or None}  # a directory need hold no other
    settings = Settings.load(given, os.environ, config)
    if streamed:
        from guard.cli.stream import opening, stream

        raise typer.Exit(asyncio.run(stream(settings, opening(text, role, policy, mode), as_json)))
    request = read.request(text, role, policy)
    response = asyncio.run(_judge(settings, read.whole(request) if every else request))
    raise typer.Exit(render.answer(request.turns, response, as_json))


async def _judge(settings: "Settings", request: "pb.CheckRequest | pb.CheckConversationRequest") -> "Checked":
    from guard.engine.moderator import Moderator
    from guard.service import convert
    from guard.telemetry import Telemetry
    from guard.v1 import moderation_pb2 as pb

    conversation = convert.to_conversation(request, settings.max_turns)
    moderator = Moderator.load(settings, Telemetry.start("warning"))
    try:
        decision = await moderator.judge(conversation, policy=request.policy, metadata=request.metadata)
    finally:
        moderator.close()
    if isinstance(request, pb.CheckRequest):
        return convert.from_decision(decision, request.score_detail)
    return convert.from_conversation_decision(decision, request.score_detail)
