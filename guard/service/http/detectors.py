"""The detector API of the FMS guardrails orchestrator, as TrustyAI deploys it: risks with a score, a label each."""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel

from guard.errors import InputError, NotFound
from guard.messages import turns
from guard.policy.compile import Policy
from guard.policy.store import PolicyStore
from guard.service.http.endpoint import Asked, Errors, alone, in_context, post
from guard.service.http.status import message_of, status_of
from guard.types import HAZARDS, Action, Conversation, Decision, Role, Scores, Turn, Verdict

_HEADER = "detector-id"
_DEFAULT = "guard"  # the detector that is the default policy, where no policy is called so


class DetectorError(BaseModel):
    """What went wrong."""

    code: int
    message: str


class DetectorParams(BaseModel):
    """By default the thresholds of the policy say what is detected."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    threshold: float | None = None
    """Every category whose score reaches it is detected."""
    label_thresholds: dict[str, float] = {}
    """The same for categories by name, before `threshold`."""
    policy: str = ""
    """The policy, in place of the one that the detector is called after."""
    role: Literal["user", "agent"] = "user"
    """Whose texts `contents` are."""


class ContentsRequest(BaseModel):
    """Texts, each judged by itself."""

    contents: list[str] = Field(min_length=1)
    detector_params: DetectorParams = DetectorParams()


class ChatRequest(BaseModel):
    """A conversation in OpenAI's messages; judged is what comes after the last answer, or with one at the end."""

    messages: list[dict[str, Any]]
    tools: list[Any] = []
    detector_params: DetectorParams = DetectorParams()


class GenerationRequest(BaseModel):
    """A prompt, and the text that is judged, which was generated to it."""

    prompt: str
    generated_text: str
    detector_params: DetectorParams = DetectorParams()


class Evidence(BaseModel):
    """A hazard that the category is made of, and its score."""

    name: str
    value: str
    score: float


class Detection(BaseModel):
    """A category of the policy; `metadata` says what the policy would do, and which it is."""

    detection: str
    detection_type: Literal["risk"]
    score: float
    evidence: list[Evidence]
    metadata: dict[str, str]


class ContentDetection(Detection):
    """The same of a whole text, in characters."""

    start: int
    end: int
    text: str


class Detections(RootModel[list[Detection]]):
    """None, where nothing was found."""


class ContentsDetections(RootModel[list[list[ContentDetection]]]):
    """A list for each text, empty where nothing was found."""


async def judge_contents(asked: Asked, request: ContentsRequest) -> ContentsDetections:
    role = Role(request.detector_params.role)
    judged = await _judge(asked, request.detector_params, [alone(Turn(role, text)) for text in request.contents])
    return ContentsDetections(
        [
            [
                ContentDetection(**dict(one), start=0, end=len(text), text=text)
                for one in _detections(decision, policy, request.detector_params)
            ]
            for text, (decision, policy) in zip(request.contents, judged, strict=True)
        ]
    )


async def judge_chat(asked: Asked, request: ChatRequest) -> Detections:
    return await _judge_together(asked, request.detector_params, in_context(turns(request.messages)))


async def judge_generation(asked: Asked, request: GenerationRequest) -> Detections:
    said = Turn(Role.USER, request.prompt), Turn(Role.AGENT, request.generated_text)
    return await _judge_together(asked, request.detector_params, in_context(said, [1]))


async def _judge_together(asked: Asked, params: DetectorParams, conversations: Sequence[Conversation]) -> Detections:
    """Of what is found in several turns, each category once, with its highest score."""
    highest: dict[str, Detection] = {}
    for decision, policy in await _judge(asked, params, conversations):
        for one in _detections(decision, policy, params):
            if one.detection not in highest or highest[one.detection].score < one.score:
                highest[one.detection] = one
    return Detections(list(highest.values()))


async def _judge(
    asked: Asked, params: DetectorParams, conversations: Sequence[Conversation]
) -> list[tuple[Decision, Policy]]:
    before = asked.policies
    policy = params.policy or _policy(asked.headers, before)
    decisions = await asked.judge_each(conversations, policy=policy)
    return [(decision, asked.policy_of(decision, before)) for decision in decisions]


def _policy(headers: Mapping[str, str], policies: PolicyStore) -> str:
    """The policy that the detector is called after. Raises InputError, and NotFound where there is none."""
    detector = headers.get(_HEADER)
    if not detector:
        raise InputError(_HEADER, "is missing from the headers")
    if detector in policies.by_name:
        return detector
    if detector == _DEFAULT:
        return policies.default
    raise NotFound(_HEADER, f"is neither {_DEFAULT} nor a policy")


def _detections(decision: Decision, policy: Policy, params: DetectorParams) -> list[Detection]:
    (verdict,) = decision.verdicts
    hazards = {category.name: category.hazards for category in policy.categories}
    metadata = {"action": verdict.action.name.lower(), "policy": policy.name, "revision": policy.revision}
    return [
        Detection(
            detection=name,
            detection_type="risk",
            score=score,
            evidence=_evidence(hazards.get(name, ()), verdict.scores),
            metadata=metadata,
        )
        for name, score in _found(verdict, policy, params).items()
    ]


def _found(verdict: Verdict, policy: Policy, params: DetectorParams) -> dict[str, float]:
    """What is detected, with its score: of rules, and of a verdict that on_error gave, it is 1."""
    violations = () if verdict.action is Action.ALLOW else verdict.violations
    scored = {violation.category: violation.score for violation in violations if not violation.rule}
    for category in policy.categories:
        threshold = params.label_thresholds.get(category.name, params.threshold)
        if threshold is None or verdict.scores is None:
            continue
        scored.pop(category.name, None)
        if (score := category.score(verdict.scores)) >= threshold:
            scored[category.name] = score
    ruled = {violation.category or violation.rule: 1.0 for violation in violations if violation.rule}
    if verdict.degraded and verdict.action is not Action.ALLOW:
        ruled.setdefault("degraded", 1.0)
    return scored | ruled


def _evidence(codes: Sequence[str], scores: Scores | None) -> list[Evidence]:
    if scores is None:
        return []
    return [Evidence(name=code, value=HAZARDS.get(code, code), score=scores.hazards[code]) for code in codes]


def _status(error: Exception) -> HTTPStatus:
    """422 for what the API calls invalid, and 404 for a detector that is not there."""
    status = status_of(error)
    return HTTPStatus.UNPROCESSABLE_ENTITY if status is HTTPStatus.BAD_REQUEST else status


def _write(error: Exception) -> DetectorError:
    return DetectorError(code=_status(error), message=message_of(error))


_ERRORS = Errors(DetectorError, _write, _status)
ENDPOINTS = (
    post(
        "/api/v1/text/contents",
        "Detect risks in texts",
        ContentsRequest,
        ContentsDetections,
        judge_contents,
        header=_HEADER,
        errors=_ERRORS,
    ),
    post(
        "/api/v1/text/chat",
        "Detect risks in a conversation",
        ChatRequest,
        Detections,
        judge_chat,
        header=_HEADER,
        errors=_ERRORS,
    ),
    post(
        "/api/v1/text/generation",
        "Detect risks in what was generated",
        GenerationRequest,
        Detections,
        judge_generation,
        header=_HEADER,
        errors=_ERRORS,
    ),
)
