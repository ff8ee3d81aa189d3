"""What an audit has written so far, opened for questions in SQL."""

import glob
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from guard.audit.output import REJECTS, is_complete, read_facts, read_manifest
from guard.audit.schema import schema
from guard.errors import ConfigError
from guard.types import Action

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

LEVELS = tuple(action.name.lower() for action in Action)
MEMORY = "2GB"  # more than that goes to the disk


@dataclass(frozen=True, slots=True)
class Finished:
    """The folder of an audit: what was in force, and the lines of its manifest that count."""

    folder: Path
    facts: Mapping[str, Any]
    manifest: Sequence[Mapping[str, Any]]
    is_complete: bool

    @classmethod
    def read(cls, folder: Path) -> "Finished":
        """Raises ConfigError where there is no audit, or a part of it is gone."""
        finished = cls(folder, read_facts(folder), read_manifest(folder), is_complete(folder))
        if gone := [part for part in finished.parts if not part.is_file()]:
            raise ConfigError(f"{gone[0]}: there is no such file, though the manifest names it")
        return finished

    @property
    def parts(self) -> list[Path]:
        return [self.folder / line["part"] for line in self.manifest if line.get("part")]

    @property
    def rejects(self) -> Path:
        return self.folder / REJECTS

    @property
    def policies(self) -> Mapping[str, Mapping[str, Any]]:
        policies: Mapping[str, Mapping[str, Any]] = self.facts.get("policies") or {}
        return policies

    @property
    def holds_text(self) -> bool:
        return bool(self.facts.get("with_text"))

    def total(self, name: str) -> float:
        """Of what each part counts."""
        return sum(line.get(name) or 0 for line in self.manifest)

    @contextmanager
    def open(self) -> "Iterator[DuckDBPyConnection]":
        """A database whose view `turns` holds the rows of the parts; see `_view`. Raises ConfigError."""
        import duckdb

        with TemporaryDirectory() as aside:
            config: dict[str, str | bool | int | float | list[str]] = {
                "memory_limit": MEMORY,
                "temp_directory": aside,
                "autoinstall_known_extensions": False,
                "autoload_known_extensions": False,
            }
            with duckdb.connect(config=config) as database:
                try:
                    self._view(database)
                    yield database
                except duckdb.Error as error:
                    # Whose message may hold what stands in the rows.
                    raise ConfigError(f"{self.folder}: its parts cannot be read ({type(error).__name__})") from error

    def _view(self, database: "DuckDBPyConnection") -> None:
        """`level` is the place in LEVELS of what was decided, or of what a policy in shadow found; `day` is UTC's."""
        compare = self.facts.get("compare")
        was = _level_or_found("", any(policy.get("shadow") for policy in self.policies.values()))
        becomes = _level_or_found("compare.", bool(compare and compare.get("shadow"))) if compare else "NULL"
        database.execute(
            f"CREATE VIEW turns AS SELECT *, {was} AS level, {becomes} AS other_level, "
            "coalesce(strftime(make_timestamp(epoch_us(time)), '%Y-%m-%d'), '') AS day "
            f"FROM {self._source(database)}"
        )

    def _source(self, database: "DuckDBPyConnection") -> str:
        if parts := self.parts:
            return parquet(parts)
        hazards = {
            code
            for policy in self.policies.values()
            for one in policy["categories"].values()
            for code in one["hazards"]
        }
        none = schema(sorted(hazards) or ["none"], text=self.holds_text, compared=bool(self.facts.get("compare")))
        database.register("nothing", none.empty_table())
        return "(SELECT *, '' AS filename, 0::BIGINT AS file_row_number FROM nothing)"


def parquet(parts: Sequence[Path]) -> str:
    """A table of SQL, with the place of each row as `filename` and `file_row_number`."""
    paths = ", ".join(quoted(glob.escape(str(part))) for part in parts)
    return f"read_parquet([{paths}], filename = true, file_row_number = true)"


def level(action: str) -> str:
    """The place in LEVELS of an action, in SQL."""
    return f"(list_position([{', '.join(map(quoted, LEVELS))}], {action}) - 1)"


def quoted(text: str) -> str:
    """A string of SQL."""
    return "'" + text.replace("'", "''") + "'"


def _level_or_found(prefix: str, may_be_shadow: bool) -> str:
    """A policy in shadow allows everything, so that only its violations tell what it would do."""
    decided = level(f"{prefix}action")
    if not may_be_shadow:
        return decided
    return f"greatest({decided}, coalesce(list_max([{level('v.action')} FOR v IN {prefix}violations]), 0))"
