"""What a careful reader should hold against the numbers of a run, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltaw.report.results import STAGES, Results


def doubts(results: Results, meta: Mapping[str, Any]) -> list[str]:
    """What a careful reader should hold against these numbers."""
    found = []
    sizes = {d: n for d in results.domains() if (n := results.examples(d)) is not None}
    if sizes:
        n = min(sizes.values())
        accuracies = [
            i.value
            for s in STAGES
            for m in results.methods(s)
            for d in sizes
            if (i := results.get(s, m, "accuracy", d))
        ]
        p = sum(accuracies) / len(accuracies) if accuracies else 0.5
        half = 196 * (p * (1 - p) / n) ** 0.5
        found.append(
            f"{'Few test examples' if n < 1000 else 'Test examples'}: {n} a domain{' at the least' if len(set(sizes.values())) > 1 else ''}, "
            f"so a single accuracy is known to about ±{half:.1f} points; the paired differences are sharper."
        )
    seeds = results.seeds()
    if len(seeds) == 1:
        found.append(
            "One seed: the intervals cover the choice of test examples, not the luck of initialisation and data order."
        )
    else:
        found.append(
            f"{len(seeds)} seeds are averaged in the accuracies; the paired differences come from one set of predictions."
        )
    compared = sum(len(results.candidates(s)) * (len(results.domains(s)) + 1) for s in STAGES[:3])
    if compared > 20:
        found.append(
            f"About {compared} comparisons are shown at 95 % each, uncorrected: one in twenty would miss 0 by chance. "
            "The best method is picked on the examples it is reported on, which flatters it a little."
        )
    if results.rows and not results.predictions:
        found.append("No predictions were handed over, so differences have no intervals and ties cannot be told.")
    wrong = results.mismatches()
    if wrong:
        found.append(
            f"Accuracy and predictions disagree for {', '.join(wrong[:4])}{' and more' if len(wrong) > 4 else ''}: one of them is wrong."
        )
    if results.batches("compress"):
        found.append("Latency was measured on the one machine named below, with whatever else ran on it.")
    if meta.get("mode") == "quick":
        found.append("This was a quick run on reduced counts: good for seeing that everything works, not for choosing.")
    return found
