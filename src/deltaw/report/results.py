"""The rows and predictions of a run, checked once and then looked up by (stage, method, domain, metric)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from deltaw.errors import DataError, NonFiniteError, unknown_name
from deltaw.report.statistics import Interval, accuracy_interval, bootstrap_mean, paired_bootstrap_mean

STAGES = ("adapt", "merge", "compress", "inspect")
PROBE = "linear-probe"
CEILING = "single-task"
DENSE = "dense"
#: methods that are yardsticks: shown, but never the answer to "which one to take"
REFERENCES = (PROBE, CEILING, DENSE, "base")
#: domains that stand for several
POOLED = ("mean", "all")
_REQUIRED: dict[str, Any] = {
    "stage": str,
    "method": str,
    "domain": str,
    "metric": str,
    "value": (int, float),
    "seed": int,
}

_EXPECTED = {**dict.fromkeys(_REQUIRED, "text"), "value": "a number", "seed": "a whole number"}

Key = tuple[str, str, str]


def check_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise DataError or NonFiniteError naming the first row that is not a result row."""
    for number, row in enumerate(rows):
        for key, kind in _REQUIRED.items():
            if key not in row:
                raise DataError(f"row {number} has no {key!r}; found keys {sorted(row)}, expected {sorted(_REQUIRED)}")
            if not isinstance(row[key], kind) or isinstance(row[key], bool):
                raise DataError(f"row {number}: {key} is {row[key]!r}, expected {_EXPECTED[key]}")
        where = f"row {number} ({row['stage']}/{row['method']}/{row['domain']} {row['metric']})"
        if row["stage"] not in STAGES:
            raise unknown_name(f"stage in {where}", row["stage"], STAGES)
        for key in ("value", "low", "high"):
            if row.get(key) is not None and not math.isfinite(row[key]):
                raise NonFiniteError(
                    f"{where}: {key} is {row[key]}; a result must be finite, leave the row out instead"
                )


def _key(key: Any) -> Key:
    """(stage, method, domain) from a tuple or from "stage/method/domain" (the method may hold slashes)."""
    parts = tuple(key.split("/")) if isinstance(key, str) else tuple(key)
    if len(parts) < 3:
        raise DataError(f"predictions key {key!r}; expected (stage, method, domain) or 'stage/method/domain'")
    return parts[0], "/".join(parts[1:-1]), parts[-1]


