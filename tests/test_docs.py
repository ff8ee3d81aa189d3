"""What the README tells people to type, set and look up is there."""

import re
from collections.abc import Iterator
from pathlib import Path

import typer

from guard.cli import app
from guard.model.normalise import undisguise
from guard.policy.calibration import Calibration
from guard.policy.read import read_policy
from guard.policy.store import load_policy, policy_files
from guard.policy.testing import files_of, policy_of, run
from guard.settings import Settings
from guard.training.formats import read_examples

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "policy.md").read_text(encoding="utf-8")
CODE = [block or inline for block, inline in re.findall(r"```console\n(.*?)```|`([^`\n]+)`", README, re.DOTALL)]


def commands() -> dict[str, set[str]]:
    """Every command, as one types it, and its options."""
    found: dict[str, set[str]] = {}

    def walk(name: str, command: object) -> None:
        found[name] = {option for parameter in getattr(command, "params", ()) for option in parameter.opts}
        for child, sub in getattr(command, "commands", {}).items():
            walk(f"{name} {child}", sub)

    walk("guard", typer.main.get_command(app))
    return found


def typed(pattern: str) -> Iterator[str]:
    """What follows a word wherever the README shows something to type."""
    for code in CODE:
        for match in re.finditer(pattern, code):
            yield from match.groups()


def test_documented_commands_exist() -> None:
    """Every `guard …` command of the README is one."""
    names = set(typed(r"(?:^|\s|/)(guard (?:client |policy |rollout )?[a-z]+)\b(?! &&)"))
    assert {"guard serve", "guard client check"} <= names
    assert names - commands().keys() == set()


def test_documented_options_exist() -> None:
    """Every long option of the README is one of some command, `docker` lines aside."""
    shown = {option for code in CODE if "docker" not in code for option in re.findall(r"--[a-z-]+", code)}
    assert "--policies" in shown
    assert shown - set().union(*commands().values()) == {"--help"}


def test_documented_variables_exist() -> None:
    """Every GUARD_ variable of the README is a setting's."""
    variables = set(typed(r"GUARD_([A-Z_]+)\b"))
    assert variables
    assert {variable.lower() for variable in variables} <= Settings.model_fields.keys()


def test_documented_targets_exist() -> None:
    """Every `make …` of the README is a target of the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    shown = {word for words in typed(r"\bmake ((?:[a-z-]+ ?)+)") for word in words.split()}
    assert {"serve", "test"} <= shown
    assert shown - targets == set()


def test_the_shown_policy_is_a_good_one(tmp_path: Path) -> None:
    """The policy of the README loads as it stands."""
    (shown,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "default.yaml").write_text(shown, encoding="utf-8")
    assert load_policy(tmp_path / "default.yaml").categories


def test_linked_files_exist() -> None:
    """Every link of the README to a file of the repository leads somewhere."""
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def examples() -> dict[str, str]:
    """The files of docs/policy.md by their names."""
    blocks = re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)
    named = [re.search(r"^# ([a-z_]+\.yaml)$", block, re.MULTILINE) for block in blocks]
    return {name[1]: block for name, block in zip(named, blocks, strict=True) if name}


def test_every_example_of_the_policy_guide_works(tmp_path: Path) -> None:
    """Each is a policy without problems, a part of one, or tests that pass; the one that warns is shown to."""
    files = examples()
    assert len(files) == GUIDE.count("```yaml") > 10
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    (table,) = re.findall(r"```\n(text,label\n.*?)```", GUIDE, re.DOTALL)
    (tmp_path / "rivals.csv").write_text(table, encoding="utf-8")
    assert {example.unsafe for example in read_examples(tmp_path / "rivals.csv")} == {True, False}
    calibration = Calibration.read(Settings().model)
    warnings: list[str] = []
    for path in policy_files(tmp_path):
        warnings += read_policy(path, calibration).warnings
        assert load_policy(path, calibration).name == path.stem
    (unlearned,) = warnings
    assert f"warning: {unlearned.replace(f'{tmp_path}/', '')}\n" in GUIDE
    (tests,) = files_of(tmp_path)
    result = run(tests, load_policy(policy_of(tests), calibration), lambda text: {text, undisguise(text)})
    assert (len(result.outcomes), result.failed, result.skipped, result.untested) == (5, 0, 1, ())


def test_commands_of_the_policy_guide_exist() -> None:
    """With the options that it names."""
    known = commands()
    shown = set(re.findall(r"guard policy [a-z]+", GUIDE))
    assert {"guard policy lint", "guard policy test"} <= shown
    assert shown <= known.keys()
    options = set(re.findall(r"(?<!-)--[a-z][a-z-]+", GUIDE))
    assert options <= set().union(*known.values())
