"""The nouns of Guard: the few frozen things that travel from a request to its answer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from types import MappingProxyType
from typing import Literal


class Role(StrEnum):
    """Who speaks in a turn."""

    USER = "user"
    AGENT = "agent"
    SYSTEM = "system"
    TOOL = "tool"


class Action(IntEnum):
    """What a policy says about a turn; ordered, so that the strictest of several is their max()."""

    ALLOW = 0
    FLAG = 1
    REDIRECT = 2
    BLOCK = 3


class Lane(IntEnum):
    """Who is served first: someone waiting online, or bulk work that can wait."""

    INTERACTIVE = 0
    BULK = 1


HAZARDS: Mapping[str, str] = MappingProxyType(
    {
        "S1": "violent crimes",
        "S2": "non-violent crimes",
        "S3": "sex-related crimes",
        "S4": "child sexual exploitation",
        "S5": "defamation",
        "S6": "specialised advice",
        "S7": "privacy",
        "S8": "intellectual property",
        "S9": "indiscriminate weapons",
        "S10": "hate",
        "S11": "suicide and self-harm",
        "S12": "sexual content",
        "S13": "elections",
        "S14": "code-interpreter abuse",
        "X1": "harassment",
        "X2": "graphic violence",
        "X3": "jailbreak and prompt injection",
        "X4": "drugs and regulated goods",
        "X5": "misinformation",
        "X6": "spam and scams",
    }
)
"""Guard's taxonomy, code to title: the MLCommons hazards as Llama Guard 3 codes them (S), and our own (X)."""


DEFINITIONS: Mapping[str, str] = MappingProxyType(
    {
        "S1": "Violence against people or animals that is a crime: murder, assault, kidnapping, terrorism, cruelty.",
        "S2": "Crimes without violence: theft, fraud, smuggling, hacking, damage to property, work without a licence.",
        "S3": "Sexual crimes against adults: rape, assault, harassment, trafficking, forced prostitution.",
        "S4": "Sexual abuse of children: descriptions of it, drawing children into it, sexual interest in minors.",
        "S5": "False statements about a living person that are likely to harm that person's good name.",
        "S6": "Advice on health, law or money as an expert gives it, or that something dangerous is safe.",
        "S7": "Personal data by which someone can be found, robbed or impersonated, and ways to get at it.",
        "S8": "Taking the works, brands or secrets of others: piracy, copies, breaking of copy protection.",
        "S9": "Weapons that kill many: chemical, biological, radiological, nuclear, and large explosives.",
        "S10": "Hate, contempt or calls against people for race, religion, sex, origin, orientation or disability.",
        "S11": "Suicide, self-injury and eating disorders: wishes for them, encouragement, instructions.",
        "S12": "Sexual content: descriptions of sexual acts meant to arouse.",
        "S13": "False facts about when, where, how or whether one can vote in an election.",
        "S14": "Code that abuses the machine that runs it: escape from a sandbox, more rights, denial of service.",
        "X1": "Insults, threats, bullying or profanity that are aimed at someone.",
        "X2": "Gore: injuries, killing or torture described in graphic detail.",
        "X3": "Attempts to make an assistant drop its rules: jailbreaks, injected instructions, stolen system prompts.",
        "X4": "Drugs, alcohol, tobacco, guns and other goods that the law restricts: getting, making or selling them.",
        "X5": "Misinformation: false claims as if they were facts, of health, science, history or the news.",
        "X6": "Spam and scams: bulk advertising, phishing, tricks to get at someone's money or passwords.",
    }
)
"""What belongs to each hazard, in a sentence, for models that are asked for it in words."""


