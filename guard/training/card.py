"""The model card: README.md of a model directory, from nothing but files, so that it can be written again."""

import json
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from guard.errors import ConfigError
from guard.model.checkpoint import read_checkpoint
from guard.training.data import Recipe, read_recipe
from guard.training.plots import draw, draw_depths, draw_loss
from guard.training.report import FIGURES, TITLES, Table, cell, disguises, metrics, operating_points, slices, title
from guard.types import HAZARDS

LEFT_OUT = "left-out.json"
DEPTHS = "depths.json"
_DATA = Path(__file__).parents[2] / "docs" / "data.md"
_SOURCE = ("source", "languages", "licence", "origin @ commit")
_ENOUGH = 30  # rows of either label, to say anything
_GOOD = 0.9  # the lower end of the AUROC's interval, to be relied on
_USEFUL = 0.5  # the AUPRC of a hazard
_ELSEWHERE = ("by_role", "by_language", "by_length", "by_source")


def write_card(directory: Path, data: Path = _DATA) -> None:
    """Writes README.md and its plots into a model directory.

    Reads guard.json, recipe.yaml, evaluation.json and training.jsonl (as guard.training.pipeline.release writes them)
    and, where they are there, what guard.training.studies found, and notes.md: what people know of the model, in
    Markdown. `data` holds the table of sources with their licences. The same files give the same card. Raises
    ConfigError where a file is missing or wrong.
    """
    checkpoint = read_checkpoint(directory)
    recipe = read_recipe(directory / "recipe.yaml")
    evaluation = json.loads(_read(directory / "evaluation.json"))
    held_out = evaluation["held_out"]
    plots = draw({"held out": held_out["curves"]}, directory)
    log = [json.loads(line) for line in _read(directory / "training.jsonl").splitlines()]
    digest = sha256((directory / "recipe.yaml").read_bytes()).hexdigest()
    scores = ", ".join(f"{code} {HAZARDS[code]}" if code in HAZARDS else code for code in checkpoint.hazards)
    facts = {
        "revision": f"`{checkpoint.revision}`",
        "recipe": f"[`recipe.yaml`](recipe.yaml), SHA-256 `{digest}`",
        "longest input": f"{checkpoint.max_tokens:,} tokens",
        "scores": f"`unsafe`, and {scores}",
    }
    parts = [
        f"# {checkpoint.name}",
        "\n".join(f"- {name}: {fact}" for name, fact in facts.items()),
        "## Figures",
        "Held-out rows are of the same sources as the training rows, and calibrated the model too, so they flatter it. "
        + FIGURES.format(threshold=held_out["threshold"])
        + " Everything is in `evaluation.json`.",
        *(f"{heading}:\n\n{table.markdown()}" for heading, table in _figures(evaluation)),
        "\n".join(f"![{plot}]({plot})" for plot in plots),
        *_left_out(directory),
        *_depths(directory),
        "## Languages",
        f"Unmeasured: fewer than {_ENOUGH} held-out rows that are safe, or that are unsafe. Trustworthy: the 95 % "
        f"interval of the AUROC lies above {100 * _GOOD:.0f}. Weak: the others.",
        _languages(held_out).markdown(),
        "## Known failures",
        "\n".join(f"- {failure}" for failure in _failures(evaluation)),
        "## Training",
        _settings(recipe).markdown(),
        f"![loss]({draw_loss(log, directory)})",
        "## Data",
        _sources(recipe, data).markdown(),
    ]
    if (directory / "notes.md").exists():
        parts += ["## Notes", _read(directory / "notes.md")]
    (directory / "README.md").write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")


def language_verdict(found: Mapping[str, Any]) -> str:
    """trustworthy, weak or unmeasured, as the card explains; of the metrics of one language."""
    if min(found["positives"], found["rows"] - found["positives"]) < _ENOUGH:
        return "unmeasured"
    return "trustworthy" if found["intervals"]["auroc"][0] > _GOOD else "weak"


