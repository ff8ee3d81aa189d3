"""All that it takes to judge, in a form that can be sent to other processes: settings, and policies as their files."""

import errno
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guard.audit.judge import Judge
from guard.engine.moderator import batch_tokens
from guard.model.kinds import load_classifier
from guard.policy.calibration import Calibration
from guard.policy.compile import Policy
from guard.policy.document import Read, read_file
from guard.policy.store import PolicyStore, load_policy
from guard.settings import Settings
from guard.types import ModelInfo


@dataclass(slots=True)
class Files:
    """Files as they were when they were first read, None for those that were not there; to be read again elsewhere."""

    contents: dict[Path, bytes | None] = field(default_factory=dict)

    def reading(self, source: Read = read_file) -> Read:
        """Reads from there what was not read before."""

        def read(path: Path, limit: int) -> bytes:
            if path not in self.contents:
                try:
                    self.contents[path] = source(path, limit)
                except FileNotFoundError:
                    self.contents[path] = None
            return self.read(path, limit)

        return read

    def read(self, path: Path, limit: int) -> bytes:
        content = self.contents.get(path)
        if content is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return content if limit < 0 else content[:limit]


@dataclass(frozen=True, slots=True)
class Recipe:
    """A judge, to be made where it is needed.

    `policies` are files, of which `default` names one; where it goes `by_row`, rows may name another. `compare` is a
    file too. Their contents are in `files`.
    """

    settings: Settings
    policies: tuple[Path, ...]
    default: str
    by_row: bool
    compare: Path | None
    text: bool
    files: Files

    @classmethod
    def read(
        cls,
        settings: Settings,
        policies: Iterable[Path],
        default: str,
        *,
        by_row: bool = False,
        compare: Path | None = None,
        text: bool = False,
        source: Read = read_file,
    ) -> "tuple[Recipe, PolicyStore, Policy | None]":
        """The recipe, and the policies that it names. Raises PolicyError and ConfigError."""
        files = Files()
        recipe = cls(settings, tuple(policies), default, by_row, compare, text, files)
        return recipe, *recipe._load(files.reading(source))

    def judge(self) -> tuple[Judge, ModelInfo]:
        """On the thread that is to score. Raises ConfigError where model or policies cannot be served."""
        policies, compare = self._load(self.files.read)
        classifier = load_classifier(self.settings)
        judge = Judge(
            classifier,
            policies,
            max_batch_tokens=batch_tokens(self.settings, classifier.info, bulk=True),
            by_row=self.by_row,
            compare=compare,
            text=self.text,
        )
        return judge, classifier.info

    def _load(self, read: Read) -> tuple[PolicyStore, Policy | None]:
        calibration = Calibration.read(self.settings.model)
        policies = PolicyStore((load_policy(path, calibration, read) for path in self.policies), self.default)
        return policies, load_policy(self.compare, calibration, read) if self.compare else None


def policy_facts(policy: Policy) -> Mapping[str, Any]:
    """What a report tells of a policy, as JSON has it."""
    return {
        "revision": policy.revision,
        "description": policy.description,
        "shadow": policy.shadow,
        "categories": {
            category.name: {
                "title": category.title,
                "hazards": category.hazards,
                "scoring": category.scoring,
                "weights": category.weights,
                "thresholds": {
                    role.value: {action.name.lower(): score for action, score, _ in steps}
                    for role, steps in category.thresholds.items()
                },
            }
            for category in policy.categories
        },
    }
