"""`guard policy …`, as a shell and a pipeline of checks see it."""

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from guard.policy.schema import json_schema
from tests import keys
from tests.cli.command import guard, shell

POLICY = """\
description: For a tutor.
replies:
  crisis-line: You are not alone. Call 988.
rules:
  falcon:
    terms: [project falcon]
    roles: [user]
    action: redirect
    reply: crisis-line
categories:
  violence:
    title: Violence
    hazards: [S1]
    thresholds:
      user: {flag: {max_fpr: 0.02}, block: 0.5}
"""
TESTS = """\
tests:
  - name: Violence is blocked
    scores: {S1: 0.75}
    expect: {action: block, categories: [violence]}
  - name: A falcon is not for talk
    text: Project FALCON?
    scores: {}
    expect: {action: redirect, reply: crisis-line}
  - name: A greeting
    text: Hello, how are you?
    expect: {action: allow}
"""
LIGHT = """
import sys
from guard.cli import app
try:
    app(["policy", "lint", sys.argv[1]])
except SystemExit as exit:
    print(exit.code, sorted({"torch", "grpc", "transformers", "cryptography"} & set(sys.modules)))
"""
WITHOUT_EXTRA = """
import sys
from guard.cli import main
sys.modules["cryptography"] = None
sys.argv = ["guard", "policy", "verify", ".", "--key", "public.pem"]
main()
"""


def write(path: Path, text: str) -> None:
    path.write_text(text)


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    (tmp_path / "tutor.yaml").write_text(POLICY)
    (tmp_path / "tutor_test.yaml").write_text(TESTS)
    return tmp_path / "tutor.yaml"