def _figures(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    held_out = evaluation["held_out"]
    for heading, table in slices(held_out, ("by_role", "by_length", "hazards")):
        yield f"Held out, {heading}", table
    if evaluation["benchmarks"]:
        rows = {name: found["unsafe"] for name, found in evaluation["benchmarks"].items()}
        yield "Rows that were never trained on", metrics("set", rows)
    some = next(iter(evaluation["disguised"].values()))
    safe = some["rows"] - some["positives"]
    yield (
        f"{some['positives']} unsafe and {safe} harmless held-out rows, each in every disguise that training knows",
        disguises(evaluation["disguised"]),
    )
    yield "Operating points of `unsafe`, chosen on the held-out rows", operating_points(evaluation["thresholds"])


def _left_out(directory: Path) -> Iterator[str]:
    if not (directory / LEFT_OUT).exists():
        return
    found = json.loads(_read(directory / LEFT_OUT))
    yield "## Sources that a model has not seen"
    yield (
        f"The same held-out rows, each scored by one of {len(found['folds'])} models of this recipe that was neither "
        f"trained nor calibrated on the row's source, in {found['steps']:,} steps: what to expect of other people's "
        f"texts. Which sources were left out together stands in `{LEFT_OUT}`."
    )
    for _, table in slices(found, ("by_role", "by_language", "by_source")):
        yield table.markdown()


def _depths(directory: Path) -> Iterator[str]:
    if not (directory / DEPTHS).exists():
        return
    found = json.loads(_read(directory / DEPTHS))
    depths = found["depths"]
    yield "## Depth"
    yield (
        f"Models of the base's first blocks by this recipe, in {found['steps']:,} steps each, on the held-out rows; "
        f"milliseconds are the median for a row by itself ({depths[0]['computed']})."
    )
    columns = ("auprc", "auroc", "fpr", "recall")
    yield Table(
        ("blocks", "MB", "ms", *(TITLES[column] for column in columns)),
        tuple(
            (
                f"{depth['blocks']}",
                f"{depth['bytes'] / 1e6:.0f}",
                f"{depth['ms']:.1f}",
                *(cell(depth["unsafe"], column) for column in columns),
            )
            for depth in depths
        ),
    ).markdown()
    yield f"![depths]({draw_depths(depths, directory)})"


def _languages(held_out: Mapping[str, Any]) -> Table:
    ranks = ("trustworthy", "weak", "unmeasured")
    by_language = sorted(held_out["by_language"].items(), key=lambda item: ranks.index(language_verdict(item[1])))
    return Table(
        ("language", "verdict", "rows", "unsafe", "AUROC", "FPR", "recall"),
        tuple(
            (
                language,
                language_verdict(found),
                f"{found['rows']:,}",
                f"{found['positives']:,}",
                *(cell(found, name) for name in ("auroc", "fpr", "recall")),
            )
            for language, found in by_language
        ),
    )


def _failures(evaluation: Mapping[str, Any]) -> Iterator[str]:
    held_out, int8 = evaluation["held_out"], evaluation["int8"]
    whole = held_out["unsafe"]
    yield from _worse(held_out, "fpr", "Harmless turns are flagged more often than the average")
    yield from _worse(held_out, "recall", "Unsafe turns are missed more often than the average")
    hazards = held_out["hazards"]
    if poor := ", ".join(code for code, found in hazards.items() if found.get("auprc", 1) < _USEFUL):
        yield f"Hazards whose AUPRC is below {100 * _USEFUL:.0f}, so that `unsafe` is the better signal: {poor}."
    if few := ", ".join(code for code in HAZARDS if hazards.get(code, {"positives": 0})["positives"] < _ENOUGH):
        yield f"Hazards with fewer than {_ENOUGH} held-out rows, or none: {few}."
    share = 100 * whole["positives"] / whole["rows"]
    yield f"Probabilities are calibrated where {share:.0f} % of rows are unsafe; where fewer are, they are too high."
    for what, found in (("Weights", int8["weights"]), ("Weights and activations", int8["products"])):
        yield (
            f"{what} of int8 change {100 * found['verdicts_changed']:.1f} % of {found['rows']:,} held-out verdicts; "
            f"the score of `unsafe` moves by {found['unsafe_mean_difference']:.3f} in the mean, and its AUPRC falls by "
            f"{100 * found['auprc_lost']:.1f} points."
        )


def _worse(held_out: Mapping[str, Any], name: str, claim: str) -> Iterator[str]:
    """The slices whose whole interval lies on the wrong side of what all rows have, worst first."""
    sign = 1 if name == "fpr" else -1
    found = sorted(
        (-sign * own[name], f"{title(section, key)} {cell(own, name)}")
        for section in _ELSEWHERE
        for key, own in held_out[section].items()
        if name in own and all(sign * bound > sign * held_out["unsafe"][name] for bound in own["intervals"][name])
    )
    if found:
        yield f"{claim} ({cell(held_out['unsafe'], name)}) in: {'; '.join(text for _, text in found)}."


def _settings(recipe: Recipe) -> Table:
    settings = recipe.model_dump(mode="json", exclude={"sources"})
    return Table(("setting", "value"), tuple((name, str(value)) for name, value in settings.items()))


def _sources(recipe: Recipe, data: Path) -> Table:
    """The sources of the recipe as the table of `data` describes them; an installed package comes without it."""
    described = _read(data) if data.exists() else "| " + " | ".join(_SOURCE) + " |"
    lines = [[part.strip() for part in line.strip("| \n").split(" | ")] for line in described.splitlines()]
    header = next((line for line in lines if set(_SOURCE) <= set(line)), None)
    if header is None:
        raise ConfigError(f"{data}: has no table with the columns {', '.join(_SOURCE)}")
    columns = [header.index(name) for name in _SOURCE]
    known = {line[columns[0]].strip("`"): line for line in lines if len(line) == len(header)}
    nothing = [""] * len(header)
    rows = (
        (f"`{name}`", *(known.get(name, nothing)[column] or "not recorded" for column in columns[1:]))
        for name in recipe.sources
    )
    return Table(_SOURCE, tuple(rows))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
