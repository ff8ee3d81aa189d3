"""A Llama Guard checkpoint that a server of an OpenAI-compatible API computes, read by its log probabilities.

For checkpoints that one device does not hold, on a server such as vLLM. It gets prompts as token ids, so that no text
breaks out of them there either, and is asked for one token after each place that is read.
"""

import math
import os
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit

from guard.errors import CheckpointError, ModelFailed
from guard.model.checkpoint import read_config
from guard.model.llama_guard import (
    Ask,
    Asked,
    Asking,
    candidates,
    end_tokens,
    likeliest,
    longest_prompt,
    read_tokenizer,
    revision_of,
)
from guard.types import ModelInfo, Revision, Scores, Tokens

_ALTERNATIVES = 20  # as many as servers tell
_SECONDS = 60.0


class RemoteGuard(Asked):
    """Tokens in, scores out, of a model that is elsewhere. Calls must not overlap.

    What is not among the alternatives that the server tells counts as impossible.
    """

    def __init__(self, path: Path, endpoint: str, model: str | None = None, ask: Ask = "together") -> None:
        """`path` holds the checkpoint's config.json and tokenizer; `endpoint` is http://HOST:PORT/v1.

        An API key, where one is needed, is read from OPENAI_API_KEY. Raises CheckpointError where the server cannot be
        asked, or has no such model.
        """
        try:
            import openai
        except ImportError:
            needs = "pip install 'guard-moderation[llama-guard]'"
            raise CheckpointError(f"{endpoint}: needs the extra llama-guard: {needs}") from None
        config, tokenizer = read_config(path), read_tokenizer(path)
        answers = candidates(tokenizer, end_tokens(config))
        self._failures = openai.OpenAIError
        self._texts = {token: tokenizer.text(token) for one in answers for token in one.tokens}
        key = os.environ.get("OPENAI_API_KEY", "none")  # the client will not do without
        self._client = openai.OpenAI(base_url=endpoint, api_key=key, timeout=_SECONDS, max_retries=1)
        where = urlsplit(endpoint)
        try:
            known = [one.id for one in self._client.models.list()]
            if not known or model not in (None, *known):
                raise CheckpointError(f"{endpoint}: has {', '.join(known) or 'no model'}, not {model}")
            self._model = model or known[0]
            self._asking = Asking(tokenizer, likeliest(answers, tokenizer, self._read), longest_prompt(config), ask)
        except (openai.OpenAIError, ModelFailed) as error:
            raise CheckpointError(f"{endpoint}: {error}") from error
        self.info = ModelInfo(
            revision=Revision(self._model.rpartition("/")[2], revision_of(path)),
            device="remote",
            dtype="unknown",
            kernels=f"{where.hostname}:{where.port or where.scheme}",
            parameters=0,
            max_tokens=self._asking.max_tokens,
            hazards=tokenizer.names,
            asks=self._asking.further,
        )

    def score(self, batch: Sequence[Tokens]) -> list[tuple[Scores, ...]]:
        """Scores for the judged turn of each element, in one request; raises ModelFailed where there are none."""
        found = self._read([tokens.ids for tokens in batch], list(map(self._asking.places, batch)))
        scores = [self._asking.scores(tokens, logits) for tokens, logits in zip(batch, found, strict=True)]
        if any(math.isnan(score) for own in scores for score in (own.unsafe, *own.hazards.values())):
            raise ModelFailed("the endpoint's alternatives hold no answer of a Llama Guard")
        return [(own,) for own in scores]

    def _read(
        self, sequences: Sequence[tuple[int, ...]], places: Sequence[Sequence[int]]
    ) -> list[list[Mapping[int, float]]]:
        prompts = [list(ids[: place + 1]) for ids, own in zip(sequences, places, strict=True) for place in own]
        try:
            completion = self._client.completions.create(
                model=self._model,
                prompt=prompts,
                max_tokens=1,
                temperature=0.0,
                logprobs=_ALTERNATIVES,
                extra_body={"return_tokens_as_token_ids": True},  # which vLLM heeds: texts of tokens may be alike
            )
        except self._failures as error:  # whose message may quote what was sent
            raise ModelFailed(f"the endpoint failed: {type(error).__name__}") from None
        told = {choice.index: choice.logprobs.top_logprobs for choice in completion.choices if choice.logprobs}
        tops = [(told.get(place) or [{}])[0] for place in range(len(prompts))]
        rows = iter([self._logits(top or {}) for top in tops])
        return [list(islice(rows, len(own))) for own in places]

    def _logits(self, top: Mapping[str, float]) -> dict[int, float]:
        return {token: top.get(f"token_id:{token}", top.get(text, -math.inf)) for token, text in self._texts.items()}
