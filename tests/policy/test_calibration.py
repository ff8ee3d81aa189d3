"""Thresholds from targets: what was measured keeps to them, and what was not is refused."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.errors import ConfigError
from guard.policy.calibration import Calibration, Unresolvable
from guard.policy.store import load_policy
from guard.settings import Settings
from guard.types import Action, Role
from tests.policy.files import CALIBRATION, WHOLE, write

EMBEDDED = Calibration.read(Settings().model)
heads = st.lists(st.sampled_from(sorted(EMBEDDED.curves[Role.USER])), min_size=1, max_size=3, unique=True)


def test_a_target_is_the_mildest_threshold_that_keeps_to_it() -> None:
    """The lowest for a rate of false alarms, the highest for a recall; several heads add up their false alarms."""
    assert CALIBRATION.threshold(Role.USER, ("S1",), "max_fpr", 0.01) == 0.3
    assert CALIBRATION.threshold(Role.USER, ("S1",), "max_fpr", 0.015) == 0.3
    assert CALIBRATION.threshold(Role.USER, ("S1", "S2"), "max_fpr", 0.01) == 0.6
    assert CALIBRATION.threshold(Role.USER, ("S1",), "min_recall", 0.7) == 0.3
    assert CALIBRATION.threshold(Role.USER, ("S1", "S2"), "min_recall", 0.7) == 0.2


@given(heads, st.sampled_from(["max_fpr", "min_recall"]), st.floats(0.001, 0.999))
def test_what_is_resolved_keeps_to_its_target(heads: list[str], target: str, share: float) -> None:
    """On the embedded model: the effect of the threshold is within the target, or there is none such."""
    try:
        threshold = EMBEDDED.threshold(Role.USER, heads, target, share)
    except Unresolvable:
        return
    effect = EMBEDDED.effect(Role.USER, heads, threshold)
    assert effect is not None
    assert effect.fpr <= share if target == "max_fpr" else effect.recall >= share
    assert effect.fpr_interval[0] <= effect.fpr <= effect.fpr_interval[1] or len(heads) > 1


def test_compiled_thresholds_are_numbers(tmp_path: Path) -> None:
    """And a policy is another one on a model with other curves."""
    policy = load_policy(write(tmp_path), CALIBRATION)
    crime = next(category for category in policy.categories if category.name == "crime")
    assert [(step.action, step.score) for step in crime.thresholds[Role.USER]] == [
        (Action.BLOCK, 0.6),
        (Action.FLAG, 0.3),
    ]
    numbers = WHOLE.replace("{max_fpr: 0.03}", "0.3").replace("{max_fpr: 0.01}", "0.6")
    assert load_policy(write(tmp_path, numbers), CALIBRATION).revision == policy.revision
    assert load_policy(write(tmp_path, numbers.replace("0.6}", "0.5}")), CALIBRATION).revision != policy.revision


def test_what_was_not_measured_is_refused() -> None:
    """Another role, another head, and a share better than any that was measured."""
    with pytest.raises(Unresolvable, match=r"^a number, since the model has no curve of S1 for tool turns$"):
        CALIBRATION.threshold(Role.TOOL, ("S1",), "max_fpr", 0.01)
    with pytest.raises(Unresolvable, match=r"^a recall of at most 0\.9, the best that was measured for user turns$"):
        CALIBRATION.threshold(Role.USER, ("S1",), "min_recall", 0.95)
    assert CALIBRATION.effect(Role.USER, ("S1", "X6"), 0.5) is None


def test_a_model_without_curves_has_none_and_a_damaged_file_is_refused(tmp_path: Path) -> None:
    """The file is the operator's, and is named."""
    assert Calibration.read(tmp_path).curves == {}
    for content in ("[]", "{", '{"user": {"S1": {}}}', json.dumps({"user": {"S1": {"points": [{"threshold": "x"}]}}})):
        (tmp_path / "thresholds.json").write_text(content)
        with pytest.raises(ConfigError, match=r"thresholds\.json: holds no curves of thresholds$"):
            Calibration.read(tmp_path)
