"""The policies of a directory, loaded together: all of them are good, or none is served."""

import errno
import os
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from guard.errors import ConfigError, NotFound, PolicyError
from guard.policy.bundle import Bundle, Signatures
from guard.policy.calibration import Calibration
from guard.policy.compile import Policy, compile_policy
from guard.policy.document import MAX_BYTES, Read, printable, read_file
from guard.policy.messages import did_you_mean
from guard.policy.read import read_policy
from guard.policy.rollout import Candidate

_INCLUDED = "_include.yaml"
_NOT_POLICIES = ("_test.yaml", _INCLUDED)


class Choice(NamedTuple):
    """The policy that answers, and where there is a candidate the other one of the two; `beside` judges too."""

    policy: Policy
    beside: Policy | None = None
    is_candidate: bool = False
    """Whether it is the candidate that answers."""


class PolicyStore:
    """An immutable snapshot: all that is in force for a request, from start to end.

    Policies by name, of which `default` is meant by an empty name, and `candidates` beside some of them. `heads` are
    those of all of them: whatever policy a turn is judged by, it is scored for all, so that its scores can be judged by
    another. `files` are the contents of the YAML files that the policies were read from, by name, and `signed` is when
    the directory was, where that was checked.
    """

    def __init__(
        self,
        policies: Iterable[Policy],
        default: str,
        candidates: Iterable[Candidate] = (),
        files: Mapping[str, bytes] = MappingProxyType({}),
        signed: datetime | None = None,
    ) -> None:
        self.by_name = {policy.name: policy for policy in sorted(policies, key=lambda policy: policy.name)}
        self.policies = tuple(self.by_name.values())
        self.default = default
        self.candidates = {candidate.policy.name: candidate for candidate in candidates}
        self.heads = tuple({head: None for policy in self.judging for head in policy.own.values() if head})
        self.files = files
        self.signed = signed
        if default not in self.by_name:
            raise ConfigError(
                f"no default policy {default!r} among {', '.join(self.by_name)}{did_you_mean(default, self.by_name)}"
            )

    @classmethod
    def load(
        cls,
        directory: Path,
        default: str = "default",
        calibration: Calibration | None = None,
        signatures: Signatures | None = None,
        earlier: "PolicyStore | None" = None,
    ) -> "PolicyStore":
        """Reads every policy file of a directory, see `policy_files`, for the model of that calibration.

        Where there are `signatures` to check, what was checked is what is read, and nothing else; nor what was signed
        before `earlier` was. A policy whose files are still as `earlier` had them, which was read for the same model,
        is not compiled again.
        Raises PolicyError with the problems of all files, and ConfigError where there is no directory, no policy or no
        default policy.
        """
        bundle = signatures.open(directory, earlier.signed if earlier else None) if signatures else None
        source = bundle.read if bundle else read_file
        files: dict[str, bytes] = {}

        def read_once(path: Path, limit: int) -> bytes:
            if path.suffix != ".yaml":
                return source(path, limit)
            if path.name not in files:
                files[path.name] = source(path, limit)
            return files[path.name]

        known = _unchanged(directory, earlier, read_once) if earlier else {}
        policies, problems = [], dict[str, None]()  # what several policies include is wrong once
        for path in policy_files(directory, bundle):
            try:
                policies.append(known.get(path.name) or load_policy(path, calibration, read_once))
            except PolicyError as error:
                problems |= dict.fromkeys(str(error).split("\n"))
        if problems:
            raise PolicyError("\n".join(problems))
        return cls(policies, default, files=files, signed=bundle.signed if bundle else None)

    def get(self, name: str) -> Policy:
        """The policy of that name, or the default one for an empty name. Raises NotFound."""
        policy = self.by_name.get(name or self.default)
        if policy is None:
            raise NotFound("policy", f"no policy is named '{printable(name)}'{did_you_mean(name, self.by_name)}")
        return policy

    def choose(self, name: str, conversation: str) -> Choice:
        """Who judges the turns of a conversation under the policy of that name. Raises NotFound."""
        live = self.get(name)
        candidate = self.candidates.get(live.name)
        if candidate is None:
            return Choice(live)
        if candidate.answers(conversation):
            return Choice(candidate.policy, live, is_candidate=True)
        return Choice(live, candidate.policy)

    @property
    def judging(self) -> tuple[Policy, ...]:
        """The policies and the candidates."""
        return (*self.policies, *(candidate.policy for candidate in self.candidates.values()))


def policy_files(directory: Path, bundle: Bundle | None = None) -> list[Path]:
    """The policies of a directory, or of its bundle: NAME.yaml, but not hidden, NAME_test.yaml or NAME_include.yaml.

    Raises ConfigError where there is no directory or no policy.
    """
    try:
        names = bundle.files if bundle else [path.name for path in directory.iterdir()]
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be read: {error.strerror}") from None
    paths = sorted(directory / name for name in names if _is_policy(name))
    if not paths:
        raise ConfigError(f"{directory}: expected policies (*.yaml), found none")
    return paths


def load_policy(path: Path, calibration: Calibration | None = None, read: Read = read_file) -> Policy:
    """One policy, named as its file is. Raises PolicyError with every problem in it."""
    reading = read_policy(path, calibration, read)
    return compile_policy(path.stem, reading.spec, calibration, reading.heads, reading.examples)


def held_policy(
    name: str, files: Mapping[str, bytes], directory: Path, calibration: Calibration | None = None
) -> Policy:
    """The same of files that are no files, by name, whose heads are those of the policy of that name in a directory.

    Nothing else is there to be included.
    """

    def read(path: Path, limit: int) -> bytes:
        if path.name in files:
            return files[path.name]
        if path.suffix == ".safetensors":
            return read_file(directory / path.name, limit)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    return load_policy(Path(f"{name}.yaml"), calibration, read)


def _unchanged(directory: Path, earlier: PolicyStore, read: Read) -> dict[str, Policy]:
    """The policies, by file, that would be read again in the same words, and have learned nothing meanwhile."""

    def is_same(name: str) -> bool:
        try:
            return read(directory / name, MAX_BYTES + 1) == earlier.files[name]
        except OSError:
            return False

    if not all(is_same(name) for name in earlier.files if name.endswith(_INCLUDED)):
        return {}
    files = {f"{policy.name}.yaml": policy for policy in earlier.policies if not policy.own}
    return {name: policy for name, policy in files.items() if name in earlier.files and is_same(name)}


def _is_policy(name: str) -> bool:
    """Also of a name that no policy may have: better refused than passed over."""
    return name.endswith((".yaml", ".yml")) and not name.endswith(_NOT_POLICIES) and not name.startswith(".")
