"""OpenAI's POST /v1/moderations: any of its clients, with another base URL."""

from collections.abc import Collection, Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from guard.errors import InputError
from guard.policy.compile import Policy
from guard.service.http.endpoint import Asked, alone, post
from guard.types import Action, Role, Scores, Turn, Verdict

Category = Literal[
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/intent",
    "self-harm/instructions",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
]
# Each category of OpenAI's, by the hazards that it is: of a group one will do, of several groups each must have one.
# What OpenAI does not judge (defamation, advice, privacy, property, elections, jailbreaks, misinformation, spam) makes
# an input `flagged`, and no category true. Of self-harm there is one score, whatever is meant by it.
MAPPING: Mapping[Category, tuple[tuple[str, ...], ...]] = {
    "harassment": (("X1",),),
    "harassment/threatening": (("X1",), ("S1",)),
    "hate": (("S10",),),
    "hate/threatening": (("S10",), ("S1",)),
    "illicit": (("S2", "S9", "S14", "X4"),),
    "illicit/violent": (("S1", "S9"),),
    "self-harm": (("S11",),),
    "self-harm/intent": (("S11",),),
    "self-harm/instructions": (("S11",),),
    "sexual": (("S3", "S12"),),
    "sexual/minors": (("S4",),),
    "violence": (("S1", "X2"),),
    "violence/graphic": (("X2",),),
}


_ALL = Field(min_length=len(MAPPING))


class Text(BaseModel):
    type: Literal["text"]
    text: str


class ImageUrl(BaseModel):
    url: str


class Image(BaseModel):
    type: Literal["image_url"]
    image_url: ImageUrl


_Part = Annotated[Text | Image, Field(discriminator="type")]


class ModerationRequest(BaseModel):
    """`model` may name a policy of Guard's; whatever else stands there is judged by the default policy."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    input: str | Annotated[list[str], Field(min_length=1)] | Annotated[list[_Part], Field(min_length=1)]
    """A text, texts that are judged each by itself, or the parts of one; images cannot be judged, and are refused."""
    model: str = ""


class ModerationResult(BaseModel):
    """What is said of one input."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    flagged: bool
    """The policy flags, redirects or blocks it."""
    categories: Annotated[dict[Category, bool], _ALL]
    """Whether the policy found, and flags, what the category is made of."""
    category_scores: Annotated[dict[Category, float], _ALL]
    """Calibrated probabilities; 0 of hazards that the model does not score."""
    category_applied_input_types: Annotated[dict[Category, list[Literal["text"]]], _ALL]


class ModerationResponse(BaseModel):
    """A result for each input; `id` is that of the first decision."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    model: str
    """Name and revision of the model."""
    results: list[ModerationResult]


async def moderate(asked: Asked, request: ModerationRequest) -> ModerationResponse:
    """Each input is a user turn by itself."""
    before = asked.policies
    policy = request.model if request.model in before.by_name else ""
    texts = _texts(request)
    decisions = await asked.judge_each([alone(Turn(Role.USER, text)) for text in texts], policy=policy)
    model = decisions[0].model
    return ModerationResponse(
        id=f"modr-{decisions[0].id}",
        model=f"{model.name}@{model.revision}",
        results=[_result(decision.verdicts[0], asked.policy_of(decision, before)) for decision in decisions],
    )


def _texts(request: ModerationRequest) -> list[str]:
    """The inputs. Raises InputError for images."""
    given = request.input
    if isinstance(given, str):
        return [given]
    parts = [part for part in given if not isinstance(part, str)]
    for index, part in enumerate(parts):
        if isinstance(part, Image):
            raise InputError(f"input[{index}]", "is an image, and only text can be judged")
    texts = [part if isinstance(part, str) else part.text for part in given if not isinstance(part, Image)]
    return ["\n".join(texts)] if parts else texts


def _result(verdict: Verdict, policy: Policy) -> ModerationResult:
    flagged = verdict.action >= Action.FLAG
    found = found_hazards(verdict, policy) if flagged else frozenset()
    return ModerationResult(
        flagged=flagged,
        categories={name: all(found.intersection(group) for group in groups) for name, groups in MAPPING.items()},
        category_scores={name: _score(verdict.scores, groups) for name, groups in MAPPING.items()},
        category_applied_input_types={name: ["text"] for name in MAPPING},
    )


def _score(scores: Scores | None, groups: Collection[Collection[str]]) -> float:
    """The lowest of the groups' scores, each the highest of its hazards'; a degraded verdict has none."""
    hazards = scores.hazards if scores else {}
    return min(max(hazards.get(code, 0.0) for code in group) for group in groups)


def found_hazards(verdict: Verdict, policy: Policy) -> frozenset[str]:
    """Of each violated category the hazards whose own score reaches its threshold, or the highest where none does."""
    hazards = {category.name: category.hazards for category in policy.categories}
    scores = verdict.scores.hazards if verdict.scores else {}
    found: set[str] = set()
    for violation in verdict.violations:
        codes = hazards.get(violation.category, ())
        reached = [code for code in codes if scores.get(code, 0.0) >= violation.threshold]
        found.update(reached or sorted(codes, key=lambda code: -scores.get(code, 0.0))[:1])
    return frozenset(found)


ENDPOINTS = (
    post(
        "/v1/moderations",
        "Judge texts as OpenAI's moderation endpoint does",
        ModerationRequest,
        ModerationResponse,
        moderate,
    ),
)
