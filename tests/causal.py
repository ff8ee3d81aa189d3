"""A small real stand-in for a model: its scores are made up, and hang on every token that stands before them."""

from collections.abc import Sequence
from zlib import crc32

from guard.model.chat import ChatTokenizer
from guard.settings import Settings
from guard.types import Conversation, Described, LongInput, ModelInfo, Revision, Scores, Tokens

WINDOW = 48
TOKENIZER = ChatTokenizer(Settings().model / "tokenizer.json", WINDOW)


class CausalModel:
    """Reads windows of 48 tokens, and makes the scores of a turn up from all tokens before its end, and no others."""

    info = ModelInfo(Revision("causal", "0a"), "cpu", "float32", "crc32", 0, WINDOW, ("S7", "X1"))

    def __init__(self) -> None:
        self.fails = False
        self.passes: list[int] = []  # windows in each

    def tokenise(
        self, conversation: Conversation, long_input: LongInput = "head-tail", asked: tuple[Described, ...] = ()
    ) -> tuple[Tokens, ...]:
        return TOKENIZER.tokenise(conversation, long_input)

    def token_ends(self, text: str) -> list[int]:
        return TOKENIZER.ends(text)

    def score(self, batch: Sequence[Tokens]) -> list[tuple[Scores, ...]]:
        self.passes.append(len(batch))
        if self.fails:
            raise RuntimeError("out of memory")
        return [tuple(scores_after(tokens.ids[: span.end]) for span in tokens.spans) for tokens in batch]


def scores_after(ids: Sequence[int]) -> Scores:
    def score(output: str) -> float:
        return crc32(repr((ids, output)).encode()) / 2**32

    return Scores(score("unsafe"), {code: score(code) for code in CausalModel.info.hazards})
