"""The Admin service: policies are tried on live traffic, put in force and taken back."""

from typing import Any

import grpc

from guard.errors import InputError
from guard.service.convert import from_action
from guard.service.rollout import Rollout, Standing
from guard.v1 import admin_pb2 as pb
from guard.v1.admin_pb2_grpc import AdminServicer

_DAY = 24 * 60 * 60  # seconds

_Context = grpc.aio.ServicerContext[Any, Any]


class Admin(AdminServicer):
    """Answers with Loading until the roll-out is started."""

    def __init__(self, rollout: Rollout) -> None:
        self._rollout = rollout

    async def Stage(self, request: pb.StageRequest, context: _Context) -> pb.StageResponse:
        if not 0 <= request.percent <= 100:
            raise InputError("percent", "should be from 0 to 100")
        if request.ttl_seconds < 0:
            raise InputError("ttl_seconds", "should be 0 or more")
        includes = {name: text.encode() for name, text in request.includes.items()}
        seconds = request.ttl_seconds or _DAY
        standing = await self._rollout.stage(request.policy, request.text.encode(), includes, request.percent, seconds)
        return pb.StageResponse(rollout=_from_standing(standing))

    async def Promote(self, request: pb.PromoteRequest, context: _Context) -> pb.PromoteResponse:
        return pb.PromoteResponse(rollout=_from_standing(await self._rollout.promote(request.policy, request.revision)))

    async def Withdraw(self, request: pb.WithdrawRequest, context: _Context) -> pb.WithdrawResponse:
        return pb.WithdrawResponse(
            rollout=_from_standing(await self._rollout.withdraw(request.policy, request.revision))
        )

    async def Rollback(self, request: pb.RollbackRequest, context: _Context) -> pb.RollbackResponse:
        return pb.RollbackResponse(rollout=_from_standing(await self._rollout.rollback(request.policy)))

    async def ListRollouts(self, request: pb.ListRolloutsRequest, context: _Context) -> pb.ListRolloutsResponse:
        names = [policy.name for policy in self._rollout.policies.policies]
        return pb.ListRolloutsResponse(
            rollouts=[_from_standing(self._rollout.standing(name)) for name in names],
            differences=self._rollout.differences,
        )


def _from_standing(standing: Standing) -> pb.Rollout:
    return pb.Rollout(
        policy=standing.policy.name,
        live_revision=standing.policy.revision,
        previous_revision=standing.previous,
        difference=standing.difference,
        candidate=_from_candidate(standing),
    )


def _from_candidate(standing: Standing) -> pb.Candidate | None:
    candidate, tally = standing.candidate, standing.tally
    if candidate is None:
        return None
    return pb.Candidate(
        revision=candidate.policy.revision,
        percent=candidate.percent,
        expires_in_seconds=round(standing.expires_in),
        verdicts=tally.verdicts,
        answered=tally.answered,
        flips=[
            pb.Flip(about=flip.about, live=from_action(flip.live), candidate=from_action(flip.candidate), count=count)
            for flip, count in tally.flips.most_common()
        ],
    )
