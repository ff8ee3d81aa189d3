"""What gateways are told of verdicts: the strictest of several, and why; never the text."""

from collections.abc import Sequence

from guard.types import Action, Verdict


def strictest(verdicts: Sequence[Verdict]) -> Verdict:
    """The first of those with the strictest action."""
    return max(verdicts, key=lambda verdict: verdict.action)


def reason_of(verdict: Verdict, policy: str) -> str:
    """Who blocks, and the categories or rules for which it does."""
    names = [
        violation.category or violation.rule for violation in verdict.violations if violation.action is Action.BLOCK
    ]
    if names:
        return f"blocked by policy {policy}: {', '.join(dict.fromkeys(names))}"
    return f"blocked by policy {policy}, as the model could not answer"
