"""Categories of one's own: what a policy says of its examples, and what stands beside it once they were learned."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from guard.errors import ConfigError, PolicyError
from guard.policy.decide import decide
from guard.policy.examples import few
from guard.policy.heads import check_model, digest, heads_file, make_head, read_heads, write_heads
from guard.policy.read import read_policy
from guard.policy.store import PolicyStore, load_policy
from guard.policy.testing import files_of, run
from guard.types import DEFINITIONS, HAZARDS, Action, Described, Head, ModelInfo, Revision, Role, Scores
from tests.policy.files import CALIBRATION

SHOP = """\
description: For a shop.
categories:
  rivals:
    title: Competitors' products
    examples: rivals.csv
    thresholds:
      user: {flag: 0.25, block: 0.5}
  hate:
    title: Hate
    hazards: [S10]
    thresholds:
      user: {block: 0.5}
"""
TESTS = """\
tests:
  - name: A rival is not for talk
    scores: {rivals: 0.75}
    expect: {action: block, categories: [rivals], scores: {rivals: [0.7, 0.8]}}
"""
EXAMPLES = "text,label\nIs the Aurix any better?,1\nWhere is my order?,0\n"
MODEL = ModelInfo(Revision("guard", "00ff"), "cpu", "float32", "torch", 1, 2048, ("S10",))


def head(policy: Path, category: str = "rivals", bias: float = 0.5, model: str = "00ff") -> Head:
    weight = np.array([0.25, -1.0], np.float32)
    return make_head(category, model, digest(policy.with_name("rivals.csv")) or "", weight, bias)


def said(policy: Path) -> str:
    """The warnings about a policy, or the problems, without the folder."""
    try:
        found = "\n".join(read_policy(policy, CALIBRATION).warnings)
    except PolicyError as error:
        found = str(error)
    return found.replace(f"{policy.parent}/", "")


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    (tmp_path / "rivals.csv").write_text(EXAMPLES)
    (tmp_path / "shop.yaml").write_text(SHOP)
    (tmp_path / "shop_test.yaml").write_text(TESTS)
    return tmp_path / "shop.yaml"


def test_heads_are_read_as_they_were_written(shop: Path) -> None:
    """To the bit; and there are none where no file is."""
    assert read_heads(shop) == {}
    written = {"rivals": head(shop), "cats": head(shop, "cats", 0.1)}
    write_heads(shop, written)
    found = read_heads(shop)
    assert [found[name] for name in written] == list(written.values())
    assert (found["rivals"].weight, found["rivals"].bias) == ((0.25, -1.0), 0.5)
    assert found["rivals"].examples == digest(shop.with_name("rivals.csv"))


def test_other_weights_go_by_another_name(shop: Path) -> None:
    """So that no logged score is ever taken for that of another head; what was learned is part of the revision."""
    one, other = head(shop), head(shop, bias=0.25)
    assert one.name.startswith("rivals-")
    assert len({one.name, other.name, head(shop, model="0f0f").name}) == 3
    revisions = set()
    for written in (one, other, replace(one, examples="others")):
        write_heads(shop, {"rivals": written})
        revisions.add(load_policy(shop).revision)
    assert len(revisions) == 2


def test_before_it_is_learned_a_category_is_checked_and_tested(shop: Path) -> None:
    """By its name, as after; a warning says what is still to be done."""
    assert said(shop) == (
        "shop.yaml:5:15: categories.rivals.examples: the model has learned nothing from them yet; "
        "run: guard policy fit shop.yaml"
    )
    for _ in range(2):
        (tests,) = files_of(shop)
        result = run(tests, load_policy(shop), lambda text: [text])
        assert (result.failed, result.outcomes[0].judged and result.outcomes[0].judged.scores["rivals"]) == (0, 0.75)
        write_heads(shop, {"rivals": head(shop)})
    assert said(shop) == ""


def test_examples_that_have_changed_are_told(shop: Path) -> None:
    """Where they are not shipped with the policy there is nothing to compare."""
    write_heads(shop, {"rivals": head(shop)})
    shop.with_name("rivals.csv").write_text(EXAMPLES + "What about Tessaro?,1\n")
    assert "the model has learned from other ones; run: guard policy fit" in said(shop)
    shop.with_name("rivals.csv").unlink()
    assert said(shop) == ""


def test_examples_that_nobody_has_are_a_problem(shop: Path) -> None:
    """At their place."""
    shop.with_name("rivals.csv").unlink()
    assert said(shop) == (
        "shop.yaml:5:15: categories.rivals.examples: expected a file beside the policy, found no rivals.csv"
    )


BESIDE = "expected neither hazards nor another score beside `examples`, found"
NO_FILE = "expected a .csv or .jsonl file beside the policy, found"
MISTAKES = {
    "a directory": (
        "rivals.csv",
        "../rivals.csv",
        f"5:15: categories.rivals.examples: {NO_FILE} '../rivals.csv'",
    ),
    "another format": ("rivals.csv", "rivals.txt", f"5:15: categories.rivals.examples: {NO_FILE} 'rivals.txt'"),
    "nothing": ("rivals.csv", "", "5:5: categories.rivals.examples: expected a value, found nothing"),
    "hazards": ("rivals.csv", "rivals.csv\n    hazards: [S5]", f"6:14: categories.rivals.hazards: {BESIDE} a list"),
    "a score": (
        "rivals.csv",
        "rivals.csv\n    score: unsafe",
        f"3:3: categories.rivals.hazards: {BESIDE} an empty list",
    ),
    "a target": (
        "flag: 0.25",
        "flag: {max_fpr: 0.01}",
        "7:20: categories.rivals.thresholds.user.flag: expected a number, as `guard policy fit` finds it, since no "
        "model was measured on your own category, found {max_fpr: 0.01}",
    ),
}


@pytest.mark.parametrize(("piece", "mistake", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_placed_and_named(shop: Path, piece: str, mistake: str, message: str) -> None:
    """As everywhere in a policy."""
    shop.write_text(SHOP.replace(piece, mistake))
    assert said(shop) == f"shop.yaml:{message}"


@pytest.mark.parametrize("damage", ["garbage", "nothing", "no tensor", "no number", "no revision"])
def test_a_damaged_file_of_heads_is_refused(shop: Path, damage: str) -> None:
    """Whatever is wrong with it, by its name."""
    write_heads(shop, {"rivals": head(shop)})
    path = heads_file(shop)
    tensors = {"rivals.weight": np.zeros(2, np.float32), "rivals.bias": np.zeros(1, np.float32)}
    metadata = {"rivals": json.dumps({"model": "00ff", "examples": ""})}
    match damage:
        case "garbage":
            path.write_bytes(b"\0" * 100)
        case "nothing":
            path.write_bytes(b"")
        case "no tensor":
            save_file({"cats.weight": tensors["rivals.weight"]}, path, metadata)
        case "no number":
            save_file(tensors | {"rivals.bias": np.array([np.nan], np.float32)}, path, metadata)
        case "no revision":
            save_file(tensors, path, {"rivals": "{}"})
    assert said(shop) == (
        "shop.yaml:5:15: categories.rivals.examples: shop_heads.safetensors: expected heads as `guard policy fit` "
        "writes them, found something else"
    )


def test_only_the_model_that_has_learned_a_category_serves_it(shop: Path) -> None:
    """To another one the policy is refused, with the command that teaches it."""
    with pytest.raises(ConfigError) as unlearned:
        check_model(load_policy(shop), MODEL)
    write_heads(shop, {"rivals": head(shop, model="beef")})
    with pytest.raises(ConfigError) as other:
        check_model(load_policy(shop), MODEL)
    write_heads(shop, {"rivals": head(shop)})
    check_model(load_policy(shop), MODEL)
    with pytest.raises(ConfigError) as lacking:
        check_model(load_policy(shop), replace(MODEL, hazards=("S1",)))
    assert [str(caught.value) for caught in (unlearned, other, lacking)] == [
        "policy shop: no model has learned rivals from its examples yet; run: guard policy fit shop.yaml",
        "policy shop: rivals was learned by model beef, which is not guard 00ff; run: guard policy fit shop.yaml",
        "policy shop: guard does not score S10",
    ]


def test_a_store_has_the_heads_of_all_its_policies(shop: Path) -> None:
    """Each once, and a policy judges by its own."""
    write_heads(shop, {"rivals": head(shop), "gone": head(shop, "gone")})
    other = shop.with_name("other.yaml")
    other.write_text(SHOP.replace("rivals:", "cats:"))
    write_heads(other, {"cats": head(other, "cats")})
    same = shop.with_name("same.yaml")
    same.write_text(SHOP)
    write_heads(same, {"rivals": head(same)})
    store = PolicyStore.load(shop.parent, "shop")
    assert [one.name for one in store.heads] == [head(shop, "cats").name, head(shop).name]
    scores = Scores(0.0, {"S10": 0.0, head(shop).name: 0.75, head(shop, "cats").name: 0.0})
    assert [decide(policy, Role.USER, scores)[0] for policy in store.policies] == [
        Action.ALLOW,
        Action.BLOCK,
        Action.BLOCK,
    ]


ASKED = """\
description: For a shop that asks a Llama Guard.
categories:
  discounts:
    title: Discounts
    definition: Promises a discount.
    score: asked
    thresholds:
      agent: {block: 0.5}
  gore:
    title: Gore
    hazards: [X2, S10]
    thresholds:
      user: {block: 0.5}
