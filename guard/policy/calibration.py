"""What a threshold does, as measured on the model: shares of harmless and of harmful turns that reach it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Self

from guard.errors import ConfigError
from guard.types import Role

Interval = tuple[float, float]

_FILE = "thresholds.json"
_WORDS = {"max_fpr": "a false-positive rate", "min_recall": "a recall"}


class Unresolvable(ValueError):
    """The model's measurements cannot tell the threshold that is asked for."""


@dataclass(frozen=True, slots=True)
class Effect:
    """At most `fpr` of harmless turns reach a threshold, and at least `recall` of harmful ones; with 95 % intervals."""

    fpr: float
    recall: float
    fpr_interval: Interval
    recall_interval: Interval


_UNKNOWN = Effect(1.0, 0.0, (0.0, 1.0), (0.0, 1.0))  # where a curve has no point


@dataclass(frozen=True, slots=True)
class Calibration:
    """The curves of a model by role and head: points (threshold, effect), by ascending threshold."""

    curves: Mapping[Role, Mapping[str, Sequence[tuple[float, Effect]]]] = field(
        default_factory=lambda: MappingProxyType({})
    )

    @classmethod
    def read(cls, model: Path) -> Self:
        """That of a model directory, without curves where it holds none. Raises ConfigError for a damaged file."""
        path = model / _FILE
        try:
            by_role = json.loads(path.read_text(encoding="utf-8"))
            curves = {
                Role(role): {head: _points(measured["points"]) for head, measured in by_head.items()}
                for role, by_head in by_role.items()
            }
        except FileNotFoundError:
            return cls()
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(f"{path}: holds no curves of thresholds") from None
        return cls(curves)

    def effect(self, role: Role, heads: Iterable[str], threshold: float) -> Effect | None:
        """What a threshold does to the highest score of some heads; None where one of them was not measured.

        Between two measured thresholds the worse side is taken. Of several heads, false positives are at most the sum
        (the union bound), and a harmful turn is found at least as often as by the head that finds it least.
        """
        curves = [self.curves.get(role, {}).get(head) for head in heads]
        found = [_at(curve, threshold) for curve in curves if curve]
        if len(found) < len(curves) or not found:
            return None
        least = min(found, key=lambda effect: effect.recall)
        low = max(effect.fpr_interval[0] for effect in found)
        high = min(1.0, sum(effect.fpr_interval[1] for effect in found))
        fpr = min(1.0, sum(effect.fpr for effect in found))
        return Effect(fpr, least.recall, (low, high), least.recall_interval)

    def threshold(self, role: Role, heads: Sequence[str], target: str, share: float) -> float:
        """The threshold on the highest score of some heads that keeps to a target of guard.policy.schema.

        The lowest measured one for `max_fpr`, the highest for `min_recall`. Raises Unresolvable.
        """
        curves = self.curves.get(role, {})
        if missing := [head for head in heads if not curves.get(head)]:
            raise Unresolvable(f"a number, since the model has no curve of {', '.join(missing)} for {role} turns")
        candidates = sorted({threshold for head in heads for threshold, _ in curves[head]})
        effects = {threshold: self.effect(role, heads, threshold) or _UNKNOWN for threshold in candidates}
        if target == "max_fpr":
            kept = (threshold for threshold, effect in effects.items() if effect.fpr <= share)
            best = min((effect.fpr for effect in effects.values()), default=1.0)
        else:
            kept = (threshold for threshold, effect in reversed(effects.items()) if effect.recall >= share)
            best = max((effect.recall for effect in effects.values()), default=0.0)
        for threshold in kept:
            return threshold
        heard = f"{'at least' if target == 'max_fpr' else 'at most'} {best:.4g}"
        raise Unresolvable(f"{_WORDS[target]} of {heard}, the best that was measured for {role} turns")


def _points(points: Iterable[Mapping[str, object]]) -> tuple[tuple[float, Effect], ...]:
    return tuple(sorted((_point(point) for point in points), key=lambda point: point[0]))


def _point(point: Mapping[str, object]) -> tuple[float, Effect]:
    match point:
        case {
            "threshold": float() | int() as threshold,
            "fpr": float() | int() as fpr,
            "recall": float() | int() as recall,
            "intervals": {"fpr": [fpr_low, fpr_high], "recall": [recall_low, recall_high]},
        }:
            intervals = (float(fpr_low), float(fpr_high)), (float(recall_low), float(recall_high))
            return float(threshold), Effect(float(fpr), float(recall), *intervals)
    raise ValueError


def _at(curve: Sequence[tuple[float, Effect]], threshold: float) -> Effect:
    """False positives as at the nearest measured threshold below, recall as at the nearest above."""
    below = next((effect for measured, effect in reversed(curve) if measured <= threshold), _UNKNOWN)
    above = next((effect for measured, effect in curve if measured >= threshold), _UNKNOWN)
    return Effect(below.fpr, above.recall, below.fpr_interval, above.recall_interval)
