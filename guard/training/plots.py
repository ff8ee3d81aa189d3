"""The curves of an evaluation as small PNG files; the same curves give the same bytes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_COLOURS = ("tab:blue", "tab:orange")
_MEAN_OF = 10  # reports of a run


def draw_loss(log: Sequence[Mapping[str, Any]], directory: Path) -> str:
    """Plots the loss over the steps of a run, and its mean over ten reports; returns the file's name."""
    steps = {report["step"]: report["loss"] for report in log}  # of a run that was resumed the later word counts
    ordered = sorted(steps)
    losses = np.array([steps[step] for step in ordered])
    figure = Figure(figsize=(4.8, 3.6), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss of a label", ylim=(0, 1.1 * losses.max()))
    axes.plot(ordered, losses, color=_COLOURS[0], alpha=0.3, label="since the last report")
    window = min(_MEAN_OF, len(losses))
    axes.plot(
        ordered[window - 1 :], np.convolve(losses, np.ones(window) / window, "valid"), color=_COLOURS[0], label="mean"
    )
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(directory / "loss.png", dpi=100, metadata={"Software": None})
    return "loss.png"


def draw_depths(depths: Sequence[Mapping[str, Any]], directory: Path) -> str:
    """Plots the AUPRC of models of several depths over what a row costs; returns the file's name."""
    figure = Figure(figsize=(4.8, 3.6), layout="constrained")
    axes = figure.add_subplot(xlabel="ms for a row by itself", ylabel="AUPRC of unsafe, 95 % interval")
    ordered = sorted(depths, key=lambda depth: depth["blocks"])
    ms = np.array([depth["ms"] for depth in ordered])
    value = np.array([depth["unsafe"]["auprc"] for depth in ordered])
    interval = np.array([depth["unsafe"]["intervals"]["auprc"] for depth in ordered]).T  # [low and high, depths]
    axes.errorbar(ms, value, abs(interval - value), color=_COLOURS[0], marker="o", markersize=4, capsize=2)
    for depth in ordered:
        axes.annotate(
            f"{depth['blocks']} blocks",
            (depth["ms"], depth["unsafe"]["auprc"]),
            xytext=(4, -10),
            textcoords="offset points",
            fontsize="small",
        )
    axes.set_xlim(0, 1.3 * ms.max())
    axes.grid(alpha=0.3)
    figure.savefig(directory / "depths.png", dpi=100, metadata={"Software": None})
    return "depths.png"


def draw(curves: Mapping[str, Mapping[str, Any]], directory: Path) -> list[str]:
    """Plots the `curves` of guard.training.evaluate, of one model or of two, by name; returns the files' names."""
    plots = {"precision-recall": _precision_recall, "reliability": _reliability, "scores": _scores}
    for name, plot in plots.items():
        figure = Figure(figsize=(4.8, 3.6), layout="constrained")
        axes = figure.add_subplot(xlim=(0, 1))
        for (model, own), colour in zip(curves.items(), _COLOURS, strict=False):
            plot(axes, model, own, colour)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
        figure.savefig(directory / f"{name}.png", dpi=100, metadata={"Software": None})
    return [f"{name}.png" for name in plots]


def _precision_recall(axes: Axes, model: str, curves: Mapping[str, Any], colour: str) -> None:
    axes.set(xlabel="recall", ylabel="precision", ylim=(0, 1.02))
    if "precision_recall" in curves:
        axes.plot(
            curves["precision_recall"]["recall"], curves["precision_recall"]["precision"], color=colour, label=model
        )


def _reliability(axes: Axes, model: str, curves: Mapping[str, Any], colour: str) -> None:
    """Above the diagonal scores are too low, below it too high."""
    bins = curves["reliability"]
    score, unsafe = (np.array([found[key] for found in bins]) for key in ("score", "unsafe"))
    interval = np.array([found["interval"] for found in bins]).T  # [low and high, bins]
    axes.set(xlabel="score", ylabel="share that is unsafe, 95 % interval", ylim=(0, 1))
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle="dotted")
    axes.errorbar(score, unsafe, abs(interval - unsafe), color=colour, label=model, marker="o", markersize=4, capsize=2)


def _scores(axes: Axes, model: str, curves: Mapping[str, Any], colour: str) -> None:
    axes.set(xlabel="score", ylabel="share of the rows of a label")
    for label, style in (("safe", "dashed"), ("unsafe", "solid")):
        counts = np.array(curves["scores"][label])
        shares = counts / max(1, counts.sum())
        axes.stairs(
            shares, np.linspace(0, 1, len(counts) + 1), color=colour, linestyle=style, label=f"{model}, {label}"
        )
