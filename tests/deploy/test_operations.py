"""What the guide to operations tells people to type, set and follow is there."""

import re

import yaml

from tests.deploy.chart import DEPLOY, guard_of, rendered
from tests.test_docs import commands

FILE = DEPLOY.parent / "docs" / "operations.md"
TEXT = FILE.read_text(encoding="utf-8")


def test_its_commands_exist() -> None:
    shown = set(re.findall(r"guard (?:client|policy|rollout) [a-z]+|guard sidecar|guard serve", TEXT))
    assert {"guard policy sign", "guard sidecar"} <= shown <= commands().keys()


def test_its_links_lead_somewhere() -> None:
    """To files, and to sections of files."""
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", TEXT):
        path, _, anchor = link.partition("#")
        target = FILE.parent / path if path else FILE
        assert target.exists()
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_its_values_are_taken() -> None:
    (shown,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    assert guard_of(rendered(yaml.safe_load(shown)))
