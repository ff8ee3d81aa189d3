"""What docs/http.md says is so."""

import re
import shlex
from pathlib import Path

import httpx
import yaml

from guard.service.http.app import ENDPOINTS
from guard.service.http.openai_moderations import MAPPING
from tests.conftest import Service

GUIDE = (Path(__file__).parents[3] / "docs" / "http.md").read_text(encoding="utf-8")


def test_every_route_is_named() -> None:
    """In the table at the beginning, or in the text."""
    assert {endpoint.path for endpoint in ENDPOINTS if endpoint.path not in GUIDE} == set()


def test_the_mapping_is_that_of_the_code() -> None:
    """Row by row."""
    shown = dict(re.findall(r"^\| `([a-z/-]+)` \| ((?:[SX]\d+|, | and )+) \|$", GUIDE, re.MULTILINE))
    assert shown == {name: " and ".join(", ".join(group) for group in groups) for name, groups in MAPPING.items()}


async def test_the_shown_commands_work(service: Service) -> None:
    """Each is answered."""
    commands = [shlex.split(command) for command in re.findall(r"^\$ (curl .*)$", GUIDE, re.MULTILINE)]
    assert len(commands) == 4
    async with httpx.AsyncClient() as http:
        for _, address, *options in commands:
            given = dict(zip(options[::2], options[1::2], strict=True))
            headers = dict([given["-H"].split(": ")]) if "-H" in given else {}
            url = address.replace("localhost:9090", service.url)
            assert (await http.post(url, content=given["-d"], headers=headers)).status_code == 200


def test_the_shown_configurations_are_yaml() -> None:
    """Of what other software it is for, that has to know."""
    shown = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)]
    assert [set(block) for block in shown] == [{"guardrails"}, {"detectors"}, {"llm"}]
