"""Labelled conversations: what a recipe takes from a directory of JSON Lines files, and how it is split."""

import dataclasses
import gzip
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from guard.errors import ConfigError
from guard.types import HAZARDS, Conversation, Role, Turn

Split = Literal["train", "validation"]

AUTHORED = Path(__file__).parent / "authored"  # the sources that were written for Guard


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Strict):
    """What a recipe takes of one file `<name>.jsonl.gz` or `<name>.jsonl`.

    `safe` and `unsafe` are the most rows of that label in the training split, `repeat` how often each is seen in an
    epoch, `weight` its weight in the loss; of its labels a share `smoothing` is doubted. A teacher's probabilities
    stand in for a share `taught` of each label, and are all there is to learn from at most `unlabelled` further rows.
    `group` names keys of `source_labels`; rows that agree in them stay in one split. Without it, or where a row has
    none of them, rows that open with the same turn do.
    """

    safe: Annotated[int, Field(ge=0)] | None = None
    unsafe: Annotated[int, Field(ge=0)] | None = None
    unlabelled: Annotated[int, Field(ge=0)] = 0
    taught: Annotated[float, Field(ge=0, le=1)] = 0.0
    repeat: Annotated[int, Field(ge=1)] = 1
    weight: Annotated[float, Field(gt=0)] = 1.0
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target: Role | None = None
    group: tuple[str, ...] = ()
    validation: Annotated[float, Field(ge=0, le=1)] | None = None
    validation_rows: Annotated[int, Field(ge=0)] | None = None


