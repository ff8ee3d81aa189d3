"""Numbers that are written into a policy: they are all that changes in it."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from guard.policy.document import Loc
from guard.policy.edit import edited
from guard.policy.read import read_policy
from tests.policy.files import CALIBRATION, CRISIS, WHOLE, write

HATE, CRIME = ("categories", "hate", "thresholds", "user"), ("categories", "crime", "thresholds", "user")
CRISES = ("categories", "self-harm", "thresholds", "user", "redirect", "at")


def texts(path: Path, numbers: Mapping[Loc, float]) -> dict[str, str]:
    """The files that change, by name, as they would be."""
    before, after = edited(path, read_policy(path, CALIBRATION).spec, numbers)
    assert before == {file: file.read_bytes().decode() for file in after}
    return {file.name: text for file, text in after.items()}


def test_only_numbers_change(tmp_path: Path) -> None:
    """Comments, order, quotes and spaces stay; targets give way to numbers, and a redirect keeps its reply."""
    whole = WHOLE.replace("{max_fpr: 0.03},", "{max_fpr: 0.03 } ,") + "# the  end\n"
    path = write(tmp_path, whole)
    numbers: dict[Loc, float] = {(*HATE, "redirect", "at"): 0.812345, (*HATE, "block"): 1.0, (*CRIME, "flag"): 0.000001}
    changed = texts(path, numbers)["whole.yaml"]
    wanted = whole.replace("at: 0.75", "at: 0.812345").replace("block: 0.9", "block: 1.0")
    assert changed == wanted.replace("{max_fpr: 0.03 } ,", "0.000001 ,")
    path.write_text(changed)
    thresholds = read_policy(path, CALIBRATION).spec.categories["crime"].thresholds["user"]
    assert thresholds.flag == 0.000001


def test_what_stands_in_an_included_file_is_changed_there(tmp_path: Path) -> None:
    """And a file that holds none of the places is left alone."""
    path = write(tmp_path)
    assert texts(path, {CRISES: 0.5}) == {"crisis_include.yaml": CRISIS.replace("{min_recall: 0.6}", "0.5")}
    assert texts(path, {}) == {}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_files_of_every_editor_stay_as_they_are(tmp_path: Path, start: str, end: str) -> None:
    """With a byte order mark, with Windows' line ends, and with mappings over several lines and their comments."""
    block = (
        "      user:\n        flag:\n          max_fpr: 0.03  # of harmless\n        # stricter\n        block: 0.9\n"
    )
    whole = WHOLE.replace("      user: {flag: {max_fpr: 0.03}, block: {max_fpr: 0.01}}\n", block)
    assert block in whole
    path = write(tmp_path)
    path.write_bytes(f"{start}{whole}".replace("\n", end).encode())
    changed = texts(path, {(*CRIME, "flag"): 0.25, (*CRIME, "block"): 0.5})["whole.yaml"]
    wanted = whole.replace("max_fpr: 0.03  #", "0.25  #").replace(
        "# stricter\n        block: 0.9", "# stricter\n        block: 0.5"
    )
    assert changed == f"{start}{wanted}".replace("\n", end)
    path.write_bytes(changed.encode())
    thresholds = read_policy(path, CALIBRATION).spec.categories["crime"].thresholds["user"]
    assert (thresholds.flag, thresholds.block) == (0.25, 0.5)
