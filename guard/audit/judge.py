"""From a window of conversations to rows: made ready, scored and told, each of which may run on a thread of its own."""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple, Protocol

import pyarrow as pa

from guard.audit.pack import pack
from guard.audit.records import Position, Record, Reject, Window
from guard.audit.schema import Row, schema, table
from guard.audit.stop import Stop
from guard.engine.reading import Pass, Reader, Reading
from guard.errors import InputError, ModelFailed
from guard.model.kinds import Classifier
from guard.policy.compile import Policy
from guard.policy.store import PolicyStore
from guard.types import Action, Conversation, Revision, Scores

_LOOK_AHEAD = 32 * 4  # characters of a window for each token of a pass: some 32 passes, which are then all but full
_REMEMBERED = 32 * 2**20  # bytes of scores that are kept, for texts that come again: some 100,000 of one turn
_ENTRY = 200  # bytes that each pass takes beside its scores

Digest = bytes
_Found = Sequence[Scores] | None  # None where the model failed


class Judged(NamedTuple):
    """What a window came to. `rows` are those of guard.audit.schema, of which so many are `refused`: not allowed.

    `tokens` are what the model was given to read. `end` and `read` are the window's.
    """

    rows: pa.Table
    rejects: tuple[Reject, ...]
    conversations: int
    refused: int
    tokens: int
    end: Position
    read: float | None


class Source(Protocol):
    """Whatever gives windows of conversations from a position on, each of about so many characters of text."""

    def windows(self, start: Position, characters: int) -> Iterator[Window]: ...


class Judging(Protocol):
    """Whatever judges what a source gives from a position on, in that order; its rows are of that schema.

    It may raise Stopped where that is asked for, after the windows that are judged already.
    """

    schema: pa.Schema

    def judged(self, source: Source, start: Position, stop: Stop) -> Iterator[Judged]: ...


class _Ready(NamedTuple):
    """A record that is ready for the model, with a digest for each of its passes."""

    record: Record
    policy: Policy
    reading: Reading
    digests: tuple[Digest, ...]


class Prepared(NamedTuple):
    """A window that is ready for the model, and what is to be read for it, each thing once."""

    window: Window
    items: tuple[_Ready | Reject, ...]
    passes: Mapping[Digest, Pass]


class Scored(NamedTuple):
    """Scores of the passes of a window."""

    prepared: Prepared
    scores: Mapping[Digest, _Found]
    tokens: int


