"""A policy as its owner writes it: the keys of the YAML file, what they mean and what they may hold.

The language has one way to say a thing; nothing is inherited, and a role that is not named is not judged. What the
parts of a file ask of each other is in guard.policy.check.
"""

import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from guard.types import HAZARDS, LongInput

ON_ERROR: Mapping[str, Literal["allow", "block"]] = MappingProxyType(
    {"user": "allow", "agent": "block", "system": "allow", "tool": "block"}
)
"""What is answered when the model cannot, unless a policy says otherwise; `PolicySpec.on_error` tells why."""


NAME = r"[a-z][a-z0-9-]*"
OWN_HAZARD = rf"(?!unsafe$){NAME}"
"""What a model may call a category that it was taught beside the taxonomy, see guard.training.head."""
EXAMPLES = r"[\w-][\w.-]*\.(csv|jsonl)(\.gz)?"
"""How a file of examples is named, which lies beside the policy."""
FRAGMENT = rf"{NAME}_include\.yaml"
"""How a file is named that policies of its directory include."""

TAGS = frozenset({"<mapping>", "<other>"})
"""Parts of pydantic's paths that stand for no key of the file: which of two forms was taken."""


def _form(value: object) -> str:
    return "<mapping>" if isinstance(value, dict) else "<other>"


def _hazard(code: str) -> str:
    if code not in HAZARDS and not re.fullmatch(OWN_HAZARD, code):
        known = (*HAZARDS, "the name of a category of the model's own")
        raise PydanticCustomError("hazard", "a hazard code", {"known": known})
    return code


def _examples(name: str) -> str:
    if not re.fullmatch(EXAMPLES, name):
        raise PydanticCustomError("examples", "a .csv or .jsonl file beside the policy")
    return name


def _something(value: object) -> object:
    """A key that may be left out, but does not stand there for nothing."""
    if value is None:
        raise PydanticCustomError("nothing", "a value")
    return value


Name = Annotated[str, Field(pattern=f"^{NAME}$")]
Text = Annotated[str, Field(min_length=1)]
RoleName = Literal["user", "agent", "system", "tool"]
Mode = Literal["enforce", "shadow"]
Scoring = Literal["max", "weighted", "any", "unsafe", "asked"]
HazardCode = Annotated[
    str,
    AfterValidator(_hazard),
    Field(json_schema_extra={"anyOf": [{"enum": list(HAZARDS)}, {"pattern": f"^{OWN_HAZARD}$"}]}),
]
Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Target = Annotated[dict[Literal["max_fpr", "min_recall"], Share], Field(min_length=1, max_length=1)]
Threshold = Annotated[
    Annotated[Target, Tag("<mapping>")] | Annotated[Probability, Tag("<other>")],
    Discriminator(_form),
    Field(
        description="From which score on: a number from 0 to 1, or {max_fpr: x}, the lowest score that at most a share "
        "x of harmless turns reaches, or {min_recall: x}, the highest score that at least a share x of harmful turns "
        "reaches; both as measured on the model."
    ),
]


class Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, str_strip_whitespace=True)


class RedirectSpec(Spec):
    """A score from which on a turn is answered with a reply of the policy."""

    at: Threshold
    reply: Name = Field(description="A name of the policy's `replies`.")


class ThresholdsSpec(Spec):
    """Actions, from mild to strict, and the scores that they are taken from."""

    flag: Annotated[Threshold | None, BeforeValidator(_something)] = Field(
        default=None, description="The turn passes, and the verdict says what was found."
    )
    redirect: Annotated[RedirectSpec | None, BeforeValidator(_something)] = Field(
        default=None, description="The turn does not pass; a reply of the policy is to be shown in its place."
    )
    block: Annotated[Threshold | None, BeforeValidator(_something)] = Field(
        default=None, description="The turn does not pass."
    )

    def steps(self) -> tuple[tuple[Literal["flag", "redirect", "block"], Any, str | None], ...]:
        """(action, threshold, name of a reply) of each action that is written, from mild to strict."""
        redirect = self.redirect
        steps = (
            ("flag", self.flag, None),
            ("redirect", redirect and redirect.at, redirect and redirect.reply),
            ("block", self.block, None),
        )
        return tuple(step for step in steps if step[1] is not None)  # type: ignore[misc]  # literals in a tuple


def _any(thresholds: ThresholdsSpec) -> ThresholdsSpec:
    if not thresholds.steps():
        raise PydanticCustomError("too_short", "at least one")
    return thresholds


