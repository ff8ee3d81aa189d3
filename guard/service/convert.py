"""Between the wire and our nouns: pure functions, requests one way and answers the other."""

from guard.errors import InputError
from guard.policy.compile import Policy
from guard.policy.store import PolicyStore
from guard.types import HAZARDS, Action, Conversation, Coverage, Decision, ModelInfo, Reply, Role, Scores, Turn, Verdict
from guard.v1 import moderation_pb2 as pb

_ROLES = {
    pb.ROLE_USER: Role.USER,
    pb.ROLE_AGENT: Role.AGENT,
    pb.ROLE_SYSTEM: Role.SYSTEM,
    pb.ROLE_TOOL: Role.TOOL,
}
_ROLES_ON_WIRE = {role: value for value, role in _ROLES.items()}
_ACTIONS_ON_WIRE = {
    Action.ALLOW: pb.ACTION_ALLOW,
    Action.FLAG: pb.ACTION_FLAG,
    Action.REDIRECT: pb.ACTION_REDIRECT,
    Action.BLOCK: pb.ACTION_BLOCK,
}
_ACTIONS = {value: action for action, value in _ACTIONS_ON_WIRE.items()}
_ROLE_NAMES = ", ".join(pb.Role.Name(value) for value in _ROLES)


def to_conversation(request: pb.CheckRequest | pb.CheckConversationRequest, max_turns: int) -> Conversation:
    """The conversation of a request, whose target is the last turn where a CheckRequest names none.

    Raises InputError for no turns, too many turns, an unknown role or score detail, and a target out of range.
    """
    if not request.turns:
        raise InputError("turns", "at least one is needed")
    if len(request.turns) > max_turns:
        raise InputError("turns", f"{len(request.turns)} of them, at most {max_turns} are taken")
    if request.score_detail not in pb.ScoreDetail.values():
        raise InputError("score_detail", f"{request.score_detail} is unknown")
    turns = tuple(Turn(_to_role(index, turn.role), turn.text) for index, turn in enumerate(request.turns))
    if isinstance(request, pb.CheckConversationRequest):
        return Conversation(turns, None)
    if not request.HasField("target"):
        return Conversation(turns, len(turns) - 1)
    if not 0 <= request.target < len(turns):
        raise InputError("target", f"should be from 0 to {len(turns) - 1}")
    return Conversation(turns, request.target)


def check_opening(opened: pb.StreamOpen) -> None:
    """Raises InputError for an unknown mode or score detail, and for a limit below 0."""
    if opened.score_detail not in pb.ScoreDetail.values():
        raise InputError("open.score_detail", f"{opened.score_detail} is unknown")
    if opened.mode not in pb.StreamMode.values():
        raise InputError("open.mode", f"{opened.mode} is unknown")
    for field in ("lag_characters", "lag_ms"):
        if getattr(opened, field) < 0:
            raise InputError(f"open.{field}", "should be 0 or more")


def to_writing(
    before: tuple[Turn, ...], begun: pb.StreamOpen | pb.StreamNext, max_turns: int
) -> tuple[tuple[Turn, ...], Role]:
    """All that is said before a turn that is begun, and who speaks; InputError for too many, or an unknown role."""
    said = (*before, *(Turn(_to_role(index, turn.role), turn.text) for index, turn in enumerate(begun.turns)))
    if len(said) >= max_turns:
        raise InputError("turns", f"{len(said) + 1} of them, at most {max_turns} are taken")
    if begun.role == pb.ROLE_UNSPECIFIED:
        return said, Role.AGENT
    if begun.role not in _ROLES:
        raise InputError("role", f"should be one of {_ROLE_NAMES}")
    return said, _ROLES[begun.role]


def _to_role(index: int, role: pb.Role.ValueType) -> Role:
    if role not in _ROLES:
        raise InputError(f"turns[{index}].role", f"should be one of {_ROLE_NAMES}")
    return _ROLES[role]


def from_turn(turn: Turn) -> pb.Turn:
    return pb.Turn(role=_ROLES_ON_WIRE[turn.role], text=turn.text.encode("utf-8", "replace").decode())


def to_action(action: pb.Action.ValueType) -> Action:
    return _ACTIONS[action]


def from_action(action: Action) -> pb.Action.ValueType:
    return _ACTIONS_ON_WIRE[action]


def from_decision(decision: Decision, detail: pb.ScoreDetail.ValueType) -> pb.CheckResponse:
    """The answer to a CheckRequest; the decision has one verdict."""
    (verdict,) = decision.verdicts
    return pb.CheckResponse(
        verdict=_from_verdict(verdict, detail),
        provenance=_from_provenance(decision),
        timings=_from_timings(decision),
        decision_id=decision.id,
    )


