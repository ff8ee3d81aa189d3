"""`guard policy fit`, from a file of examples to a policy that blocks by them; on a model of random weights."""

from pathlib import Path

import pytest

from guard.policy.heads import read_heads
from tests.cli.command import Result, guard
from tests.training.untrained import write_model

SHOP = """\
# Ours.
description: For a shop.
categories:
  fruit:    # sells well
    title: Fruit
    examples: fruit.csv
    thresholds:
      user: {flag: 0.01, block: 0.5}  # to be fitted
  hate:
    title: Hate
    hazards: [S10]
    thresholds:
      user: {block: 0.5}
"""


def table(apples: range, nuts: range) -> str:
    return "\n".join(["text,label", *(f"apple {n},1" for n in apples), *(f"{n} nuts,0" for n in nuts), ""])


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    write_model(tmp_path / "model")
    (tmp_path / "fruit.csv").write_text(table(range(30), range(30)))
    (tmp_path / "others.csv").write_text(table(range(30, 60), range(30, 70)))
    (tmp_path / "shop.yaml").write_text(SHOP)
    return tmp_path / "shop.yaml"


def content(path: Path) -> str:
    return path.read_text()


async def run(shop: Path, *arguments: str | Path) -> Result:
    return await guard("policy", "fit", shop, *arguments, "--model", shop.parent / "model")


async def test_a_category_is_learned_and_its_threshold_fitted(shop: Path) -> None:
    """Once; with a warning where rows are few, and nothing else of the file changes."""
    learned = await run(shop)
    assert learned.code == 0, learned
    said, written = learned.out.splitlines()
    assert said.startswith("fruit: learned from 30 of it and 30 others; AUPRC ")
    assert written == f"written: {shop.parent}/shop_heads.safetensors"
    head = read_heads(shop)["fruit"]
    assert (await run(shop)).out == "nothing to learn; thresholds are fitted to rows, with --max-fpr or --min-recall\n"

    target = (shop.parent / "others.csv", "--category", "fruit", "--max-fpr", "0.05")
    shown = await run(shop, *target, "--dry-run")
    assert content(shop) == SHOP
    fitted = await run(shop, *target)
    assert fitted.code == 0, fitted
    heading, row, warning, wrote = fitted.out.splitlines()
    assert heading.split()[:5] == ["category", "role", "action", "was", "now"]
    assert row.split()[:4] == ["fruit", "user", "block", "0.5"]
    assert row.endswith("of 30")
    assert warning == (
        "warning: fruit of user turns: 40 harmless rows are too few for a rate of 0.05, and tell at best 0.072 with "
        "95 % confidence; it takes 59"
    )
    assert wrote == f"written: {shop}"
    before, after = SHOP.splitlines(), content(shop).splitlines()
    ((number, old, new),) = [(n, a, b) for n, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    assert (number, new.replace(new.split("block: ")[1].split("}")[0], "0.5")) == (7, old)
    assert [f"-{old}", f"+{new}"] == [line for line in shown.out.splitlines() if line[0] in "+-" and line[1] == " "]
    assert read_heads(shop)["fruit"] == head


async def test_rows_that_were_learned_from_fit_no_threshold(shop: Path) -> None:
    """Their scores promise too much."""
    (shop.parent / "others.csv").write_text(table(range(60), range(70)))
    fitted = await run(shop, shop.parent / "others.csv", "--category", "fruit", "--max-fpr", "0.5", "--action", "flag")
    assert "warning: 60 rows are left out, as fruit was learned from them\n" in fitted.out
    assert "of 40" in fitted.out
    only = await run(shop, shop.parent / "fruit.csv", "--category", "fruit", "--max-fpr", "0.5")
    assert (only.code, only.err) == (2, "error: fruit was learned from every row; thresholds need other ones\n")


async def test_what_was_learned_is_not_served_by_another_model(shop: Path) -> None:
    """It is refused with the command that teaches the other one, and then taught."""
    tests = "tests:\n  - {name: One, text: apple 7, expect: {action: block}}\n"
    shop.with_name("shop_test.yaml").write_text(tests)
    await run(shop)
    write_model(shop.parent / "other", seed=2)
    model = ("--model", shop.parent / "other")
    refused = await guard("policy", "test", "--with-model", shop, *model)
    assert refused.code == 2
    assert refused.err.startswith("error: policy shop: fruit was learned by model ")
    assert refused.err.endswith("; run: guard policy fit shop.yaml\n")
    assert "learned from 30 of it" in (await guard("policy", "fit", shop, *model)).out
    assert (await guard("policy", "test", "--with-model", "--update", shop, *model)).code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("others.csv",), "thresholds need rows, and either --max-fpr or --min-recall"),
        (("--max-fpr", "0.01"), "thresholds need rows, and either --max-fpr or --min-recall"),
        (
            ("others.csv", "--max-fpr", "0.01", "--min-recall", "0.9"),
            "thresholds need rows, and either --max-fpr or --min-recall",
        ),
        (("others.csv", "--max-fpr", "1"), "max-fpr: should lie between 0 and 1, found 1"),
        (
            ("others.csv", "--max-fpr", "0.1", "--category", "friut"),
            "category: expected one of fruit, hate, found 'friut'; did you mean fruit?",
        ),
        (
            ("others.csv", "--max-fpr", "0.1"),
            "30 rows are labelled 1 and name no categories: name them, or say with --category which one the label is "
            "about",
        ),
        (
            ("others.csv", "--max-fpr", "0.1", "--category", "hate", "--action", "flag"),
            "no threshold of the policy is asked for",
        ),
    ],
)
async def test_what_cannot_be_fitted_is_said(shop: Path, arguments: tuple[str, ...], message: str) -> None:
    """In one line, and the policy stays as it is."""
    found = await run(shop, *(shop.parent / one if one.endswith(".csv") else one for one in arguments))
    assert (found.code, found.err) == (2, f"error: {message}\n")
    assert content(shop) == SHOP


async def test_too_few_examples_are_refused(shop: Path) -> None:
    """With the figure, and nothing is written."""
    (shop.parent / "fruit.csv").write_text(table(range(5), range(30)))
    found = await run(shop)
    assert (found.code, found.err) == (
        2,
        "error: fruit: expected at least 20 different rows of either label, found 5 of the category and 30 others\n",
    )
    assert not shop.with_name("shop_heads.safetensors").exists()