class Recipe(_Strict):
    """Which rows train a model, and how.

    `validation` is the share of groups held out of each source, `validation_rows` the most of them, of either label,
    that are used; a share `augmented` of the others is changed in ways that keep the label, each as often beside the
    others as `disguises` says, or else guard.training.augment. The model is the base's first `blocks` blocks, of which
    the first `frozen_blocks` stay as they are; it is trained in float32 with products in `precision`, of numbers
    `rounded` to int8 where it is to be served so. A run that goes on from another recipe's takes a `first_epoch` that
    has not been, for another order. A step reads `tokens_per_step` tokens, packed into rows of one of the `lengths`.
    The learning rate rises over `warmup_steps` and falls over the last `decay`, a share, of the `steps`; in each block
    it is `block_decay` times that of the block above. `hazard_loss` is the weight of the loss of all hazards beside
    that of `unsafe`.
    """

    seed: int
    max_tokens: Annotated[int, Field(ge=16)]
    validation: Annotated[float, Field(ge=0, lt=1)]
    validation_rows: Annotated[int, Field(ge=0)]
    augmented: Annotated[float, Field(ge=0, le=1)]
    disguises: dict[str, Annotated[float, Field(ge=0)]] = {}
    blocks: Annotated[int, Field(ge=1)]
    frozen_blocks: Annotated[int, Field(ge=0)]
    precision: Literal["bfloat16", "float32"]
    rounded: bool = False
    first_epoch: Annotated[int, Field(ge=0)] = 0
    tokens_per_step: Annotated[int, Field(ge=16)]
    lengths: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
    steps: Annotated[int, Field(ge=1)]
    learning_rate: Annotated[float, Field(gt=0)]
    block_decay: Annotated[float, Field(gt=0, le=1)]
    head_learning_rate: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    warmup_steps: Annotated[int, Field(ge=1)]
    decay: Annotated[float, Field(gt=0, le=1)]
    hazard_loss: Annotated[float, Field(ge=0)]
    sources: dict[str, Source]

    @model_validator(mode="after")
    def _rows_fit(self) -> Self:
        if not self.max_tokens <= max(self.lengths) <= self.tokens_per_step:
            raise ValueError("max_tokens <= max(lengths) <= tokens_per_step does not hold")
        return self


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation whose last turn is labelled; `hazards` is None where the kind of harm is unknown.

    `taught` is the share of the labels that the probabilities of a `teacher`, unsafe and each hazard, stand in for.
    `weight` is that in the loss, or how many rows like it one of a sample stands for.
    """

    id: str
    source: str
    lang: str
    conversation: Conversation
    unsafe: bool
    hazards: frozenset[str] | None
    weight: float = 1.0
    smoothing: float = 0.0
    taught: float = 0.0
    teacher: tuple[float, ...] | None = None

    @property
    def role(self) -> Role:
        """Whose turn is judged."""
        return self.conversation.turns[-1].role

    @property
    def labels(self) -> tuple[bool, ...]:
        """What is true of it, as far as known: unsafe, then each hazard."""
        return (self.unsafe, *(self.unsafe and code in (self.hazards or ()) for code in HAZARDS))

    @property
    def targets(self) -> tuple[float, ...]:
        """The probabilities to learn: the labels, that of `unsafe` doubted as far as it is smoothed, and the teacher's.

        Where the kind of harm is unknown, the teacher alone says it.
        """
        unsafe, *hazards = map(float, self.labels)
        own = (unsafe + self.smoothing * (0.5 - unsafe), *hazards)
        if self.teacher is None:
            return own
        shares = (self.taught, *[self.taught if self.hazards is not None else 1.0] * len(hazards))
        return tuple(
            label + share * (said - label) for label, said, share in zip(own, self.teacher, shares, strict=True)
        )


class _Message(BaseModel):
    role: Role
    content: str


def _hazard(code: str) -> str:
    if code not in HAZARDS:
        raise ValueError(f"is none of {', '.join(HAZARDS)}")
    return code


class Record(BaseModel):
    """A line of a file, as written: the last turn is the judged one; `unsafe` null says nothing either way."""

    id: str
    source: str
    lang: str = "und"
    turns: Annotated[tuple[_Message, ...], Field(min_length=1)]
    unsafe: Literal[0, 1] | None
    categories: frozenset[Annotated[str, AfterValidator(_hazard)]] = frozenset()
    source_labels: dict[str, Any] = {}

    def example(self, source: Source | None = None) -> Example:
        """The record as an example of a recipe's source; one without a label counts as safe, and is the teacher's."""
        source = source or Source()
        turns = tuple(Turn(message.role, message.content) for message in self.turns)
        return Example(
            id=self.id,
            source=self.source,
            lang=self.lang,
            conversation=Conversation(turns, len(turns) - 1),
            unsafe=self.unsafe == 1,
            hazards=None if self.unsafe and not self.categories else self.categories,
            weight=source.weight,
            smoothing=source.smoothing,
            taught=source.taught if self.unsafe is not None else 1.0,
        )


def read_recipe(path: Path) -> Recipe:
    """Raises ConfigError naming the file and what is wrong in it."""
    try:
        return Recipe.model_validate(YAML(typ="safe").load(path))
    except (OSError, YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from error
    except ValidationError as error:
        raise ConfigError(f"{path}: {_problems(error)}") from error


def load_examples(recipe: Recipe, directory: Path, split: Split) -> list[Example]:
    """The rows of one split, each once, in a stable order; training rows up to the caps of their source.

    Held-out rows are labelled ones.
    """
    return [example for name in recipe.sources for example in _take(recipe, directory, name, split)]


def load_benchmarks(directory: Path, rows: int) -> dict[str, list[Example]]:
    """Of every JSON Lines file of a directory at most so many labelled rows, the same each time, by the file's name.

    Raises ConfigError where there is none.
    """
    files = (*directory.glob("*.jsonl"), *directory.glob("*.jsonl.gz"))
    names = sorted({path.name.removesuffix(".gz").removesuffix(".jsonl") for path in files})
    if not names:
        raise ConfigError(f"{directory}: holds no .jsonl and no .jsonl.gz file")
    found = {}
    for name in names:
        labelled = [record for record in read_records(directory, name) if record.unsafe is not None]
        chosen = sorted(labelled, key=lambda record: _fraction(0, record.id))[:rows]
        found[name] = [record.example() for record in chosen]
    return {name: examples for name, examples in found.items() if examples}


def repeated(recipe: Recipe, examples: Iterable[Example]) -> list[Example]:
    """One epoch: every example as often as its source repeats."""
    return [example for example in examples for _ in range(recipe.sources[example.source].repeat)]


def _take(recipe: Recipe, directory: Path, name: str, split: Split) -> Iterator[Example]:
    source = recipe.sources[name]
    share = recipe.validation if source.validation is None else source.validation
    rows = recipe.validation_rows if source.validation_rows is None else source.validation_rows
    caps: dict[int | None, int | None] = {0: rows, 1: rows, None: 0}  # by label
    if split == "train":
        caps = {0: source.safe, 1: source.unsafe, None: source.unlabelled}
    taken = Counter[int | None]()
    for record in sorted(read_records(directory, name), key=lambda record: _fraction(recipe.seed, record.id)):
        held_out = _fraction(recipe.seed, _group(record, source)) < share
        if held_out != (split == "validation") or taken[record.unsafe] == caps[record.unsafe]:
            continue
        if source.target in (None, record.turns[-1].role):
            taken[record.unsafe] += 1
            yield dataclasses.replace(record.example(source), source=name)  # which rows may call otherwise


def read_records(directory: Path, name: str) -> Iterator[Record]:
    """The records of `<name>.jsonl.gz` or `<name>.jsonl`, in the directory or among those written for Guard.

    Raises ConfigError with file, line and key of a wrong one.
    """
    places = [place / f"{name}{suffix}" for place in (directory, AUTHORED) for suffix in (".jsonl.gz", ".jsonl")]
    path = next((path for path in places if path.exists()), places[0])
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                yield _record(line, f"{path}:{number}")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ConfigError(f"{path}: cannot be read: {type(error).__name__}") from error


def _record(line: str, place: str) -> Record:
    try:
        return Record.model_validate_json(line)
    except ValidationError as error:
        raise ConfigError(f"{place}: {_problems(error)}") from None  # the error quotes the line


def _group(record: Record, source: Source) -> str:
    values = [record.source_labels.get(key) for key in source.group]
    if any(value is not None for value in values):
        return "|".join(map(str, values))
    return " ".join(record.turns[0].content.lower().split())


def _problems(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())


def _fraction(seed: int, text: str) -> float:
    """A number in [0, 1) that only `seed` and `text` decide."""
    digest = blake2b(f"{seed}:{text}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64