def from_conversation_decision(decision: Decision, detail: pb.ScoreDetail.ValueType) -> pb.CheckConversationResponse:
    """The answer to a CheckConversationRequest; the decision has a verdict for every turn."""
    return pb.CheckConversationResponse(
        verdicts=[_from_verdict(verdict, detail) for verdict in decision.verdicts],
        provenance=_from_provenance(decision),
        timings=_from_timings(decision),
        decision_id=decision.id,
    )


def _from_verdict(verdict: Verdict, detail: pb.ScoreDetail.ValueType) -> pb.Verdict:
    return pb.Verdict(
        turn=verdict.turn,
        action=_ACTIONS_ON_WIRE[verdict.action],
        violations=[
            pb.Violation(
                category=violation.category,
                action=_ACTIONS_ON_WIRE[violation.action],
                score=violation.score,
                threshold=violation.threshold,
                margin=violation.margin,
                rule=violation.rule,
            )
            for violation in verdict.violations
        ],
        scores=_from_scores(verdict.scores, detail),
        coverage=_from_coverage(verdict.coverage),
        degraded=verdict.degraded,
        reply=_from_reply(verdict.reply),
        shadow=verdict.shadow,
    )


def _from_reply(reply: Reply | None) -> pb.Reply | None:
    return None if reply is None else pb.Reply(name=reply.name, text=reply.text)


def _from_scores(scores: Scores | None, detail: pb.ScoreDetail.ValueType) -> pb.Scores | None:
    if scores is None or detail == pb.SCORE_DETAIL_NONE:
        return None
    if detail == pb.SCORE_DETAIL_UNSAFE:
        return pb.Scores(unsafe=scores.unsafe)
    return pb.Scores(unsafe=scores.unsafe, hazards=scores.hazards)


def _from_coverage(coverage: Coverage) -> pb.Coverage:
    return pb.Coverage(seen=coverage.seen, total=coverage.total)


def _from_provenance(decision: Decision) -> pb.Provenance:
    return pb.Provenance(
        policy=decision.policy.name,
        policy_revision=decision.policy.revision,
        model=decision.model.name,
        model_revision=decision.model.revision,
        prompt_revision=decision.prompt,
    )


def _from_timings(decision: Decision) -> pb.Timings:
    timings = decision.timings
    return pb.Timings(
        queue_ms=timings.queue * 1000,
        tokenise_ms=timings.tokenise * 1000,
        model_ms=timings.model * 1000,
    )


def from_model(info: ModelInfo) -> pb.GetModelResponse:
    return pb.GetModelResponse(
        name=info.revision.name,
        revision=info.revision.revision,
        device=info.device,
        dtype=info.dtype,
        kernels=info.kernels,
        parameters=info.parameters,
        max_tokens=info.max_tokens,
        hazards=[pb.Hazard(code=code, title=HAZARDS.get(code, code)) for code in info.hazards],
        further_categories=info.asks,
    )


def from_policies(store: PolicyStore) -> pb.ListPoliciesResponse:
    return pb.ListPoliciesResponse(
        policies=[from_policy(policy) for policy in store.policies],
        default_policy=store.default,
    )


def from_policy(policy: Policy) -> pb.Policy:
    return pb.Policy(
        name=policy.name,
        revision=policy.revision,
        description=policy.description,
        categories=[
            pb.Category(
                name=category.name,
                title=category.title,
                hazards=category.hazards,
                thresholds=[
                    pb.Threshold(role=_ROLES_ON_WIRE[role], action=_ACTIONS_ON_WIRE[action], score=score)
                    for role, steps in category.thresholds.items()
                    for action, score, _ in steps
                ],
                definition=category.definition,
                scoring=category.scoring if category.hazards else "unsafe",
                weights=category.weights if category.scoring == "weighted" else (),
            )
            for category in policy.categories
        ],
        rules=[
            pb.Rule(
                name=rule.name,
                category=rule.category,
                roles=sorted(_ROLES_ON_WIRE[role] for role in rule.roles),
                action=_ACTIONS_ON_WIRE[rule.action],
            )
            for rule in policy.rules
        ],
        shadow=policy.shadow,
        stream=pb.Debounce(consecutive=policy.stream.consecutive, immediate=policy.stream.immediate),
        refusal=pb.Refusal(form=policy.refusal.form, text=policy.refusal.text),
    )