class CategorySpec(Spec):
    """One thing that the policy looks for."""

    title: Text = Field(description="What people are shown, e.g. 'Suicide and self-harm'.")
    definition: Text = Field(default="", description="What belongs to the category and what does not, in a sentence.")
    score: Scoring = Field(
        default="max",
        description="max: the highest score of the category's hazards. weighted: the sum of their scores by their "
        "weights, at most 1. any: the probability that at least one of them holds, were they independent, "
        "1 - (1 - p1)(1 - p2)…. unsafe: the model's overall score, that a turn is unsafe in any way; such a category "
        "lists no hazards. asked: what a Llama Guard checkpoint says when it is asked for the category by its title "
        "and definition; such a category lists no hazards either.",
    )
    examples: Annotated[
        str | None,
        BeforeValidator(_something),
        AfterValidator(_examples),
        Field(json_schema_extra={"type": "string", "pattern": f"^{EXAMPLES}$"}),
    ] = Field(
        default=None,
        description="A file beside the policy, .csv or .jsonl, of some 200 turns that are labelled 1 where they are of "
        "the category and 0 where they are not; in place of hazards. `guard policy fit` teaches the model from them; "
        "a Llama Guard checkpoint is shown a few.",
    )
    hazards: Annotated[
        Annotated[dict[HazardCode, Weight], Tag("<mapping>")] | Annotated[tuple[HazardCode, ...], Tag("<other>")],
        Discriminator(_form),
    ] = Field(
        default=(),
        validate_default=True,
        description="What feeds the category: codes of the model's taxonomy, and names of categories that it was "
        "taught beside them; for `score: weighted` a mapping of each to its weight.",
    )
    thresholds: dict[RoleName, Annotated[ThresholdsSpec, AfterValidator(_any)]] = Field(
        min_length=1,
        description="For each role that is judged, the scores from which on a turn is flagged, redirected or blocked. "
        "A turn of a role that is not named is never judged in this category. Name `tool` where text from outside (web "
        "pages, documents, answers of other systems) could steer the agent; name `system` where its text is not all "
        "your own.",
    )

    @field_validator("hazards")
    @classmethod
    def _feeds(cls, hazards: Any, info: ValidationInfo) -> Any:
        score = info.data.get("score")  # absent where it is itself wrong
        if "examples" not in info.data:
            return hazards
        if info.data["examples"]:
            if hazards or score not in ("max", None):
                raise PydanticCustomError("feeds", "neither hazards nor another score beside `examples`")
            return hazards
        if score in ("unsafe", "asked") and hazards:
            raise PydanticCustomError("feeds", f"no hazards beside `score: {score}`")
        if score == "weighted" and not (isinstance(hazards, dict) and hazards):
            raise PydanticCustomError("feeds", "a mapping of hazard codes to weights, such as {S1: 0.7, X2: 0.3}")
        if score in ("max", "any") and isinstance(hazards, dict):
            raise PydanticCustomError("feeds", "a list of hazard codes, or `score: weighted` beside their weights")
        if score in ("max", "any") and not hazards:
            raise PydanticCustomError("feeds", "hazard codes, or `examples` or `score: unsafe` in their place")
        if len(set(hazards)) < len(hazards):
            raise PydanticCustomError("repeated", "each hazard once", {"found": ", ".join(hazards)})
        return hazards


class RuleSpec(Spec):
    """Something that is looked for in the text of the judged turn itself, whatever the model says of it."""

    terms: tuple[Text, ...] = Field(
        default=(),
        description="Words, or several of them in a row; matched as whole words, whatever their case, accents and the "
        "punctuation between them.",
    )
    pattern: Text | None = Field(
        default=None,
        description="A regular expression of RE2, in place of terms; (?i) at its start ignores case.",
    )
    exceptions: tuple[Text, ...] = Field(
        default=(),
        alias="except",
        description="What a match of this rule may be part of without counting, matched as terms are.",
    )
    roles: tuple[RoleName, ...] = Field(min_length=1, description="Whose turns are looked at.")
    action: Literal["flag", "redirect", "block"]
    reply: Name | None = Field(default=None, description="Of `action: redirect`: a name of the policy's `replies`.")
    category: Name | None = Field(default=None, description="The category of the policy that a match counts as.")

    @model_validator(mode="after")
    def _is_whole(self) -> "RuleSpec":
        if bool(self.terms) == (self.pattern is not None):
            found = "both" if self.terms else "neither"
            raise PydanticCustomError("rule", "terms, or a pattern in their place", {"found": found})
        if self.action == "redirect" and self.reply is None:
            raise PydanticCustomError("rule", "a reply beside `action: redirect`", {"found": "none"})
        if self.action != "redirect" and self.reply is not None:
            raise PydanticCustomError("rule", "a reply beside `action: redirect` alone", {"found": self.reply})
        return self


