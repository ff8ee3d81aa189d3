"""A policy as its owner writes it: the keys of the YAML file, what they mean and what they may hold.

The language has one way to say a thing; nothing is inherited, and a role that is not named is not judged.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from guard.types import HAZARDS

ON_ERROR: Mapping[str, Literal["allow", "block"]] = MappingProxyType(
    {"user": "allow", "agent": "block", "system": "allow", "tool": "block"}
)
"""What is answered when the model cannot, unless a policy says otherwise; `PolicySpec.on_error` tells why."""


NAME = r"[a-z][a-z0-9-]*"
OWN_HAZARD = rf"(?!unsafe$){NAME}"
"""What a model may call a category that it was taught beside the taxonomy, see guard.training.head."""


def _hazard(code: str) -> str:
    if code not in HAZARDS and not re.fullmatch(OWN_HAZARD, code):
        known = (*HAZARDS, "the name of a category of the model's own")
        raise PydanticCustomError("hazard", "a hazard code", {"known": known})
    return code


def _ascending(thresholds: dict[str, float]) -> dict[str, float]:
    flag, block = thresholds.get("flag", 0.0), thresholds.get("block", 1.0)
    if flag > block:
        raise PydanticCustomError("ascending", "flag to be at most block", {"found": f"flag {flag} and block {block}"})
    return thresholds


Name = Annotated[str, Field(pattern=f"^{NAME}$")]
Text = Annotated[str, Field(min_length=1)]
RoleName = Literal["user", "agent", "system", "tool"]
HazardCode = Annotated[
    str,
    AfterValidator(_hazard),
    Field(json_schema_extra={"anyOf": [{"enum": list(HAZARDS)}, {"pattern": f"^{OWN_HAZARD}$"}]}),
]
Probability = Annotated[float, Field(ge=0, le=1)]
Thresholds = Annotated[dict[Literal["flag", "block"], Probability], Field(min_length=1), AfterValidator(_ascending)]


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, str_strip_whitespace=True)


class CategorySpec(_Spec):
    """One thing that the policy looks for."""

    title: Text = Field(description="What people are shown, e.g. 'Suicide and self-harm'.")
    score: Literal["max", "unsafe"] = Field(
        default="max",
        description="max: the highest score of the category's hazards. unsafe: the model's overall score, that a turn "
        "is unsafe in any way; such a category lists no hazards.",
    )
    hazards: tuple[HazardCode, ...] = Field(
        default=(),
        validate_default=True,
        description="What feeds the category: codes of the model's taxonomy, and names of categories that it was "
        "taught beside them.",
    )
    thresholds: dict[RoleName, Thresholds] = Field(
        min_length=1,
        description="For each role that is judged, the score from which on a turn is flagged or blocked. A turn of a "
        "role that is not named is never flagged in this category. Name `tool` where text from outside (web pages, "
        "documents, answers of other systems) could steer the agent; name `system` where its text is not all your own.",
    )

    @field_validator("hazards")
    @classmethod
    def _feeds(cls, hazards: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        score = info.data.get("score")  # absent where it is itself wrong
        if score == "unsafe" and hazards:
            raise PydanticCustomError("feeds", "no hazards beside `score: unsafe`")
        if score == "max" and not hazards:
            raise PydanticCustomError("feeds", "hazard codes, or `score: unsafe` in their place")
        if len(set(hazards)) < len(hazards):
            raise PydanticCustomError("repeated", "each hazard once", {"found": ", ".join(hazards)})
        return hazards


class PolicySpec(_Spec):
    """A policy file; its name is the file's."""

    description: Text = Field(description="Whom the policy is for, in a sentence or two.")
    on_error: dict[RoleName, Literal["allow", "block"]] = Field(
        default_factory=dict,
        description="What to answer, for each role, when the model cannot. By default turns of users and of the system "
        "are allowed, since the agent's answer to them is judged again; turns of the agent are blocked, since nothing "
        "stands between them and the reader, and turns of tools, since nothing stands between them and the agent.",
    )
    categories: dict[Name, CategorySpec] = Field(
        min_length=1, description="What the policy looks for, by names such as self-harm."
    )