class Judge:
    """Judges windows by one model, whose thread is the only one that may call `score`.

    `window` is how many characters one should have. Conversations that were read before, word for word, are not read
    again.
    """

    def __init__(
        self,
        classifier: Classifier,
        policies: PolicyStore,
        *,
        max_batch_tokens: int,
        by_row: bool = False,
        compare: Policy | None = None,
        text: bool = False,
    ) -> None:
        """The default policy judges; where it goes `by_row`, for rows that name no other. `compare` judges beside it.

        `text` is whether texts stand in the rows. Raises PolicyError for a policy that this model cannot serve.
        """
        self._policies = policies
        self._by_row = by_row
        self._compare = () if compare is None else (compare,)
        judging = (*policies.policies, *self._compare)
        self._reader = Reader(classifier)
        self._reader.check(judging)
        self._score = classifier.score
        self._model = classifier.info.revision
        self._max_batch_tokens = max_batch_tokens
        self.window = _LOOK_AHEAD * max_batch_tokens
        self._heads = tuple({head: None for policy in judging for head in policy.own.values() if head})
        self._asked = {pair for policy in judging for overlay in policy.overlays for pair in overlay.when}
        described = [one.name for policy in judging for one in policy.described] if classifier.info.asks else []
        names = dict.fromkeys([*classifier.info.hazards, *(head.name for head in self._heads), *described])
        self.schema = schema(tuple(names), text=text, compared=compare is not None)
        self._known = Remembered(_REMEMBERED)

    def prepare(self, window: Window) -> Prepared:
        """What the model is to read of it; what cannot be judged becomes a reject."""
        items = tuple(item if isinstance(item, Reject) else self._ready(item) for item in window.items)
        passes = {
            digest: each
            for item in items
            if isinstance(item, _Ready)
            for digest, each in zip(item.digests, item.reading.passes, strict=True)
        }
        return Prepared(window, items, passes)

    def score(self, prepared: Prepared, stop: Stop) -> Scored:
        """Has the model read what it has not read before, in passes that are as full as can be.

        Raises ModelFailed where it fails for everything in a pass, one by one: then it is the model that is at fault.
        Raises Stopped between two passes.
        """
        scores: dict[Digest, _Found] = {digest: self._known.get(digest) for digest in prepared.passes}
        unknown = [(digest, prepared.passes[digest]) for digest, found in scores.items() if found is None]
        sizes = [sum(len(tokens.ids) for tokens in each.windows) for _, each in unknown]
        for places in pack(sizes, self._max_batch_tokens):
            stop.check()
            batch = [unknown[place][1] for place in places]
            for place, found in zip(places, self._read(batch), strict=True):
                scores[unknown[place][0]] = found
        for digest, found in scores.items():
            if found is not None:
                self._known.keep(digest, found)
        return Scored(prepared, scores, sum(sizes))

    def tell(self, scored: Scored) -> Judged:
        """The verdicts, as rows."""
        rows: list[Row] = []
        rejects: list[Reject] = []
        for item in scored.prepared.items:
            if isinstance(item, Reject):
                rejects.append(item)
            else:
                rows += self._rows(item, [scored.scores[digest] for digest in item.digests])
        window = scored.prepared.window
        return Judged(
            rows=table(rows, self.schema),
            rejects=tuple(rejects),
            conversations=len(scored.prepared.items) - len(rejects),
            refused=sum(row.verdict.action is not Action.ALLOW for row in rows),
            tokens=scored.tokens,
            end=window.end,
            read=window.read,
        )

    def _ready(self, record: Record) -> _Ready | Reject:
        try:
            policy = self._policies.get(record.policy if self._by_row else "")
            judging = (policy, *self._compare)
            reading = self._reader.read(Conversation(record.turns, None), judging, self._heads)
        except InputError as error:  # which names fields, and no text
            return Reject(record.place, str(error))
        return _Ready(record, policy, reading, tuple(map(_digest, reading.passes)))

    def _read(self, batch: Sequence[Pass]) -> list[_Found]:
        try:
            return self._pass(batch)
        except Exception as error:  # whatever the model raises, see guard.engine.batcher
            if len(batch) == 1:
                return [None]
            alone = [found for each in batch for found in self._read([each])]
            if not any(alone):
                raise ModelFailed(f"the model could not answer: {type(error).__name__}") from error
            return alone

    def _pass(self, batch: Sequence[Pass]) -> list[_Found]:
        scores = iter(self._score([tokens for each in batch for tokens in each.windows]))
        return [tuple(chain.from_iterable(next(scores) for _ in each.windows)) for each in batch]

    def _rows(self, item: _Ready, scores: Sequence[_Found]) -> Iterator[Row]:
        said, *other = item.reading.verdicts(scores, item.record.metadata)
        policy = Revision(item.policy.name, item.policy.revision)
        metadata = {key: value for key, value in item.record.metadata.items() if (key, value) in self._asked}
        for place, verdict in enumerate(said):
            compare = [
                (Revision(policy.name, policy.revision), verdicts[place])
                for policy, verdicts in zip(self._compare, other, strict=True)
            ]
            yield Row(item.record, verdict, policy, self._model, metadata, compare[0] if compare else None)


class Remembered:
    """The scores of passes that were read last, rounded to float32, as a verdict rounds them; in so many bytes."""

    def __init__(self, most: int) -> None:
        self._free = most
        self._names: dict[tuple[str, ...], tuple[str, ...]] = {}  # so that all hold the same
        self._kept: OrderedDict[Digest, tuple[tuple[str, ...], bytes]] = OrderedDict()

    def keep(self, digest: Digest, found: Sequence[Scores]) -> None:
        """Takes the scores of a pass, which have the same names; the one that was met longest ago may go."""
        if digest not in self._kept:
            names = tuple(found[0].hazards) if found else ()
            numbers = array("f", chain.from_iterable((one.unsafe, *one.hazards.values()) for one in found))
            self._kept[digest] = self._names.setdefault(names, names), numbers.tobytes()
            self._free -= _ENTRY + len(self._kept[digest][1])
        self._kept.move_to_end(digest)
        while self._free < 0:
            _, (_, gone) = self._kept.popitem(last=False)
            self._free += _ENTRY + len(gone)

    def get(self, digest: Digest) -> Sequence[Scores] | None:
        """The scores of a pass, where it is remembered."""
        if digest not in self._kept:
            return None
        names, numbers = self._kept[digest]
        values = iter(array("f", numbers))  # of which zip takes as many as there are names
        return [Scores(unsafe, dict(zip(names, values, strict=False))) for unsafe in values]


def _digest(each: Pass) -> Digest:
    """Of all that the scores of a pass depend on, within one run."""
    digest = hashlib.blake2b(digest_size=16)
    for tokens in each.windows:
        prompt = (tokens.prompt.revision, tokens.prompt.only) if tokens.prompt else None
        digest.update(repr((prompt, [(span.role, span.start, span.end) for span in tokens.spans])).encode())
        digest.update(array("I", tokens.ids))
    return digest.digest()