"""
ASKABLE = replace(MODEL, asks=3)


def test_a_model_that_can_be_asked_needs_to_have_learned_nothing(shop: Path) -> None:
    """Neither from examples, nor hazards of the taxonomy: all of it stands in the policy in words."""
    policy = load_policy(shop)
    check_model(policy, ASKABLE)
    rivals = Described(
        "rivals", "Competitors' products", "", (("Is the Aurix any better?", True), ("Where is my order?", False))
    )
    assert policy.described == (Described("S10", "Hate", DEFINITIONS["S10"]), rivals)
    (shop.with_name("rivals.csv")).unlink()
    write_heads(shop, {"rivals": head(shop)})
    (described,) = load_policy(shop).described[1:]
    assert described.name.startswith("rivals-")  # by which the model's answer is found, as a head's would be
    assert described.examples == ()


def test_a_category_that_is_only_asked_for(shop: Path) -> None:
    """A Llama Guard is asked; no other model can serve it, and it says so."""
    shop.write_text(ASKED)
    policy = load_policy(shop)
    check_model(policy, ASKABLE)
    assert [one.name for one in policy.described] == ["S10", "X2", "discounts"]
    action, (violation,) = decide(policy, Role.AGENT, Scores(0.9, {"discounts": 0.75, "S10": 0.0, "X2": 0.0}))
    assert (action, violation.category, violation.score) == (Action.BLOCK, "discounts", 0.75)
    with pytest.raises(PolicyError, match="guard is no Llama Guard checkpoint, which can be asked for discounts"):
        check_model(policy, MODEL)
    with pytest.raises(PolicyError, match="can be asked for 1 categories beside its own, not 2"):
        check_model(policy, replace(MODEL, asks=1))


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ("score: asked\n    hazards: [S1]", "expected no hazards beside `score: asked`"),
        ("score: asked\n    examples: rivals.csv", "expected neither hazards nor another score beside `examples`"),
    ],
)
def test_what_is_asked_for_is_fed_by_nothing_else(shop: Path, wrong: str, problem: str) -> None:
    shop.write_text(ASKED.replace("score: asked", wrong))
    assert problem in said(shop)


def test_what_is_asked_for_has_thresholds_in_numbers(shop: Path) -> None:
    shop.write_text(ASKED.replace("agent: {block: 0.5}", "agent: {block: {max_fpr: 0.01}}"))
    assert "expected a number, since no model was measured on a category in words" in said(shop)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "text,label\nyes one,1\nno,0\n,1\nnot said,\nyes two,unsafe\n" + "yes,1\n" * 9),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "yes one"}], "label": "unsafe"}\nnot JSON\n'
         '{"turns": [{"role": "user", "content": "no"}], "unsafe": 0}\n[]\n{"messages": [1], "label": 1}\n'
         '{"text": "yes\\ntwo", "label": 1}\n{"text": "yes", "label": 1}\n{"text": "too many", "label": 1}\n'),
    ],
)  # fmt: skip
@pytest.mark.parametrize("zipped", [False, True])
def test_a_few_examples_are_shown(name: str, content: str, zipped: bool) -> None:
    """The first three of either label that say what they are, short ones, each on a line."""
    data = gzip.compress(content.encode()) if zipped else content.encode()
    shown = few(name + ".gz" * zipped, data)
    assert shown == (("yes one", True), ("yes two", True), ("yes", True), ("no", False))
    assert few(name, b"text,label\n" + b"x" * 301 + b",1\n") == ()
    assert few(name + ".gz", b"not zipped") == ()
    assert few(name, "\xff".encode("latin-1")) == ()


def test_every_hazard_is_told_in_words() -> None:
    assert list(DEFINITIONS) == list(HAZARDS)
