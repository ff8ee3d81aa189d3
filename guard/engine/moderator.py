"""The way of a request, from a conversation to a decision."""

import asyncio
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from typing import Self

from guard.engine.batcher import Batcher, whole
from guard.engine.prefix_cache import Paged, PrefixCache
from guard.engine.reading import Reader
from guard.errors import ModelFailed
from guard.model.kinds import Classifier, load_classifier
from guard.policy.bundle import Signatures
from guard.policy.calibration import Calibration
from guard.policy.decide import NO_METADATA
from guard.policy.store import PolicyStore
from guard.settings import Settings
from guard.telemetry import Telemetry
from guard.types import (
    Beside,
    Conversation,
    Decision,
    Lane,
    ModelInfo,
    Revision,
    Role,
    Scores,
    Timings,
    Turn,
)

_BATCH_TOKENS = {
    "cpu": 512,
    "cuda": 4096,
    "remote": 16384,
}  # where larger batches hardly gain throughput, and only add waiting
_BULK_TOKENS = {**_BATCH_TOKENS, "cpu": 1024}  # a twentieth faster where nobody waits; not measured on the others
_TOKEN_CHARACTERS = 4  # of a token, about
_LONG = 2**16  # characters from which on a conversation takes so long to prepare that others should not wait for it


class Moderator:
    """Judges conversations with one model, under any of its policies."""

    def __init__(
        self,
        classifier: Classifier,
        policies: PolicyStore,
        telemetry: Telemetry,
        *,
        max_batch_tokens: int,
        max_queue_seconds: float,
        thread: Executor | None = None,
        calibration: Calibration | None = None,
        prefix_cache: PrefixCache | None = None,
        shared: bool = False,
    ) -> None:
        """`thread` is the one that the model was loaded on, if there is one; `calibration` is the model's.

        `prefix_cache` is one for this model; `shared` has all clients share it.

        Blocks until the model has warmed up. Raises PolicyError for a policy that this model cannot serve."""
        self.model = classifier.info
        self.calibration = calibration
        self._reader = Reader(classifier)
        self._reader.check(policies.judging)
        self.policies = policies
        self._token_ends = classifier.token_ends
        self._tokenising = ThreadPoolExecutor(1, thread_name_prefix="tokenise")
        self._tokenising_long = ThreadPoolExecutor(1, thread_name_prefix="tokenise-long")
        self._thread = thread or model_thread()
        self._shared = shared
        self._batcher = Batcher(
            prefix_cache.score if prefix_cache else classifier.score,
            self._thread,
            cost=prefix_cache.unread if prefix_cache else whole,
            max_batch_tokens=max_batch_tokens,
            max_queue_seconds=max_queue_seconds,
            rate=self._thread.submit(_warm_up, classifier, max_batch_tokens).result(),
            telemetry=telemetry,
        )

    @classmethod
    def load(cls, settings: Settings, telemetry: Telemetry, policies: PolicyStore | None = None) -> Self:
        """Loads policies, where none are given, and model as the settings say; blocks.

        Raises ConfigError where one cannot be used.
        """
        calibration = Calibration.read(settings.model)
        if policies is None:
            signatures = Signatures(settings.policies_key) if settings.policies_key else None
            policies = PolicyStore.load(settings.policies, settings.default_policy, calibration, signatures)
        thread = model_thread()
        classifier = thread.submit(load_classifier, settings).result()
        size, cache = settings.prefix_cache_mb * 2**20, None
        if size and isinstance(classifier, Paged):
            cache = thread.submit(PrefixCache, classifier, size, telemetry.metrics).result()
        return cls(
            classifier,
            policies,
            telemetry,
            max_batch_tokens=batch_tokens(settings, classifier.info),
            max_queue_seconds=settings.max_queue_seconds,
            thread=thread,
            calibration=calibration,
            prefix_cache=cache,
            shared=settings.prefix_cache_shared,
        )

    async def adopt(self, policies: PolicyStore) -> None:
        """Judges by these from the next request on; those under way keep to what they began with.

        Raises PolicyError for a policy that this model cannot serve, and keeps to what was in force.
        """
        self._reader.check(policies.judging)
        self.policies = policies

    async def judge(
        self,
        conversation: Conversation,
        *,
        policy: str = "",
        lane: Lane = Lane.INTERACTIVE,
        deadline: float | None = None,
        metadata: Mapping[str, str] = NO_METADATA,
        conversation_id: str = "",
        client: str = "",
        known: int = 0,
    ) -> Decision:
        """Verdicts for the turns that the conversation asks for, under one policy from start to end.

        Where the policy has a candidate, both judge, from the same scores, and `conversation_id` decides which of them
        answers. `metadata` is what the policy's overlays are chosen by.
        Where a text is disguised, a view of the conversation without disguises is scored in the same batch, and each
        score is the higher one of the two; the coverage is that of the conversation as it is. A rule matches in either
        view.
        What this `client` has asked online before need not be read again, and is held for what it asks next; of about
        so many `known` characters it has just asked.
        `deadline` is in time.monotonic() seconds. Raises InputError, NotFound, Draining, Overloaded and Expired; where
        the model fails, the policy's on_error or a stricter rule answers and the verdict is degraded. Cancelling drops
        the request.
        """
        id = uuid.uuid4().hex
        policies = self.policies
        choice = policies.choose(policy, conversation_id or id)
        judges = (choice.policy,) if choice.beside is None else (choice.policy, choice.beside)
        characters = sum(len(turn.text) for turn in conversation.turns)
        size = min(max(0, characters - known) // _TOKEN_CHARACTERS, self.model.max_tokens)
        thread = self._tokenising
        if characters >= _LONG:
            thread, size = self._tokenising_long, 0  # it comes so late that the model is free for others until then
        started = time.monotonic()
        with self._batcher.arriving(lane, size):  # refuses before anything is spent
            loop = asyncio.get_running_loop()
            reading = await loop.run_in_executor(thread, self._reader.read, conversation, judges, policies.heads)
        timings = Timings(tokenise=time.monotonic() - started)
        found: list[Sequence[Scores] | None] = []
        for each in reading.passes:
            tenant = None if lane is Lane.BULK else "" if self._shared else client
            windows = [replace(tokens, tenant=tenant) for tokens in each.windows]
            try:
                scores, queue, model = await self._batcher.score(windows, lane, deadline)
                timings = replace(timings, queue=timings.queue + queue, model=timings.model + model)
                found.append(scores)
            except ModelFailed:
                found.append(None)
            lane = Lane.BULK  # the rest of a long conversation waits its turn, and is no longer refused
        verdicts = reading.verdicts(found, metadata)
        revisions = [Revision(judge.name, judge.revision) for judge in judges]
        return Decision(
            id=id,
            verdicts=verdicts[0],
            policy=revisions[0],
            model=self.model.revision,
            timings=timings,
            beside=None if choice.beside is None else Beside(revisions[1], verdicts[1], not choice.is_candidate),
            prompt=reading.prompt,
        )

    async def token_ends(self, text: str) -> list[int]:
        """After which characters of a text its tokens end."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenising, self._token_ends, text)

    async def drain(self) -> None:
        """Refuses what is new with Draining, and waits for what is queued."""
        await self._batcher.drain()

    def close(self) -> None:
        """Ends the threads; blocks for the batch that the model may be at."""
        self._thread.shutdown()
        self._tokenising.shutdown()
        self._tokenising_long.shutdown()


def batch_tokens(settings: Settings, model: ModelInfo, *, bulk: bool = False) -> int:
    """Tokens of one pass: those of the settings, or what suits the model's device; more in `bulk`, for nobody waits."""
    return settings.max_batch_tokens or (_BULK_TOKENS if bulk else _BATCH_TOKENS)[model.device.partition(":")[0]]


def model_thread() -> ThreadPoolExecutor:
    """The one thread to load, warm up and run a model on.

    OpenMP keeps a team of threads for every thread that computes; a second one makes it put all of them to sleep
    between two steps, which costs a small batch a quarter of its speed.
    """
    return ThreadPoolExecutor(1, thread_name_prefix="model")


def _warm_up(classifier: Classifier, max_batch_tokens: int) -> float:
    """Runs small to full batches, so that whatever is compiled or cached is; the tokens a second of a full one."""
    conversation = Conversation((Turn(Role.USER, "warm up " * 30),), 0)  # as long as most are
    tokens = classifier.tokenise(conversation)[0]
    full = max(1, max_batch_tokens // len(tokens.ids))
    rows = 1
    while rows < full:
        classifier.score([tokens] * rows)
        rows *= 2
    classifier.score([tokens] * full)
    started = time.monotonic()
    classifier.score([tokens] * full)
    return full * len(tokens.ids) / (time.monotonic() - started)