class Results:
    """Lookups over the rows and predictions of one run.

    rows: the flat list of result rows. predictions: {(stage, method, domain): [0/1 per test example]}, in the
    same order for all methods of a domain; string keys "stage/method/domain" are read as well.
    """

    def __init__(
        self, rows: Sequence[Mapping[str, Any]], predictions: Mapping[Any, Sequence[int]] | None = None, seed: int = 0
    ):
        check_rows(rows)
        self.rows = list(rows)
        self.seed = seed
        self.predictions: dict[Key, list[int]] = {_key(k): list(v) for k, v in (predictions or {}).items()}
        self._check_predictions()
        self._values: dict[tuple[str, str, str, str, int | None], list[Mapping[str, Any]]] = {}
        for r in self.rows:
            self._values.setdefault((r["stage"], r["method"], r["domain"], r["metric"], r.get("batch")), []).append(r)
        self._differences: dict[tuple[Key, Key], Interval | None] = {}

    def _check_predictions(self) -> None:
        lengths: dict[str, tuple[int, Key]] = {}
        for key, scores in self.predictions.items():
            if not scores or any(s not in (0, 1) for s in scores):
                raise DataError(f"predictions of {'/'.join(key)}: expected a list of 0 and 1, one per test example")
            n, first = lengths.setdefault(key[2], (len(scores), key))
            if n != len(scores):
                raise DataError(
                    f"predictions of {'/'.join(key)} hold {len(scores)} examples, those of {'/'.join(first)} {n}; "
                    "all methods of a domain must be scored on the same examples in the same order"
                )

    # -- what there is ------------------------------------------------------------------------------------------

    def methods(self, stage: str) -> list[str]:
        """Methods of a stage in order of appearance, yardsticks first."""
        seen = list(dict.fromkeys(r["method"] for r in self.rows if r["stage"] == stage))
        return sorted(seen, key=lambda m: m not in REFERENCES)

    def candidates(self, stage: str) -> list[str]:
        """Methods of a stage without the yardsticks."""
        return [m for m in self.methods(stage) if m not in REFERENCES]

    def domains(self, stage: str | None = None) -> list[str]:
        """Single domains with an accuracy, in order of appearance."""
        return list(
            dict.fromkeys(
                r["domain"]
                for r in self.rows
                if r["metric"] == "accuracy" and r["domain"] not in POOLED and stage in (None, r["stage"])
            )
        )

    def has(self, stage: str) -> bool:
        return any(r["stage"] == stage for r in self.rows)

    def seeds(self) -> list[int]:
        return sorted({r["seed"] for r in self.rows})

    def batches(self, stage: str) -> list[int]:
        found = {r["batch"] for r in self.rows if r["stage"] == stage and r.get("batch") is not None}
        return sorted(found)

    def examples(self, domain: str) -> int | None:
        """Test examples of a domain, from the predictions or from the rows' "n"."""
        for key, scores in self.predictions.items():
            if key[2] == domain:
                return len(scores)
        counts = [r["n"] for r in self.rows if r["domain"] == domain and r["metric"] == "accuracy" and r.get("n")]
        return int(counts[0]) if counts else None

    # -- values -------------------------------------------------------------------------------------------------

    def get(
        self, stage: str, method: str, metric: str, domain: str | None = None, batch: int | None = None
    ) -> Interval | None:
        """A metric, averaged over seeds; without `domain` the pooled row, else the mean over domains."""
        tries: Iterable[str] = (domain,) if domain is not None else POOLED
        for d in tries:
            rows = self._values.get((stage, method, d, metric, batch))
            if rows:
                value = sum(float(r["value"]) for r in rows) / len(rows)
                if len(rows) == 1 and rows[0].get("low") is not None and rows[0].get("high") is not None:
                    return Interval(value, float(rows[0]["low"]), float(rows[0]["high"]))
                return Interval(value)
        if domain is not None:
            return None
        parts = [
            p
            for (s, m, d, k, b) in self._values
            if (s, m, k, b) == (stage, method, metric, batch) and (p := self.get(s, m, k, d, b)) is not None
        ]
        return Interval(sum(p.value for p in parts) / len(parts)) if parts else None

    def accuracy(self, stage: str, method: str, domain: str) -> Interval | None:
        """Accuracy in [0, 1]; domain "mean" averages the single domains. Intervals come from the rows or predictions."""
        domains = self.domains(stage)
        found = self.get(stage, method, "accuracy", domain)
        if found is None and domain == "mean":
            parts = [self.get(stage, method, "accuracy", d) for d in domains]
            values = [p.value for p in parts if p is not None]
            if not values or len(values) < len(domains):
                return None
            found = Interval(sum(values) / len(values))
        if found is None or found.known:
            return found
        wanted = domains if domain == "mean" else [domain]
        scores = [self.predictions[k] for d in wanted if (k := (stage, method, d)) in self.predictions]
        if len(scores) < len(wanted) or not scores:
            return found
        i = accuracy_interval(scores[0]) if domain != "mean" else bootstrap_mean(scores, seed=self.seed)
        return Interval(found.value, i.low, i.high)

    def difference(self, a: tuple[str, str], b: tuple[str, str], domain: str) -> Interval | None:
        """Accuracy of a minus that of b, each (stage, method), by paired bootstrap over shared examples."""
        first, second = (*a, domain), (*b, domain)
        if (first, second) not in self._differences:
            self._differences[first, second] = self._difference(a, b, domain)
        return self._differences[first, second]

    def _difference(self, a: tuple[str, str], b: tuple[str, str], domain: str) -> Interval | None:
        wanted = self.domains(a[0]) if domain == "mean" else [domain]
        keys = [((*a, d), (*b, d)) for d in wanted]
        if keys and all(x in self.predictions and y in self.predictions for x, y in keys):
            pairs = [(self.predictions[x], self.predictions[y]) for x, y in keys]
            return paired_bootstrap_mean(pairs, seed=self.seed)
        x, y = self.accuracy(*a, domain), self.accuracy(*b, domain)
        return None if x is None or y is None else Interval(x.value - y.value)

    def probe(self, stage: str) -> tuple[str, str] | None:
        """Where the linear probe was scored: in the stage itself, else in adapt."""
        for s in (stage, "adapt"):
            if PROBE in self.methods(s):
                return s, PROBE
        return None

    def gain(self, stage: str, method: str, domain: str) -> Interval | None:
        """Accuracy gained over the linear probe."""
        probe = self.probe(stage)
        return None if probe is None or method == PROBE else self.difference((stage, method), probe, domain)

    def ranking(self, stage: str, domain: str, methods: Sequence[str] | None = None) -> tuple[str | None, list[str]]:
        """The method with the best accuracy and those that tie with it (0 in the paired difference's interval)."""
        pool = [m for m in (methods or self.candidates(stage)) if self.accuracy(stage, m, domain) is not None]
        if not pool:
            return None, []
        best = max(pool, key=lambda m: self.accuracy(stage, m, domain).value)  # type: ignore[union-attr]
        ties = []
        for m in pool:
            gap = None if m == best else self.difference((stage, best), (stage, m), domain)
            if gap is not None and gap.contains_zero:
                ties.append(m)
        return best, ties

    def mismatches(self) -> list[str]:
        """Accuracies in the rows that their own predictions do not give (one seed only)."""
        if len(self.seeds()) > 1:
            return []
        found = []
        for (stage, method, domain), scores in self.predictions.items():
            row = self.get(stage, method, "accuracy", domain)
            if row is not None and abs(row.value - sum(scores) / len(scores)) > 1e-4:
                found.append(f"{stage}/{method}/{domain}")
        return found
