"""Thresholds of a policy file replaced by numbers, with every other character as its author wrote it."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import yaml
from yaml.nodes import MappingNode, Node

from guard.policy.document import Loc
from guard.policy.schema import PolicySpec

Texts = dict[Path, str]


def edited(path: Path, spec: PolicySpec, numbers: Mapping[Loc, float]) -> tuple[Texts, Texts]:
    """The files of a policy that hold values at these places, by path: as they are, and with the numbers there.

    The policy is a good one, and the places are in its categories, each in the policy's file or in an included one.
    """
    before: Texts = {}
    spots = defaultdict[Path, list[tuple[int, int, str]]](list)
    for file in (path, *(path.with_name(name) for name in spec.include)):
        text = file.read_bytes().decode()  # as it is, to the ends of its lines
        root = yaml.compose(text, Loader=yaml.CSafeLoader)
        assert root is not None  # or it would be no policy
        skipped = text.startswith("\ufeff")  # which no mark counts
        for loc, number in numbers.items():
            if node := _at(root, loc):
                before[file] = text
                value = np.format_float_positional(number, trim="0")
                spots[file].append((skipped + node.start_mark.index, skipped + _end(node), value))
    after = {}
    for file, text in before.items():
        for start, end, value in sorted(spots[file], reverse=True):
            text = text[:start] + value + text[end:]
        after[file] = text
    return before, after


def _at(node: Node, loc: Loc) -> Node | None:
    for part in loc:
        values: list[Node] = [value for key, value in node.value if key.value == part]
        if not values:
            return None
        (node,) = values
    return node


def _end(node: Node) -> int:
    """Of a mapping in several lines, where its last value ends: its own mark lies behind the comments that follow."""
    if isinstance(node, MappingNode) and not node.flow_style:
        return _end(node.value[-1][1])
    end: int = node.end_mark.index
    return end