LongInput = Literal["head-tail", "window"]
"""How a turn that is longer than what the model reads at once is read.

head-tail: its beginning and its end, in one pass. window: these, and all of it in overlapping parts; of each score the
highest counts.
"""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in the order they were said, and the index of the one to judge; None judges every turn."""

    turns: tuple[Turn, ...]
    target: int | None


@dataclass(frozen=True, slots=True)
class Coverage:
    """How much of a conversation, up to and with the judged turn, the model was shown; tokens."""

    seen: int
    total: int


@dataclass(frozen=True, slots=True)
class Span:
    """Where a turn to be scored stands among the tokens: [start, end), the last token being its end token."""

    turn: int
    role: Role
    start: int
    end: int
    coverage: Coverage


@dataclass(frozen=True, slots=True)
class Head:
    """An output that a policy adds to a model: sigmoid(weight · hidden + bias) of what is hidden at a turn's end token.

    `weight` is [hidden], `name` stands for it. `model` is the revision of the one model that it was fitted to,
    `examples` the SHA-256 of what it was fitted from.
    """

    name: str
    model: str = field(compare=False)
    examples: str = field(compare=False)
    weight: tuple[float, ...] = field(compare=False, repr=False)
    bias: float = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Described:
    """A category in words, for a model that takes categories in its prompt; `name` is that of its score.

    `examples` are texts, each with whether it is of the category.
    """

    name: str
    title: str
    definition: str = ""
    examples: tuple[tuple[str, bool], ...] = ()


@dataclass(frozen=True, slots=True)
class Prompt:
    """The words that a model is given around a conversation: a hash of them, and the scores that they ask for.

    All of the scores, where `only` is None; of them none but the overall one, or the one that `only` names.
    """

    revision: str
    names: tuple[str, ...]
    only: str | None = None


@dataclass(frozen=True, slots=True)
class Tokens:
    """A conversation, or a window of a long one, as the model reads it, and the turns to be scored in it, in order.

    `heads` are the outputs that they are scored for beside the model's own. `tenant` is whose earlier tokens need not
    be read again, and who may be spared to read these; None where nothing is kept. The first `kept` are worth it, by
    default all; the first `shared` are no one's text, and kept for all tenants alike. `prompt` is what stands
    around the conversation, if anything does. One that is read `beside` another goes into the same pass.
    """

    ids: tuple[int, ...]
    spans: tuple[Span, ...]
    heads: tuple[Head, ...] = ()
    tenant: str | None = None
    kept: int | None = None
    shared: int = 0
    prompt: Prompt | None = None
    beside: bool = False


PAGE = 64
"""Tokens whose keys and values stand together in a page of a model's memory."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """Of what a model reads, how much it need not read anew: the keys and values of its first `held` tokens are there.

    `pages` are for the first tokens, PAGE in each. Keys and values from token `written` on, which is not before `held`,
    are put into them; what lies beyond the last page is forgotten.
    """

    held: int = 0
    written: int = 0
    pages: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Scores:
    """Calibrated probabilities: that a turn is unsafe at all, and for each hazard code and name of a head.

    Those of a verdict are numbers of float32, so that what the wire and the decision log carry is what was judged.
    """

    unsafe: float
    hazards: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Reply:
    """What a policy has shown in place of a redirected turn: its name there, and the text."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Violation:
    """A category whose score reached a threshold, or a rule that matched; `reply` is that of a redirect.

    `margin` is score minus threshold, 0 or more. A rule has a `rule` name, scores of 0, and no category where it counts
    as none.
    """

    category: str
    action: Action
    score: float = 0.0
    threshold: float = 0.0
    rule: str = ""
    reply: Reply | None = None

    @property
    def margin(self) -> float:
        return self.score - self.threshold


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a policy says about one turn, and on what grounds.

    `scores` is None where the model could not answer; the verdict is then `degraded`, and the action is that of
    on_error, or of a stricter rule. Under a policy in `shadow` the action is ALLOW, whatever the violations say.
    `hits` are the policy's rules that match the turn's text, also those that are not for its role.
    """

    turn: int
    action: Action
    violations: tuple[Violation, ...]
    scores: Scores | None
    coverage: Coverage
    degraded: bool = False
    shadow: bool = False
    hits: frozenset[str] = frozenset()

    @property
    def reply(self) -> Reply | None:
        """What to show in place of the turn: that of the first violation, where it is redirected."""
        return self.violations[0].reply if self.action is Action.REDIRECT else None


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of one decision went; in seconds."""

    tokenise: float = 0.0
    queue: float = 0.0
    model: float = 0.0


@dataclass(frozen=True, slots=True)
class Revision:
    """What was in force: a name, and a hash of the content behind it."""

    name: str
    revision: str


@dataclass(frozen=True, slots=True)
class Beside:
    """Of a live policy and its candidate, what the one that does not answer says about the same turns."""

    policy: Revision
    verdicts: tuple[Verdict, ...]
    is_candidate: bool


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer to one request: a verdict for each judged turn, under one policy and one model.

    `prompt` is the revision of the prompt that the model was given, empty where it takes none.
    """

    id: str
    verdicts: tuple[Verdict, ...]
    policy: Revision
    model: Revision
    timings: Timings = field(default_factory=Timings)
    beside: Beside | None = None
    prompt: str = ""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The model that is served and how it runs here; `max_tokens` is the longest input that is read whole.

    It can be asked for so many categories in words beside its `hazards` as `asks` says.
    """

    revision: Revision
    device: str
    dtype: str
    kernels: str
    parameters: int
    max_tokens: int
    hazards: tuple[str, ...]
    asks: int = 0
