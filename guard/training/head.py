"""A category of one's own: one more output, learned on a model's frozen hidden state from some 200 rows."""

import re
from collections.abc import Sequence
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from guard.errors import ConfigError
from guard.model.chat import ChatTokenizer
from guard.model.checkpoint import Checkpoint, extend_checkpoint, load_tensors, read_checkpoint
from guard.model.kernels import fastest
from guard.model.llama import Llama, LlamaConfig
from guard.policy.schema import OWN_HAZARD
from guard.training.data import Example
from guard.training.evaluate import Floats, metrics

_FEWEST = 20  # rows of either label
_FOLDS = StratifiedKFold(5, shuffle=True, random_state=0)
_STRENGTHS = (0.001, 0.01, 0.1, 1.0)  # of the fit to the rows, against small weights
_TOKENS = 512  # of a batch


class Learned(NamedTuple):
    """p = sigmoid(weight · hidden + bias), and the `metrics` of heads that had not seen the rows which they scored."""

    weight: Floats  # [hidden]
    bias: float
    metrics: dict[str, Any]


def add_category(base: Path, examples: Sequence[Example], category: str, out: Path, name: str | None) -> dict[str, Any]:
    """Writes the model directory `out`: `base` with one more output, the probability that a turn is of `category`.

    `unsafe` says of an example that it is; `name` is the new model's, None for that of `base`. Returns the metrics of
    what `learn` makes of them. Raises ConfigError where base, rows or category cannot be used.
    """
    if not re.fullmatch(OWN_HAZARD, category):
        raise ConfigError(f"category {category!r}: expected lower-case letters, digits and hyphens, and not unsafe")
    if out.resolve() == base.resolve():
        raise ConfigError(f"{out}: is the model to start from")
    checkpoint = read_checkpoint(base)
    if category in checkpoint.hazards:
        raise ConfigError(f"{base}: scores {category} already")
    learned = learn(checkpoint, examples, category)
    extend_checkpoint(checkpoint, out, category, torch.tensor(learned.weight), torch.tensor(learned.bias), name)
    return learned.metrics


def learn(checkpoint: Checkpoint, examples: Sequence[Example], category: str) -> Learned:
    """A head that tells which examples are `unsafe`, here of the category; fitted on all rows.

    Its probabilities are calibrated on scores of heads that had not seen the row: each is held out of one of five.
    Raises ConfigError where there are too few rows of either label, or one with both.
    """
    rows = list({(example.conversation, example.unsafe): example for example in examples}.values())
    if twice := len(rows) - len({example.conversation for example in rows}):
        raise ConfigError(f"{category}: expected one label for each text, found {twice} with both")
    belongs = [example.unsafe for example in rows]
    if min(inside := sum(belongs), outside := len(belongs) - sum(belongs)) < _FEWEST:
        raise ConfigError(
            f"{category}: expected at least {_FEWEST} different rows of either label, found {inside} of the category "
            f"and {outside} others"
        )
    hidden = _hidden(checkpoint, rows)
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        {"logisticregression__C": _STRENGTHS},
        scoring="neg_log_loss",
        cv=_FOLDS,
    )
    held_out = cross_val_predict(search, hidden, belongs, cv=_FOLDS, method="decision_function")[:, None]
    platt = LogisticRegression().fit(held_out, belongs)
    slope, offset = float(platt.coef_[0, 0]), float(platt.intercept_[0])
    scaler, head = search.fit(hidden, belongs).best_estimator_
    weight = head.coef_[0] / scaler.scale_
    bias = head.intercept_[0] - weight @ scaler.mean_
    found = metrics(platt.predict_proba(held_out)[:, 1], np.array(belongs))
    return Learned(slope * weight, slope * float(bias) + offset, found)


def _hidden(checkpoint: Checkpoint, examples: Sequence[Example]) -> Floats:
    """What the model's head reads of each example, [rows, hidden]; in float32, close to every type that may serve."""
    tokenizer = ChatTokenizer(checkpoint.path / "tokenizer.json", checkpoint.max_tokens)
    tensors = load_tensors(checkpoint.path, torch.float32)
    llama = Llama(LlamaConfig.read(checkpoint.config), tensors, fastest(torch.device("cpu")))
    sequences = [tokenizer.tokenise(example.conversation)[0].ids for example in examples]
    ends = accumulate(map(len, sequences))
    states = []
    for _, numbered in groupby(zip(ends, sequences, strict=True), lambda item: item[0] // _TOKENS):
        batch = [ids for _, ids in numbered]
        states.append(llama.read(batch, [[len(ids) - 1] for ids in batch]))
    hidden: Floats = torch.cat(states).double().numpy()
    return hidden
