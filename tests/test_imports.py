"""The rule of imports: parts import downwards only, and heavy libraries stay where they belong."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import guard

ROOT = Path(guard.__file__).parent
# From the bottom up; parts of one layer know nothing of each other.
LAYERS = (
    {"v1", "types"},
    {"errors"},
    {"settings", "telemetry", "keys", "messages"},
    {"policy", "model"},
    {"engine", "client"},
    {"service", "audit", "training"},
    {"cli"},
)
HEIGHT = {part: height for height, layer in enumerate(LAYERS) for part in layer}
# Which parts may import what is heavy or belongs to one job.
OWNERS = {
    "torch": {"model", "training"},
    "transformers": {"model", "training"},
    "peft": {"training"},
    "grpc": {"v1", "client", "service", "cli"},
    "yaml": {"policy"},
    "ruamel": {"policy", "training"},
    "duckdb": {"policy", "audit"},
    "fsspec": {"audit"},
    "ijson": {"audit"},
    "plotly": {"audit"},
    "pyarrow": {"audit"},
    "ray": {"audit"},
    "cryptography": {"keys"},
    "starlette": {"service"},
    "uvicorn": {"service"},
}
MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, ...]]:
    """Every import of a module, those within functions too, as the parts of the imported name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, f"{path}: a relative import"
            yield from (tuple(f"{node.module}.{alias.name}".split(".")) for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_part_imports_itself_and_lower_parts_only(path: Path) -> None:
    """No module of Guard imports a part that stands above its own, or beside it."""
    part = part_of(path)
    ours = {name[1] for name in imports(path) if name[0] == "guard"}
    assert {other for other in ours - {part} if HEIGHT[other] >= HEIGHT[part]} == set()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_heavy_library_is_imported_by_its_owners_only(path: Path) -> None:
    """Each of them is imported by the parts that need it, and no others."""
    libraries = {name[0] for name in imports(path)}
    assert {library for library, owners in OWNERS.items() if part_of(path) not in owners} & libraries == set()