def test_policies_need_no_heavy_library(policy: Path) -> None:
    """None is imported, and so the answer is there at once."""
    shown = subprocess.run([sys.executable, "-c", LIGHT, policy], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines() == ["1 good, 0 warnings", "0 []"]


async def test_lint_tells_problems_and_warnings_by_place(policy: Path) -> None:
    """Problems exit with 2; what only does nothing exits with 1 where that is asked for."""
    write(policy, POLICY.replace("  crisis-line: You", "  idle: Hm.\n  crisis-line: You"))
    warning = f"warning: {policy}:3:3: replies.idle: no rule and no threshold redirects to it"
    relaxed, strict = await guard("policy", "lint", policy), await guard("policy", "lint", "--strict", policy.parent)
    assert [relaxed.code, strict.code] == [0, 1]
    assert relaxed.out.splitlines() == strict.out.splitlines() == [warning, "1 good, 1 warnings"]
    write(policy, POLICY.replace("action: redirect", "action: redirekt"))
    wrong = await shell("policy", "lint", policy)
    assert wrong.code == 2
    assert wrong.err == (
        f"error: {policy}:8:13: rules.falcon.action: expected one of flag, redirect, block, found 'redirekt'"
        "; did you mean redirect?\n"
    )


async def test_a_directory_is_signed_and_verified(policy: Path, tmp_path: Path) -> None:
    """By keys of the operator; nothing that is not what was signed is judged by."""
    pair = keys.to_sign(tmp_path / ".keys")
    signed = await guard("policy", "sign", tmp_path, "--key", pair.private)
    assert (signed.code, signed.out) == (0, "2 files signed\n")
    good = await guard("policy", "verify", tmp_path, "--key", pair.public)
    assert (good.code, good.out.startswith("2 files, signed at 2")) == (0, True)
    write(policy, POLICY.replace("0.5", "0.6"))
    bad = await guard("policy", "verify", tmp_path, "--key", pair.public)
    assert (bad.code, bad.err) == (2, f"error: {policy}: is not what was signed\n")
    check = await guard("check", "--policies", tmp_path, "Hi!", GUARD_POLICIES_KEY=str(pair.public))
    assert (check.code, check.err) == (bad.code, bad.err)


def test_signatures_say_what_they_need() -> None:
    """Where the extra is not installed, its name."""
    result = subprocess.run([sys.executable, "-c", WITHOUT_EXTRA], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (
        2,
        "error: keys need the extra, pip install 'guard-moderation[crypto]'\n",
    )


async def test_show_resolves_targets(policy: Path) -> None:
    """With what each threshold does on the embedded model; of a shipped policy by its name."""
    shown = (await guard("policy", "show", policy)).out
    (flag,) = [line.split() for line in shown.splitlines() if line.startswith("violence") and " flag " in line]
    assert float(flag[3]) < 0.5
    assert float(flag[5].rstrip("%")) <= 2
    assert "falcon  user   redirect to crisis-line" in shown
    assert (await guard("policy", "show", "children")).out.startswith("children ")
    unknown = await guard("policy", "show", "childen")
    assert (unknown.code, unknown.err) == (
        2,
        "error: policy: no shipped policy is named 'childen'; did you mean children?\n",
    )


async def test_the_schema_is_printed() -> None:
    """As it is shipped."""
    assert (await guard("policy", "schema")).out == json_schema()


async def test_tests_are_run_and_reported(policy: Path, tmp_path: Path) -> None:
    """For people, for programs and for CI servers; 0 when all pass, 1 when some fail, 2 where a file is wrong."""
    passed = await guard("policy", "test", "-v", tmp_path)
    assert passed.code == 0
    assert passed.out.splitlines() == [
        "passed Violence is blocked",
        "passed A falcon is not for talk",
        "skipped A greeting",
        f"{tmp_path}/tutor_test.yaml: 2 passed, 0 failed, 1 skipped (they need --with-model)",
        "tested: 2 of 2 categories and rules",
    ]
    write(tmp_path / "tutor_test.yaml", TESTS.replace("S1: 0.75", "S1: 0.4"))
    failed = await guard("policy", "test", "--json", "--junit", tmp_path / "junit.xml", policy)
    assert failed.code == 1
    (result,) = json.loads(failed.out)
    assert [test["outcome"] for test in result["tests"]] == ["failed", "passed", "skipped"]
    assert result["tests"][0]["failures"] == ["expected block, found flag"]
    assert result["untested"] == ["violence"]
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()[0]
    assert (suite.attrib, [[child.tag for child in case] for case in suite]) == (
        {"name": "tutor", "tests": "3", "failures": "1", "skipped": "1"},
        [["failure"], [], ["skipped"]],
    )
    write(tmp_path / "tutor_test.yaml", TESTS.replace("[violence]", "[violins]"))
    wrong = await guard("policy", "test", policy)
    assert wrong.code == 2
    assert "tests[0].expect.categories[0]: expected one of violence, found 'violins'" in wrong.err


async def test_what_is_found_is_recorded(policy: Path, tmp_path: Path) -> None:
    """After which the tests pass."""
    write(tmp_path / "tutor_test.yaml", TESTS.replace("S1: 0.75", "S1: 0.4"))
    assert (await guard("policy", "test", "--update", policy)).err == "1 recorded\n"
    assert (await guard("policy", "test", policy)).code == 0
    assert "{action: flag, categories:" in (tmp_path / "tutor_test.yaml").read_text()


async def test_the_model_scores_what_has_no_scores(policy: Path) -> None:
    """With the embedded model."""
    result = await guard("policy", "test", "--with-model", "-v", policy)
    assert (result.code, "passed A greeting" in result.out) == (0, True), result


async def test_explain_tells_why_and_what_would_have_changed_it(policy: Path, tmp_path: Path) -> None:
    """From scores, or from an answer that holds them and the rules that matched."""
    scores = json.dumps({"unsafe": 0.3, "hazards": {"S1": 0.4}})
    told = (await guard("policy", "explain", policy, "--scores", "-", stdin=scores.encode())).out.splitlines()
    assert told[0] == "flag user turn"
    assert [line.split() for line in told[2:4]] == [
        ["violence", "flag", "0.400", told[2].split()[3], "reached"],
        ["violence", "block", "0.400", "0.500", "0.100", "below"],
    ]
    assert told[5:] == [
        "stricter with: violence at 0.500 (it is 0.400), block",
        "nearest miss: violence at 0.500 (it is 0.400), block",
    ]
    (tmp_path / "answer.json").write_text(
        json.dumps({"verdict": {"scores": json.loads(scores), "violations": [{"rule": "falcon"}, {"rule": ""}]}})
    )
    answered = (await guard("policy", "explain", policy, "--scores", tmp_path / "answer.json")).out
    texted = (
        await guard("policy", "explain", policy, "--scores", "-", "--text", "Project Falcon", stdin=scores.encode())
    ).out
    assert answered == texted
    assert answered.splitlines()[:2] == ["redirect user turn", "rule falcon matches: redirect to crisis-line"]
    for stdin in (b"[]", b"{}", b'{"unsafe": 2}', b"{"):
        wrong = await guard("policy", "explain", policy, "--scores", "-", stdin=stdin)
        assert (wrong.code, wrong.err.startswith("error: scores: -: should be ")) == (2, True)
