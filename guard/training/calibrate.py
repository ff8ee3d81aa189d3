"""Turns a trained model's logits into probabilities, on rows it was not trained on."""

from collections.abc import Sequence
from math import log

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from guard.errors import ConfigError
from guard.model.chat import ChatTokenizer
from guard.model.checkpoint import Calibration
from guard.training.data import Example
from guard.training.evaluate import HEADS, Bools, Floats, labels
from guard.training.finetune import TurnModel, batches
from guard.types import Role

_LENGTHS = (256, 512, 1024, 2048)
_TOKENS = 2048
_FEW = 30  # positives; a hazard with fewer shares the fit of all hazards


def predict(model: TurnModel, examples: Sequence[Example], tokenizer: ChatTokenizer) -> Floats:
    """Logits [rows, 1 + hazards], in the order of the examples, computed where the model is."""
    model.eval()
    device = next(model.parameters()).device
    logits = np.empty((len(examples), len(HEADS)))
    for batch in batches(examples, tokenizer, _LENGTHS, _TOKENS):
        with torch.inference_mode():
            logits[list(batch.places)] = model(batch.to(device)).cpu().numpy()
    return logits


def check(examples: Sequence[Example]) -> None:
    """Raises ConfigError for rows that are too few to fit anything to: where all are safe, or all unsafe."""
    if not 0 < sum(example.unsafe for example in examples) < len(examples):
        raise ConfigError(f"needs both safe and unsafe rows to fit probabilities to; there are {len(examples):,} rows")


def calibrate(
    logits: Floats, examples: Sequence[Example], prior: float | None = None, before: Calibration | None = None
) -> Calibration:
    """(a, b) for each role and head, so that sigmoid(a * logit + b) is a probability; rows count by their weight.

    A role with few unsafe rows shares the fit of all rows, and a hazard with few that of all hazards; where these are
    few too they stay as they were `before`. Probabilities are those of where a share `prior` of turns is
    unsafe, by default of where as many are as among the rows (Saerens et al. 2002, doi:10.1162/089976602753284446).
    Raises ConfigError where no row is unsafe, or none is safe, or nothing is known of a hazard.
    """
    check(examples)
    fits = {}
    for role in (Role.USER, Role.AGENT):
        own = np.array([example.role == role for example in examples])
        unsafe = np.array([example.unsafe and example.hazards is not None for example in examples])
        if (own & unsafe).sum() < _FEW or (own & ~unsafe).sum() < _FEW:
            own = np.ones_like(own)
        rows = [example for example, mine in zip(examples, own, strict=True) if mine]
        shift = 0.0 if prior is None else _log_odds(prior) - _log_odds(_share(rows))
        found = {code: (a, b + shift) for code, (a, b) in _fits(logits[own], rows, before is not None).items()}
        fits[role] = {**(before or {}).get(role, {}), **found}
    return fits


def _share(examples: Sequence[Example]) -> float:
    """How much of the rows' weight is unsafe."""
    return sum(example.weight for example in examples if example.unsafe) / sum(example.weight for example in examples)


def _log_odds(share: float) -> float:
    return log(share / (1 - share))


def _fits(logits: Floats, examples: Sequence[Example], stays: bool) -> dict[str, tuple[float, float]]:
    """By head; without the hazards of which there are few rows, even of all together, where these stay as they are."""
    true, known = labels(examples)
    weights = np.array([example.weight for example in examples])
    hazards = known[:, 1:]
    each = np.broadcast_to(weights[:, None], hazards.shape)
    pooled = None
    if not stays or true[:, 1:][hazards].sum() >= _FEW:
        pooled = _platt(logits[:, 1:][hazards], true[:, 1:][hazards], each[hazards])
    fits = {}
    for head, code in enumerate(HEADS):
        rows = known[:, head]
        if head == 0 or true[rows, head].sum() >= _FEW:
            fits[code] = _platt(logits[rows, head], true[rows, head], weights[rows])
        elif pooled is not None:
            fits[code] = pooled
    return fits


def probabilities(logits: Floats, calibration: Calibration, examples: Sequence[Example]) -> Floats:
    """Calibrated scores, of the shape of the logits."""
    fits = {role: [own[code] for code in HEADS] for role, own in calibration.items()}
    a, b = np.array([fits.get(example.role) or fits[Role.USER] for example in examples]).transpose(2, 0, 1)
    scores: Floats = 1 / (1 + np.exp(-(a * logits + b)))
    return scores


def _platt(logits: Floats, positive: Bools, weights: Floats) -> tuple[float, float]:
    if positive.all() or not positive.any():
        raise ConfigError("needs both safe rows and unsafe ones of a known hazard to fit probabilities to")
    fit = LogisticRegression(C=10).fit(logits[:, None], positive, sample_weight=weights)
    return float(fit.coef_[0, 0]), float(fit.intercept_[0])
