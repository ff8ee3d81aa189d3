"""The policies of a directory, loaded together: all of them are good, or none is served."""

from collections.abc import Iterable
from pathlib import Path

from guard.errors import ConfigError, NotFound, PolicyError
from guard.policy.bundle import Bundle, Signatures
from guard.policy.calibration import Calibration
from guard.policy.compile import Policy, compile_policy
from guard.policy.document import Read, printable, read_file
from guard.policy.messages import did_you_mean
from guard.policy.read import read_policy

_NOT_POLICIES = ("_test.yaml", "_include.yaml")


class PolicyStore:
    """An immutable snapshot of policies by name; `default` names the one that is meant by an empty name.

    `heads` are those of all its policies: whatever policy a turn is judged by, it is scored for all, so that its scores
    can be judged by another.
    """

    def __init__(self, policies: Iterable[Policy], default: str) -> None:
        self._by_name = {policy.name: policy for policy in sorted(policies, key=lambda policy: policy.name)}
        self.policies = tuple(self._by_name.values())
        self.heads = tuple({head: None for policy in self.policies for head in policy.own.values() if head})
        self.default = default
        if default not in self._by_name:
            raise ConfigError(
                f"no default policy {default!r} among {', '.join(self._by_name)}{did_you_mean(default, self._by_name)}"
            )

    @classmethod
    def load(
        cls,
        directory: Path,
        default: str = "default",
        calibration: Calibration | None = None,
        signatures: Signatures | None = None,
    ) -> "PolicyStore":
        """Reads every policy file of a directory, see `policy_files`, for the model of that calibration.

        Where there are `signatures` to check, what was checked is what is read, and nothing else.
        Raises PolicyError with the problems of all files, and ConfigError where there is no directory, no policy or no
        default policy.
        """
        bundle = signatures.open(directory) if signatures else None
        read = bundle.read if bundle else read_file
        policies, problems = [], dict[str, None]()  # what several policies include is wrong once
        for path in policy_files(directory, bundle):
            try:
                policies.append(load_policy(path, calibration, read))
            except PolicyError as error:
                problems |= dict.fromkeys(str(error).split("\n"))
        if problems:
            raise PolicyError("\n".join(problems))
        store = cls(policies, default)
        if signatures and bundle:
            signatures.keep_to(bundle)
        return store

    def get(self, name: str) -> Policy:
        """The policy of that name, or the default one for an empty name. Raises NotFound."""
        policy = self._by_name.get(name or self.default)
        if policy is None:
            raise NotFound("policy", f"no policy is named '{printable(name)}'{did_you_mean(name, self._by_name)}")
        return policy


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
    return compile_policy(path.stem, reading.spec, calibration, reading.heads)


def _is_policy(name: str) -> bool:
    """Also of a name that no policy may have: better refused than passed over."""
    return name.endswith((".yaml", ".yml")) and not name.endswith(_NOT_POLICIES) and not name.startswith(".")
