"""A policy file from disk to its checked form, with every problem in it said in the words of its author."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from guard.errors import PolicyError
from guard.policy.calibration import Calibration
from guard.policy.check import check
from guard.policy.document import KEY, Document, Loc, Read, read_file
from guard.policy.heads import check_examples
from guard.policy.messages import found, one_of
from guard.policy.schema import NAME, TAGS, FragmentSpec, PolicySpec
from guard.types import Head

_PROBABILITY = "a number from 0 to 1"
# What was expected, by pydantic's type of error, in the words of YAML.
_EXPECTED = {
    "dict_type": "a mapping",
    "finite_number": "a number",
    "float_type": _PROBABILITY,
    "greater_than": "a number above 0",
    "greater_than_equal": _PROBABILITY,
    "int_type": "a whole number",
    "less_than": "a number below 1",
    "less_than_equal": _PROBABILITY,
    "missing": "a value",
    "model_type": "a mapping",
    "string_pattern_mismatch": "a name of lower-case letters, digits and hyphens that starts with a letter",
    "string_too_short": "text",
    "string_type": "text",
    "too_long": "one entry",
    "too_short": "at least one entry",
    "tuple_type": "a list",
}
_SHARED = ("replies", "rules", "categories")  # what fragments may hold

_Spec = TypeVar("_Spec", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Reading:
    """A policy as its files have it, those that it includes merged in; `warnings` are lines like those of problems.

    `heads` are those beside it, by category, and `examples` a few of those of each category that has some.
    """

    spec: PolicySpec
    warnings: tuple[str, ...]
    heads: Mapping[str, Head]
    examples: Mapping[str, tuple[tuple[str, bool], ...]]


def read_policy(path: Path, calibration: Calibration | None = None, read: Read = read_file) -> Reading:
    """Reads and checks one file, and those that it includes. Raises PolicyError with every problem in them.

    `calibration` is that of the model that the policy is for; without one, a target such as max_fpr is a problem.
    """
    document = Document(path, read)
    if not re.fullmatch(rf"{NAME}\.yaml", path.name):
        document.report((KEY,), f"expected a file name such as my-policy.yaml, found {found(path.name)}")
    own = checked(document, PolicySpec, {"description": "-"})
    files = _Files(document, read)
    spec = own.model_copy(update=dict(files.merged(path, own)))
    if isinstance(document.data, dict):
        check(spec, files, calibration or Calibration())
    heads, examples = check_examples(spec, path, files, read)
    files.raise_problems()
    return Reading(spec, tuple(line for one in files.documents for line in one.warnings), heads, examples)


def checked(document: Document, kind: type[_Spec], defaults: dict[str, Any]) -> _Spec:
    """What of a document is as `kind` asks; the rest is reported to the document, and left out.

    `defaults` are for what may not be left out.
    """
    try:
        return kind.model_validate(document.data)
    except ValidationError as error:
        problems = error.errors(include_url=False)
    data = document.data if isinstance(document.data, dict) else {}
    for details in problems:
        loc, unknown_key = _keys(details["loc"]), details["type"] == "extra_forbidden"
        document.report((*loc, KEY) if unknown_key else loc, _problem(kind, details, loc))
    return kind.model_validate(defaults | _without(data, [_keys(details["loc"]) for details in problems]))


def _without(data: Any, locs: Iterable[Loc]) -> dict[str, Any]:
    """A mapping without what holds something at `locs`: an entry of a section that is a mapping, or a whole section."""
    sound = {key: dict(value) if isinstance(value, dict) else value for key, value in data.items()}
    for section, *rest in filter(None, locs):
        if isinstance(data.get(section), dict) and rest and rest[0] in data[section]:
            sound.get(section, {}).pop(rest[0], None)
        else:
            sound.pop(str(section), None)
    return sound


class _Files:
    """A policy's document and those that it includes, to look names up in and to report to, whichever holds them."""

    def __init__(self, document: Document, read: Read) -> None:
        self.documents = [document]
        self._read = read

    def merged(self, path: Path, own: PolicySpec) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each shared section with the entries of the included files, which are read and checked; each name once."""
        main = self.documents[0]
        parts: list[PolicySpec | FragmentSpec] = [own]
        for index, name in enumerate(own.include):
            if name in own.include[:index]:
                main.report(("include", index), f"expected each file once, found {found(name)} again")
                continue
            try:
                fragment = Document(path.with_name(name), self._read)
            except PolicyError as error:
                main.report(("include", index), f"cannot be included: {error}")
                continue
            parts.append(checked(fragment, FragmentSpec, {}))
            for section in _SHARED:
                for entry in fragment.names(section) & self.names(section):
                    fragment.report((section, entry, KEY), f"expected a name that {path.name} has nowhere else")
            self.documents.append(fragment)
        for section in _SHARED:
            yield section, {key: value for part in reversed(parts) for key, value in getattr(part, section).items()}

    def names(self, section: str) -> set[str]:
        """All that is defined in a section, be it sound or not."""
        return {name for document in self.documents for name in document.names(section)}

    def report(self, loc: Loc, problem: str) -> None:
        self._holder(loc).report(loc, problem)

    def warn(self, loc: Loc, warning: str) -> None:
        self._holder(loc).warn(loc, warning)

    def raise_problems(self) -> None:
        if lines := [line for document in self.documents for line in document.problems]:
            raise PolicyError("\n".join(lines))

    def _holder(self, loc: Loc) -> Document:
        holders = (one for one in self.documents if len(loc) > 1 and loc[1] in one.names(str(loc[0])))
        return next(holders, self.documents[0])


def _keys(loc: Loc) -> Loc:
    return tuple(part for part in loc if part not in TAGS)


def _problem(kind: type[BaseModel], details: ErrorDetails, loc: Loc) -> str:
    problem, value, context = details["type"], details["input"], details.get("ctx", {})
    known: Collection[str] = context.get("known", ())
    if problem == "missing":
        value = None
    elif problem == "extra_forbidden":
        value, known = loc[-1], _keys_beside(kind, loc)
    elif problem == "literal_error":
        known = re.findall(r"'(.*?)'", context["expected"])
    elif problem == "string_pattern_mismatch" and "_include" in context["pattern"]:
        return f"expected a file name such as crisis_include.yaml, found {found(value)}"
    elif problem == "greater_than_equal" and isinstance(value, int) and "history" in loc:
        return f"expected a number from 0, found {found(value)}"
    if known:
        return one_of(known, value)
    return f"expected {_EXPECTED.get(problem, details['msg'])}, found {context.get('found') or found(value)}"


def _keys_beside(kind: Any, loc: Iterable[str | int]) -> list[str]:
    """The keys that a model within `kind` takes where the last part of `loc` is none of them."""
    *way, _ = loc
    kinds = _alternatives(kind)
    for part in way:
        kinds = [inner for kind in kinds for inner in _within(kind, part)]
    return [key for kind in kinds if _is_model(kind) for key in _fields(kind)]


def _within(kind: Any, part: str | int) -> list[Any]:
    """What may stand under a key of a mapping, or at a place of a list."""
    if _is_model(kind):
        return _alternatives(_fields(kind).get(str(part)))
    arguments = get_args(kind)
    return _alternatives(arguments[-1] if get_origin(kind) is dict else arguments[0]) if arguments else []


def _alternatives(kind: Any) -> list[Any]:
    if get_origin(kind) is Annotated:
        return _alternatives(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [inner for one in get_args(kind) for inner in _alternatives(one)]
    return [kind]


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _fields(kind: type[BaseModel]) -> dict[str, Any]:
    return {field.alias or name: field.annotation for name, field in kind.model_fields.items()}
