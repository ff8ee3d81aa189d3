"""What a model is to read of a conversation for its policies, and what these say of the scores: without any waiting."""

from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from typing import NamedTuple

from guard.model.kinds import Classifier
from guard.model.normalise import undisguise
from guard.policy.compile import Policy
from guard.policy.decide import decide, decide_without_scores
from guard.policy.heads import check_model
from guard.types import (
    Conversation,
    Described,
    Head,
    LongInput,
    Role,
    Scores,
    Span,
    Tokens,
    Turn,
    Verdict,
)


class Way(NamedTuple):
    """How a policy has conversations read; policies that go the same way are judged from the same scores."""

    asked: tuple[Described, ...]
    history: int | None
    long_input: LongInput


class Pass(NamedTuple):
    """Windows that go through the model together."""

    way: Way
    windows: tuple[Tokens, ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """The passes that it takes to judge a conversation by some policies.

    Where a text is disguised, a view of the conversation without disguises is read beside the one as it is, and each
    score is the higher of the two; the coverage, which `spans` tell by way and turn, is that of the conversation as it
    is. `hits` are the rules that match in either view, by turn and policy.
    """

    conversation: Conversation
    policies: tuple[Policy, ...]
    ways: tuple[Way, ...]
    passes: tuple[Pass, ...]
    spans: Mapping[Way, Mapping[int, Span]]
    hits: Mapping[int, tuple[frozenset[str], ...]]

    @property
    def prompt(self) -> str:
        """Revision of the words around what the first policy has read; empty where there are none."""
        prompt = next(each.windows[0].prompt for each in self.passes if each.way == self.ways[0])
        return prompt.revision if prompt else ""

    def verdicts(
        self, scores: Sequence[Sequence[Scores] | None], metadata: Mapping[str, str]
    ) -> list[tuple[Verdict, ...]]:
        """By each policy those on the judged turns, from the scores of the spans of each pass; None where it failed."""
        found: dict[Way, dict[int, list[Scores | None]]] = {way: defaultdict(list) for way in self.ways}
        for each, own in zip(self.passes, scores, strict=True):
            spans = [span for tokens in each.windows for span in tokens.spans]
            for span, score in zip(spans, [None] * len(spans) if own is None else own, strict=True):
                found[each.way][span.turn].append(score)
        highest = {way: {turn: _highest(own) for turn, own in turns.items()} for way, turns in found.items()}
        return [
            tuple(
                _verdict(
                    policy,
                    self.conversation.turns[turn].role,
                    span,
                    highest[way][turn],
                    self.hits[turn][place],
                    metadata,
                )
                for turn, span in self.spans[way].items()
            )
            for place, (policy, way) in enumerate(zip(self.policies, self.ways, strict=True))
        ]


class Reader:
    """Makes readings for one model."""

    def __init__(self, classifier: Classifier) -> None:
        self._tokenise = classifier.tokenise
        self._model = classifier.info

    def check(self, policies: Iterable[Policy]) -> None:
        """Raises PolicyError for a policy that this model cannot serve."""
        for policy in policies:
            check_model(policy, self._model)
            if asked := self._way(policy).asked:  # which must leave room for a conversation
                self._tokenise(Conversation((Turn(Role.USER, ""),), 0), policy.long_input, asked)

    def read(self, conversation: Conversation, policies: Sequence[Policy], heads: tuple[Head, ...]) -> Reading:
        """What is to be read for all of the policies. Raises InputError where a text is not valid Unicode."""
        turns = tuple(replace(turn, text=undisguise(turn.text)) for turn in conversation.turns)
        undisguised = replace(conversation, turns=turns)
        ways = tuple(map(self._way, policies))
        passes: list[Pass] = []
        spans = {}
        for way in dict.fromkeys(ways):
            raw = self._windows(conversation, way, heads)
            plain = () if turns == conversation.turns else self._windows(undisguised, way, heads)
            further = [tokens for tokens in plain if tokens not in raw]
            together = zip_longest(_passes(raw), _passes(further), fillvalue=())
            passes += (Pass(way, tuple(chain(*windows))) for windows in together)
            # The parts of a long turn say the same of it.
            spans[way] = {span.turn: span for tokens in raw for span in tokens.spans}
        judged = range(len(turns)) if conversation.target is None else (conversation.target,)
        hits = {
            turn: tuple(policy.matcher.hits({conversation.turns[turn].text, turns[turn].text}) for policy in policies)
            for turn in judged
        }
        return Reading(conversation, tuple(policies), ways, tuple(passes), spans, hits)

    def _way(self, policy: Policy) -> Way:
        """It is asked for in words what the model has no score of its own for."""
        asked = (one for one in policy.described if one.name not in self._model.hazards) if self._model.asks else ()
        return Way(tuple(asked), policy.history, policy.long_input)

    def _windows(self, conversation: Conversation, way: Way, heads: tuple[Head, ...]) -> tuple[Tokens, ...]:
        """The windows to read; of each judged turn one of its own, where only so many turns before it are context."""
        if way.history is None:
            windows: Iterable[Tokens] = self._tokenise(conversation, way.long_input, way.asked)
        else:
            every = range(len(conversation.turns)) if conversation.target is None else (conversation.target,)
            windows = (tokens for turn in every for tokens in self._window(conversation, turn, way.history, way))
        return tuple(replace(tokens, heads=heads) for tokens in windows)

    def _window(self, conversation: Conversation, turn: int, history: int, way: Way) -> Iterator[Tokens]:
        first = max(0, turn - history)
        alone = Conversation(conversation.turns[first : turn + 1], turn - first)
        for tokens in self._tokenise(alone, way.long_input, way.asked):
            yield replace(tokens, spans=tuple(replace(span, turn=turn) for span in tokens.spans))


def _passes(windows: Iterable[Tokens]) -> Iterator[tuple[Tokens, ...]]:
    """The windows, those together that are to be read in one pass."""
    together = list[Tokens]()
    for tokens in windows:
        if together and not tokens.beside:
            yield tuple(together)
            together = []
        together.append(tokens)
    if together:
        yield tuple(together)


def _highest(readings: Sequence[Scores | None]) -> Scores | None:
    """The highest of each score, rounded to float32; None where a reading has none."""
    scores = [own for own in readings if own is not None]
    if len(scores) < len(readings):
        return None
    codes = scores[0].hazards
    highest = [max(own.unsafe for own in scores), *(max(own.hazards[code] for own in scores) for code in codes)]
    unsafe, *hazards = array("f", highest)
    return Scores(unsafe, dict(zip(codes, hazards, strict=True)))


def _verdict(
    policy: Policy,
    role: Role,
    span: Span,
    scores: Scores | None,
    hits: frozenset[str],
    metadata: Mapping[str, str],
) -> Verdict:
    if scores is None:
        judged = decide_without_scores(policy, role, hits)
    else:
        judged = decide(policy, role, scores, hits, metadata)
    return Verdict(span.turn, *judged, scores, span.coverage, degraded=scores is None, shadow=policy.shadow, hits=hits)
