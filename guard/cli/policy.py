"""`guard policy …`: policies are checked, shown, tested and explained without a server, and mostly without a model."""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal
from xml.etree import ElementTree

import typer

from guard.errors import ConfigError, InputError, PolicyError

if TYPE_CHECKING:
    from rich.text import Text

    from guard.policy.calibration import Calibration, Effect
    from guard.policy.compile import Policy
    from guard.policy.testing import Model as Scorer
    from guard.policy.testing import Result
    from guard.types import Action, Reply, Scores, Violation

app = typer.Typer(
    name="policy", help="Check, show, test and explain policies.", no_args_is_help=True, rich_markup_mode=None
)

Model = Annotated[
    Path | None, typer.Option(help="Directory of the model that targets such as max_fpr are for.", show_default=False)
]
Named = Annotated[str, typer.Argument(metavar="NAME|FILE", help="A shipped policy, or the file of any other.")]
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="A directory of policies.")]
Paths = Annotated[list[Path], typer.Argument(help="Files, or directories of them.")]
Role = Annotated[Literal["user", "agent", "system", "tool"], typer.Option(help="Whose turn it is.")]


@app.command()
def lint(
    paths: Paths,
    model: Model = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 where there are warnings.")] = False,
) -> None:
    """Check policies: every problem, and what in them does nothing, by file, line and column.

    Exits with 2 where there are problems, else with 0.
    """
    from guard.policy.read import read_policy

    measured = calibration(model)
    problems, warnings = dict[str, None](), dict[str, None]()  # what several policies include is told once
    policies = _policies(paths)
    for path in policies:
        try:
            warnings |= dict.fromkeys(read_policy(path, measured).warnings)
        except PolicyError as error:
            problems |= dict.fromkeys(str(error).splitlines())
    for line in warnings:
        typer.echo(f"warning: {line}")
    if problems:
        raise PolicyError("\n".join(problems))
    typer.echo(f"{len(policies)} good, {len(warnings)} warnings")
    raise typer.Exit(int(strict and bool(warnings)))