class OverlaySpec(Spec):
    """Other thresholds for some requests: those of one app, one tenant, one audience."""

    when: dict[Text, Text] = Field(
        min_length=1, description="What the request's metadata must hold, word for word; all of it."
    )
    thresholds: dict[Name, dict[RoleName, ThresholdsSpec]] = Field(
        min_length=1,
        description="By category and role, what stands in place of the category's thresholds there; {} judges nothing.",
    )


class StreamSpec(Spec):
    """When a turn that is still being written is cut: a verdict on half a sentence may turn with the next word."""

    consecutive: Annotated[int, Field(ge=1)] = Field(
        default=2,
        description="Cut after so many verdicts in a row that would redirect or block; after the last anyway.",
    )
    immediate: Probability = Field(
        default=0.6,
        description="Cut after a single one where a score has gone such a share of the way from its threshold to 1, or "
        "a rule matches.",
    )


class RefusalSpec(Spec):
    """How a filter in front of a backend says no; a redirect is always told as its reply."""

    form: Literal["error", "reply"] = Field(
        default="error",
        description="error: a blocked request is answered with an error of the backend's API. reply: it is answered as "
        "the backend would, with the text. A reply of the backend that is blocked ends as its content filters end one, "
        "and with the text where the form is reply.",
    )
    text: Text = Field(default="The content policy does not allow this.", description="What people are told.")


Replies = Annotated[
    dict[Name, Text], Field(description="Texts to show in place of a redirected turn, by names such as crisis-line.")
]
Rules = Annotated[
    dict[Name, RuleSpec], Field(description="What is looked for in the text itself, by names such as our-secrets.")
]
Categories = Annotated[
    dict[Name, CategorySpec], Field(description="What the policy looks for, by names such as self-harm.")
]


class FragmentSpec(Spec):
    """A file that policies include; its name ends in _include.yaml."""

    replies: Replies = Field(default_factory=dict)
    rules: Rules = Field(default_factory=dict)
    categories: Categories = Field(default_factory=dict)


class PolicySpec(Spec):
    """A policy file; its name is the file's."""

    description: Text = Field(description="Whom the policy is for, in a sentence or two.")
    include: tuple[Annotated[str, Field(pattern=f"^{FRAGMENT}$")], ...] = Field(
        default=(),
        description="Files of the same directory, NAME_include.yaml, whose replies, rules and categories are added.",
    )
    mode: Mode = Field(
        default="enforce",
        description="shadow: turns are judged and violations told, but the action is always allow.",
    )
    history: Annotated[int | None, BeforeValidator(_something), Field(ge=0)] = Field(
        default=None,
        description="How many earlier turns the model reads as context; all that fit, where it is not written.",
    )
    long_input: LongInput = Field(
        default="head-tail",
        description="How a turn that is longer than the model reads at once is read. head-tail: its beginning and its "
        "end, in one pass. window: these, and all of it in overlapping parts; of each score the highest counts.",
    )
    on_error: dict[RoleName, Literal["allow", "block"]] = Field(
        default_factory=dict,
        description="What to answer, for each role, when the model cannot. By default turns of users and of the system "
        "are allowed, since the agent's answer to them is judged again; turns of the agent are blocked, since nothing "
        "stands between them and the reader, and turns of tools, since nothing stands between them and the agent.",
    )
    stream: StreamSpec = Field(
        default_factory=StreamSpec, description="When a turn that is still being written is cut."
    )
    refusal: RefusalSpec = Field(
        default_factory=RefusalSpec, description="How a filter in front of a backend says no in its place."
    )
    replies: Replies = Field(default_factory=dict)
    rules: Rules = Field(default_factory=dict)
    categories: Categories = Field(default_factory=dict)
    overlays: tuple[OverlaySpec, ...] = Field(
        default=(), description="Other thresholds for some requests; of several that apply, later ones win."
    )


def json_schema() -> str:
    """The JSON Schema of a policy file, for editors; what parts of a policy ask of each other it cannot say."""
    schema = PolicySpec.model_json_schema() | {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"
