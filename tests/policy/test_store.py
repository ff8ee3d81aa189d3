"""Policies as they are served: loaded together, found by name, told apart by revision."""

import shutil
from pathlib import Path

import pytest

from guard.errors import ConfigError, NotFound, PolicyError
from guard.policy.compile import unknown_hazards
from guard.policy.store import PolicyStore, load_policy

ONE = """\
description: For tests.
categories:
  hate:
    title: Hate
    hazards: [S10, X1]
    thresholds:
      user: {flag: 0.5, block: 0.9}
      agent: {flag: 0.4}
  any:
    title: Anything
    score: unsafe
    thresholds: {user: {flag: 0.5}}
"""
# The same, said otherwise.
SAME = """\
# Comments, order, quotes, layout and what is said but would be so anyway.
categories:
  any: {thresholds: {user: {"flag": 5.0e-1}}, title: 'Anything', score: unsafe}
  hate:
    thresholds:
      agent: {flag: 0.40}
      user:
        block: 0.9
        flag: 0.5
    hazards:
      - X1
      - S10
    score: max
    title: Hate
on_error: {agent: block}
description: >-
  For
  tests.
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name in ("default", "kids", "strict"):
        (tmp_path / f"{name}.yaml").write_text(ONE)
    return tmp_path


def test_policies_are_found_by_name(directory: Path) -> None:
    """An empty name is the default policy's; the policies stand in order of name."""
    store = PolicyStore.load(directory, default="kids")
    assert [policy.name for policy in store.policies] == ["default", "kids", "strict"]
    assert store.get("strict").name == "strict"
    assert store.get("") is store.get("kids")
    with pytest.raises(NotFound, match=r"^policy: no policy is named 'strct'; did you mean strict\?$") as caught:
        store.get("strct")
    assert caught.value.field == "policy"
    with pytest.raises(NotFound) as caught:
        store.get("x\n" * 1_000_000)
    assert len(str(caught.value)) < 300


def test_only_policies_are_read(directory: Path) -> None:
    """Hidden files, tests of policies and files of other kinds are passed over."""
    for name in (".strict.yaml", "strict_test.yaml", "README.md"):
        (directory / name).write_text("no policy")
    assert len(PolicyStore.load(directory).policies) == 3


def test_the_problems_of_all_files_are_told_at_once(directory: Path) -> None:
    """One bad file refuses the directory, and no bad file hides another."""
    (directory / "kids.yaml").write_text(ONE.replace("0.9", "9"))
    (directory / "other.yml").write_text(ONE)
    (directory / "strict.yaml").write_text("")
    with pytest.raises(PolicyError) as caught:
        PolicyStore.load(directory)
    assert str(caught.value).splitlines() == [
        f"{directory}/kids.yaml:7:32: categories.hate.thresholds.user.block: expected a number from 0 to 1, found 9",
        f"{directory}/other.yml:1:1: expected a file name such as my-policy.yaml, found 'other.yml'",
        f"{directory}/strict.yaml:1:1: expected a mapping, found an empty file",
    ]


def test_a_directory_that_cannot_serve_is_refused(directory: Path) -> None:
    """No directory, no policies and no default policy are the operator's mistakes, each said plainly."""
    with pytest.raises(ConfigError, match=r"no default policy 'kid' among default, kids, strict; did you mean kids\?$"):
        PolicyStore.load(directory, default="kid")
    with pytest.raises(ConfigError, match=r"/gone: cannot be read: No such file or directory$"):
        PolicyStore.load(directory / "gone")
    shutil.rmtree(directory)
    directory.mkdir()
    with pytest.raises(ConfigError, match=r": expected policies \(\*\.yaml\), found none$"):
        PolicyStore.load(directory)


def test_what_is_written_in_the_same_words_is_not_compiled_again(directory: Path) -> None:
    """A changed file is, and so is all where a file that policies include changed."""
    include = "include: [more_include.yaml]\n"
    more = "replies: {more: More.}\n"
    (directory / "more_include.yaml").write_text(more)
    (directory / "strict.yaml").write_text(include + ONE)
    first = PolicyStore.load(directory)
    assert first.files.keys() == {"default.yaml", "kids.yaml", "strict.yaml", "more_include.yaml"}
    (directory / "kids.yaml").write_text(ONE.replace("0.9", "0.8"))
    second = PolicyStore.load(directory, earlier=first)
    kept = [policy.name for policy in second.policies if first.by_name[policy.name] is policy]
    assert kept == ["default", "strict"]
    assert second.files["kids.yaml"] != first.files["kids.yaml"]
    (directory / "more_include.yaml").write_text(more.replace("More.", "Other."))
    third = PolicyStore.load(directory, earlier=second)
    assert not any(second.by_name[policy.name] is policy for policy in third.policies)


def test_the_revision_is_that_of_the_content(tmp_path: Path) -> None:
    """However a policy is written and named, the same content has the same revision."""
    (tmp_path / "one.yaml").write_text(ONE)
    (tmp_path / "two.yaml").write_text(SAME)
    revision = load_policy(tmp_path / "one.yaml").revision
    assert load_policy(tmp_path / "two.yaml").revision == revision
    assert len(revision) == 16
    assert int(revision, 16) > 0


@pytest.mark.parametrize(
    ("piece", "other"),
    [
        ("For tests", "For all"),
        ("title: Hate", "title: Hatred"),
        ("  hate:", "  hatred:"),
        ("[S10, X1]", "[S10]"),
        ("0.9", "0.91"),
        ("agent:", "tool:"),
        ("{flag: 0.4}", "{block: 0.4}"),
        ("categories:", "on_error: {user: block}\ncategories:"),
        ("categories:", "long_input: window\ncategories:"),
    ],
)
def test_what_changes_a_verdict_changes_the_revision(tmp_path: Path, piece: str, other: str) -> None:
    """Everything that a verdict depends on, or that is shown of a policy, is part of its revision."""
    assert piece in ONE
    path = tmp_path / "one.yaml"
    path.write_text(ONE)
    before = load_policy(path)
    path.write_text(ONE.replace(piece, other, 1))
    assert load_policy(path).revision != before.revision


def test_a_category_of_a_models_own_stands_beside_the_taxonomy(tmp_path: Path) -> None:
    """It feeds a category of a policy as a hazard does, and is missed where the model was not taught it."""
    (tmp_path / "own.yaml").write_text(ONE.replace("[S10, X1]", "[competitors, X1, S10]"))
    policy = load_policy(tmp_path / "own.yaml")
    assert policy.categories[0].hazards == ("S10", "X1", "competitors")
    assert unknown_hazards(policy, ("S10", "X1")) == ("competitors",)


def test_hazards_that_a_model_does_not_score_are_found(directory: Path) -> None:
    """A policy that asks for more than a model scores is known before the first request."""
    policy = load_policy(directory / "kids.yaml")
    assert unknown_hazards(policy, ("S1", "S10")) == ("X1",)
    assert unknown_hazards(policy, ("X1", "S10")) == ()