@app.command()
def show(policy: Named, model: Model = None) -> None:
    """Show a policy as it is served: targets as numbers, and what each threshold does as measured on the model.

    FPR is the share of harmless turns that reach it, at most; recall is the share of harmful ones, at least; each with
    the 95 % interval of what was measured.
    """
    from guard.cli import render

    measured = calibration(model)
    served = load(policy, measured)
    console = render.terminal()
    mode = "shadow" if served.shadow else "enforce"
    history = "all" if served.history is None else f"{served.history} turns"
    console.print(
        f"{served.name} {served.revision}. {served.description}\nmode {mode}, history {history}", soft_wrap=True
    )
    console.print(_thresholds(served, measured))
    if served.rules:
        table = render.columns("rule", "roles", "action", "counts as", "looks for")
        for rule in served.rules:
            looks = rule.pattern or f"{len(rule.terms)} terms"
            action = _said(rule.action, rule.reply)
            table.add_row(rule.name, " ".join(sorted(rule.roles)), action, rule.category, looks)
        console.print(table)
    errors = ", ".join(f"{role} {action.name.lower()}" for role, action in served.on_error.items())
    console.print(f"on error: {errors}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of policies, by which editors complete and check them."""
    from guard.policy.schema import json_schema

    typer.echo(json_schema(), nl=False)


@app.command("test")
def run_tests(
    paths: Paths,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Name every test.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the results as JUnit XML.")] = None,
    with_model: Annotated[
        bool, typer.Option("--with-model", help="Also run the tests that the model must score.")
    ] = False,
    model: Model = None,
    update: Annotated[bool, typer.Option("--update", help="Write what is found into failing expectations.")] = False,
) -> None:
    """Run the tests beside policies, NAME_test.yaml; given as such, as policies or as directories.

    Exits with 0 when all pass, with 1 when some fail, and with 2 where a file is wrong.
    """
    from guard.policy import testing
    from guard.policy.store import load_policy

    files = [file for path in paths for file in testing.files_of(path)]
    if not files:
        raise ConfigError(f"{paths[0]}: expected tests (*_test.yaml), found none")
    measured = calibration(model)
    results, problems = [], dict[str, None]()
    for file in files:
        try:
            served = load_policy(testing.policy_of(file), measured)
            with _scorer(served, model) if with_model else _nothing() as scorer:
                results.append(testing.run(file, served, _views, scorer))
        except PolicyError as error:
            problems |= dict.fromkeys(str(error).splitlines())
    if as_json:
        typer.echo(json.dumps([_as_json(result) for result in results], indent=2))
    else:
        for result in results:
            _print(result, verbose)
    if junit:
        _write_junit(junit, results)
    if problems:
        raise PolicyError("\n".join(problems))
    if update:
        typer.echo(f"{sum(map(testing.update, results))} recorded", err=True)
    raise typer.Exit(int(any(result.failed for result in results) and not update))


@app.command()
def explain(
    policy: Named,
    scores: Annotated[
        str, typer.Option(metavar="FILE", help="JSON of scores, or of an answer with them; - is standard input.")
    ],
    role: Role = "user",
    text: Annotated[str, typer.Option(help="The turn, for the rules.")] = "",
    metadata: Annotated[list[str], typer.Option(metavar="KEY=VALUE", help="The request's, for the overlays.")] = [],  # noqa: B006 # never changed
    model: Model = None,
) -> None:
    """Explain a verdict: which rule or score against which threshold, the nearest miss, and what would have changed it.

    Scores are {"unsafe": 0.2, "hazards": {"S1": 0.1, …}}, as in the answers of `guard check --json`, which do as well;
    hazards that are left out are 0.
    """
    from guard.cli import render
    from guard.policy.explain import explain
    from guard.types import Role

    served = load(policy, calibration(model))
    given, matched = _scores(served, scores)
    pairs = [pair.partition("=") for pair in metadata]
    if wrong := [key for key, equals, _ in pairs if not equals]:
        raise InputError("metadata", f"should be KEY=VALUE, found '{wrong[0]}'")
    hits = matched | served.matcher.hits(_views(text))
    told = explain(served, Role(role), given, hits, {key: value for key, _, value in pairs})
    console = render.terminal()
    console.print(f"{told.action.name.lower()} {role} turn" + (" (in shadow)" if served.shadow else ""))
    for violation in told.violations:
        if violation.rule:
            action = _said(violation.action, violation.reply)
            console.print(f"rule {violation.rule} matches: {action}")
    table = render.columns("category", "action", "score", "threshold", "")
    for step in told.steps:
        gap = "reached" if step.gap <= 0 else f"{step.gap:.3f} below"
        table.add_row(step.category, step.action.name.lower(), f"{step.score:.3f}", f"{step.threshold:.3f}", gap)
    console.print(table)
    if told.decisive:
        console.print("milder without: " + "; ".join(map(_ground, told.decisive)), soft_wrap=True)
    for what, missed in (("stricter with", told.stricter), ("nearest miss", told.nearest)):
        if missed is not None:
            needs = (
                f"{missed.category} at {missed.threshold:.3f} (it is {missed.score:.3f}), {missed.action.name.lower()}"
            )
            console.print(f"{what}: {needs}", soft_wrap=True)


@app.command()
def sign(directory: Directory, key: Annotated[Path, typer.Option(help="An ed25519 private key, PEM.")]) -> None:
    """Sign all files of a directory of policies, for servers with --policies-key.

    Writes manifest.json, which holds their hashes, and its signature manifest.sig beside them. A key is made by
    openssl genpkey -algorithm ed25519 -out private.pem, its public part by openssl pkey -in private.pem -pubout.
    """
    from guard.policy import bundle

    typer.echo(f"{bundle.sign(directory, key)} files signed")


@app.command()
def verify(directory: Directory, key: Annotated[Path, typer.Option(help="An ed25519 public key, PEM.")]) -> None:
    """Check that a directory of policies is what was signed. Exits with 2 and tells what is not, or with 0."""
    from guard.policy.bundle import Signatures

    bundle = Signatures(key).open(directory)
    typer.echo(f"{len(bundle.files)} files, signed at {bundle.signed.isoformat(timespec='seconds')}")


def calibration(model: Path | None) -> "Calibration":
    """What was measured on that model, or on the embedded one."""
    from guard.policy.calibration import Calibration
    from guard.settings import Settings

    return Calibration.read(model or Settings().model)


def _policies(paths: Iterable[Path]) -> list[Path]:
    from guard.policy.store import policy_files

    return [file for path in paths for file in (policy_files(path) if path.is_dir() else [path])]


def load(policy: str, measured: "Calibration") -> "Policy":
    """A file, or else one of the policies that come with Guard."""
    from guard.policy.store import load_policy

    return load_policy(find(policy), measured)


def find(policy: str) -> Path:
    """A file, or else that of one of the policies that come with Guard."""
    from guard.policy.messages import did_you_mean
    from guard.policy.store import policy_files
    from guard.settings import Settings

    if Path(policy).suffix:
        return Path(policy)
    shipped = {path.stem: path for path in policy_files(Settings().policies)}
    if policy not in shipped:
        raise InputError("policy", f"no shipped policy is named '{policy}'{did_you_mean(policy, shipped)}")
    return shipped[policy]


def _views(text: str) -> set[str]:
    """As the engine has them."""
    from guard.model.normalise import undisguise

    return {text, undisguise(text)}


def _thresholds(policy: "Policy", measured: "Calibration") -> object:
    from guard.cli import render

    table = render.columns("category", "role", "action", "from", "FPR (95 %)", "recall (95 %)", "fed by")
    parts = [("", category.name, category.thresholds) for category in policy.categories]
    for overlay in policy.overlays:
        when = ", ".join(f"{key}: {value}" for key, value in overlay.when)
        parts += [(f" ({when})", name, thresholds) for name, thresholds in overlay.thresholds.items()]
    categories = {category.name: category for category in policy.categories}
    for suffix, name, by_role in parts:
        category = categories[name]
        feeds = " ".join(category.hazards) or "unsafe"
        fed = feeds if category.scoring in ("max", "unsafe") else f"{category.scoring} {feeds}"
        for role, steps in by_role.items():
            for step in reversed(steps):
                heads = category.hazards or ("unsafe",)
                known = category.scoring in ("max", "unsafe")
                effect = measured.effect(role, heads, step.score) if known else None
                action = _said(step.action, step.reply)
                table.add_row(name + suffix, role, action, f"{step.score:.4g}", *_measured(effect), fed)
            if not steps:
                table.add_row(name + suffix, role, "not judged", "", "", "", fed)
    return table


def _measured(effect: "Effect | None") -> tuple[str, str]:
    """In per cent."""
    if effect is None:
        return "?", "?"
    (fpr_low, fpr_high), (low, high) = effect.fpr_interval, effect.recall_interval
    fpr = f"≤ {effect.fpr:.2%} ({100 * fpr_low:.2f} – {100 * fpr_high:.2f})"
    return fpr, f"≥ {effect.recall:.0%} ({100 * low:.0f} – {100 * high:.0f})"


def _said(action: "Action", reply: "Reply | None") -> str:
    return f"{action.name.lower()} to {reply.name}" if reply else action.name.lower()


def _ground(violation: "Violation") -> str:
    if violation.rule:
        return f"a match of rule {violation.rule}"
    return f"{violation.category} at {violation.threshold:.3f} or more (it is {violation.score:.3f})"


def _scores(policy: "Policy", source: str) -> "tuple[Scores, set[str]]":
    """The scores of a JSON file, and the rules that matched where it is an answer."""
    try:
        data = json.loads(sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8"))
        verdict = data.get("verdict", {})
        found = verdict.get("scores") or data
        given = {str(code): float(score) for code, score in found.get("hazards", {}).items()}
        rules = {str(violation["rule"]) for violation in verdict.get("violations", ()) if violation.get("rule")}
        unsafe = float(found["unsafe"])
    except OSError as error:
        raise InputError("scores", f"{source}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            "scores", f'{source}: should be JSON such as {{"unsafe": 0.2, "hazards": {{"S1": 0.1}}}}'
        ) from None
    if not all(0 <= score <= 1 for score in (unsafe, *given.values())):
        raise InputError("scores", f"{source}: should be from 0 to 1")
    return policy.scores({**given, "unsafe": unsafe}), rules


@contextmanager
def _nothing() -> Iterator[None]:
    yield None


@contextmanager
def _scorer(policy: "Policy", model: Path | None) -> "Iterator[Scorer]":
    """The engine with the one policy."""
    import asyncio

    from guard.engine.moderator import Moderator
    from guard.errors import ModelFailed
    from guard.model.turn_classifier import TurnClassifier
    from guard.policy.store import PolicyStore
    from guard.settings import Settings
    from guard.telemetry import Telemetry
    from guard.types import Conversation

    settings = Settings()
    classifier = TurnClassifier(model or settings.model, settings.device, settings.dtype, settings.threads)
    store = PolicyStore([policy], policy.name)
    moderator = Moderator(classifier, store, Telemetry.start("warning"), max_batch_tokens=16, max_queue_seconds=3600)
    with asyncio.Runner() as runner:

        def score(conversation: Conversation, metadata: Mapping[str, str]) -> "Scores":
            (verdict,) = runner.run(moderator.judge(conversation, metadata=metadata)).verdicts
            if verdict.scores is None:
                raise ModelFailed("the model could not score a test")
            return verdict.scores

        try:
            yield score
        finally:
            moderator.close()


def _print(result: "Result", verbose: bool) -> None:
    from guard.cli import render

    console = render.terminal()
    for outcome in result.outcomes:
        for failure in outcome.failures:
            console.print(_line("FAILED", "bold red", f"{outcome.name}: {failure}"), soft_wrap=True)
        if verbose and not outcome.failures:
            state = ("skipped", "yellow") if outcome.judged is None else ("passed", "green")
            console.print(_line(*state, outcome.name), soft_wrap=True)
    passed = len(result.outcomes) - result.failed - result.skipped
    skipped = f", {result.skipped} skipped (they need --with-model)" if result.skipped else ""
    console.print(f"{result.path}: {passed} passed, {result.failed} failed{skipped}", soft_wrap=True)
    parts = len(result.policy.categories) + len(result.policy.rules)
    untested = f"; not {', '.join(result.untested)}" if result.untested else ""
    console.print(
        f"tested: {parts - len(result.untested)} of {parts} categories and rules{untested}", style="dim", soft_wrap=True
    )


def _line(state: str, style: str, text: str) -> "Text":
    from rich.text import Text

    return Text.assemble((state, style), " ", text)


def _as_json(result: "Result") -> dict[str, object]:
    tests = [
        {
            "name": outcome.name,
            "outcome": _outcome(outcome.failures, outcome.judged),
            "failures": outcome.failures,
            "found": outcome.judged
            and {
                "action": outcome.judged.action,
                "categories": outcome.judged.categories,
                "rules": outcome.judged.rules,
                "reply": outcome.judged.reply,
            },
        }
        for outcome in result.outcomes
    ]
    return {
        "file": str(result.path),
        "policy": result.policy.name,
        "revision": result.policy.revision,
        "tests": tests,
        "untested": result.untested,
    }


def _outcome(failures: object, judged: object) -> str:
    return "failed" if failures else "skipped" if judged is None else "passed"


def _write_junit(path: Path, results: Iterable["Result"]) -> None:
    root = ElementTree.Element("testsuites")
    for result in results:
        counts = {"tests": len(result.outcomes), "failures": result.failed, "skipped": result.skipped}
        suite = ElementTree.SubElement(root, "testsuite", name=result.policy.name)
        suite.attrib |= {name: str(count) for name, count in counts.items()}
        for outcome in result.outcomes:
            case = ElementTree.SubElement(suite, "testcase", classname=result.policy.name, name=outcome.name)
            if outcome.failures:
                ElementTree.SubElement(case, "failure", message="; ".join(outcome.failures))
            elif outcome.judged is None:
                ElementTree.SubElement(case, "skipped", message="needs --with-model")
    try:
        ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
