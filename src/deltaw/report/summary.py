"""What the numbers say, in words. Method names stand in `backticks`; every sentence is derived from the results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deltaw.report import format as f
from deltaw.report.doubts import doubts
from deltaw.report.results import CEILING, DENSE, STAGES, Results
from deltaw.report.spectra import Spectra, per_method
from deltaw.report.statistics import Interval

#: a domain that falls further below the probe than this is named
_DROP = 0.02


@dataclass
class Part:
    """A heading with its sentences."""

    title: str
    sentences: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Tile:
    """One headline number: what it is, the value, whose it is, a second line, and good | bad | neutral."""

    label: str
    value: str
    name: str
    note: str
    tone: str = "neutral"


def _gain(i: Interval) -> str:
    """ "+3.9 points (95 % interval +3.0 to +4.8)"."""
    p = i.scaled(100)
    ends = f" (95 % interval {f.bounds(p, sign=True)})" if p.known else ""
    return f"{f.signed(p.value)} points{ends}"


def _pooled(results: Results, stage: str) -> tuple[str, str]:
    """The domain to summarise by, and how to say it."""
    domains = results.domains(stage)
    if len(domains) == 1:
        return domains[0], f"on {domains[0]}"
    return "mean", f"mean accuracy over {f.words(len(domains))} domains"


def _verdict(gain: Interval) -> str:
    """The interval of a gain over the probe and what follows from it, as a sentence."""
    if not gain.known:
        return "There are no predictions to say how sure that is."
    ends = f"The 95 % interval is {f.bounds(gain.scaled(100), sign=True)}"
    if gain.contains_zero:
        return f"{ends}, so this is a tie with the probe."
    return f"{ends}: {'a gain' if gain.value > 0 else 'a loss'} that holds."


def _headline(results: Results, stage: str, noun: str) -> list[str]:
    """Who is best, by how much over the probe, and who ties with it."""
    domain, where = _pooled(results, stage)
    best, ties = results.ranking(stage, domain)
    if best is None:
        return []
    value, gain = results.accuracy(stage, best, domain), results.gain(stage, best, domain)
    pool = results.candidates(stage)
    first = f"`{best}` is the best of {f.words(len(pool))} {noun}s" if len(pool) > 1 else f"`{best}` is the only {noun}"
    first += f": {f.percent(value.value)} % {where}"  # type: ignore[union-attr]
    found = [first + "."]
    if gain is not None:
        found = [f"{first}, {f.signed(100 * gain.value)} points against the linear probe.", _verdict(gain)]
    if ties:
        verb = "ties" if len(ties) == 1 else "tie"
        found.append(
            f"{f.listing(ties)} {verb} with it: the interval of the paired difference contains 0, so these data do "
            "not tell them apart."
        )
    elif len(pool) > 1 and results.difference((stage, best), (stage, next(m for m in pool if m != best)), domain):
        found.append("No other method ties with it.")
    return found


def _drops(results: Results, stage: str) -> list[str]:
    """Domains in which a method falls more than two points below the probe."""
    fallen, compared = [], False
    for m in results.candidates(stage):
        for d in results.domains(stage):
            gain = results.gain(stage, m, d)
            compared = compared or gain is not None
            if gain is not None and gain.value < -_DROP:
                fallen.append(f"`{m}` on {d} ({f.signed(100 * gain.value)})")
    if fallen:
        more = f" and {len(fallen) - 6} more" if len(fallen) > 6 else ""
        return [
            f"More than 2 points below the probe: {f.listing(fallen[:6], code=False) if not more else ', '.join(fallen[:6]) + more}."
        ]
    return ["No method falls more than 2 points below the probe in any domain."] if compared else []


def _thrift(results: Results, domain: str, best: str, ties: list[str]) -> list[str]:
    """What a smaller budget of trained parameters buys: a tie for less, or how much a cheap method gives up."""
    costs = {
        m: c.value
        for m in results.candidates("adapt")
        if (c := results.get("adapt", m, "trainable_params")) is not None
    }
    if best not in costs or len(costs) < 2:
        return []
    cheaper = [m for m in costs if costs[m] < costs[best]]
    if not cheaper:
        return ["No other adapted model trains fewer parameters."]
    equal = [m for m in cheaper if m in ties]
    pick = min(equal, key=costs.__getitem__) if equal else results.ranking("adapt", domain, cheaper)[0]
    gap = results.difference(("adapt", best), ("adapt", str(pick)), domain)
    if pick is None or gap is None:
        return []
    budget = (
        f"{f.count(costs[pick])} trained parameters, {f.number(100 * costs[pick] / costs[best])} % of those of `{best}`"
    )
    if pick in equal:
        return [f"Of these `{pick}` is the cheapest, with {budget}: take it where size or storage counts."]
    return [f"With fewer parameters `{pick}` comes closest: {100 * gap.value:.1f} points behind with {budget}."]


def adapt(results: Results) -> list[str]:
    found = _headline(results, "adapt", "adapted model")
    if not found:
        return found
    domain, _ = _pooled(results, "adapt")
    best, ties = results.ranking("adapt", domain)
    found += _thrift(results, domain, best, ties) if best is not None else []
    gains = {
        m: g for m in results.candidates("adapt") if (g := results.gain("adapt", m, domain)) is not None and g.known
    }
    if gains:
        sure = [m for m, g in gains.items() if not g.contains_zero and g.value > 0]
        if len(sure) == len(gains) and len(gains) > 1:
            every = "Both" if len(gains) == 2 else f"All {f.words(len(gains))}"
            found.append(f"{every} beat the linear probe at 95 %.")
        elif len(gains) > 1:
            unsure = [m for m in gains if m not in sure]
            found.append(f"No gain over the probe is established for {f.listing(unsure)}.")
    return found + _drops(results, "adapt")


def merge(results: Results) -> list[str]:
    found = _headline(results, "merge", "merged model")
    domain, _ = _pooled(results, "merge")
    best, _ = results.ranking("merge", domain)
    if best is not None and CEILING in results.methods("merge"):
        gap = results.difference(("merge", best), ("merge", CEILING), domain)
        ceiling = results.accuracy("merge", CEILING, domain)
        if gap is not None and ceiling is not None and ceiling.value > 0:
            tie = ", a tie" if gap.known and gap.contains_zero else ""
            kept = 100 * (ceiling.value + gap.value) / ceiling.value
            found.append(
                f"Against the single-task models, one per domain, at {f.percent(ceiling.value)} %: {_gain(gap)}{tie}; one "
                f"merged model keeps {kept:.1f} % of their accuracy."
            )
    return found + _drops(results, "merge")


def _ratio(results: Results, method: str, metric: str, batch: int | None = None) -> float | None:
    a, b = (results.get("compress", m, metric, batch=batch) for m in (method, DENSE))
    return a.value / b.value if a is not None and b is not None and b.value > 0 else None


def compress(results: Results) -> list[str]:
    domain, _ = _pooled(results, "compress")
    best, ties = results.ranking("compress", domain)
    if best is None:
        return []
    value, dense = results.accuracy("compress", best, domain), results.accuracy("compress", DENSE, domain)
    known = (("linear_params", "parameters in linear layers"), ("params", "parameters"), ("size_bytes", "bytes"))
    ratios = [(r, what) for metric, what in known if (r := _ratio(results, best, metric)) is not None]
    shares = [f"{100 * r:.0f} % of the {what}" for r, what in ratios]
    text = f"`{best}` keeps the most accuracy: {f.percent(value.value)} %"  # type: ignore[union-attr]
    if dense is not None:
        gap = results.difference(("compress", best), ("compress", DENSE), domain)
        text += f" of {f.percent(dense.value)} % before compression"
    found = [text + (f", at {f.listing(shares, code=False)}." if shares else ".")]
    if dense is not None and gap is not None:
        tie = ", a tie with the dense model" if gap.known and gap.contains_zero else ""
        found.append(f"That is {_gain(gap)} against the dense model{tie}.")
    if ties:
        found.append(f"{f.listing(ties)} {'ties' if len(ties) == 1 else 'tie'} with `{best}`.")
    losers = [m for m in results.candidates("compress") if m not in (best, *ties)]
    for m in losers:
        gap = results.difference(("compress", best), ("compress", m), domain)
        if gap is not None:
            p, size = gap.scaled(100), _ratio(results, m, "size_bytes")
            ends = f" (95 % interval {f.bounds(p)})" if p.known else ""
            weight = f" at {100 * size:.0f} % of the bytes" if size is not None else ""
            found.append(f"`{m}` ends {p.value:.1f} points below it{ends}{weight}.")
    speeds = [(b, r) for b in results.batches("compress") if (r := _ratio(results, best, "latency_ms", b)) is not None]
    if speeds:
        said = f.listing([f"{r:.2f} times (batch {b})" for b, r in speeds], code=False)
        found.append(
            f"`{best}` takes {said} the dense model's time"
            + (": smaller is not faster here." if all(r >= 1 for _, r in speeds) else ".")
        )
    return found


def inspect(results: Results, spectra: Spectra) -> list[str]:
    ranks = per_method(spectra, lambda c: c.effective_rank) or _from_rows(results, "effective_rank")
    counts = per_method(spectra, lambda c: c.intruders) or _from_rows(results, "intruders")
    norms = per_method(spectra, lambda c: c.relative_norm) or _from_rows(results, "relative_norm")
    found = []
    if ranks:
        order = sorted(ranks, key=ranks.__getitem__)
        text = f"The effective rank of ΔW runs from {f.number(ranks[order[0]])} for `{order[0]}`"
        found.append(
            text + f" to {f.number(ranks[order[-1]])} for `{order[-1]}` (median over matrices)."
            if len(order) > 1
            else text + "."
        )
    if norms:
        far = max(norms, key=norms.__getitem__)
        found.append(
            f"`{far}` moves the weights furthest: ‖ΔW‖ is {f.number(100 * norms[far])} % of ‖W‖ at the median."
        )
    if counts:
        none = [m for m, n in counts.items() if n == 0]
        some = sorted((m for m in counts if counts[m]), key=lambda m: -counts[m])
        said = f.listing([f"`{m}` {f.number(counts[m])}" for m in some], code=False)
        if some:
            found.append(f"Intruder dimensions per model: {said}" + (f"; none for {f.listing(none)}." if none else "."))
        else:
            found.append("No method made an intruder dimension.")
    return found


def _from_rows(results: Results, metric: str) -> dict[str, float]:
    found = {m: results.get("inspect", m, metric) for m in results.methods("inspect")}
    return {m: i.value for m, i in found.items() if i is not None}


def missing(results: Results, stage: str) -> str:
    """The sentence for a stage without rows."""
    return f"The run has no results for the stage {stage}, so it is left out."


def summarise(results: Results, spectra: Spectra, meta: Mapping[str, Any]) -> list[Part]:
    """The summary: one part per stage that ran, then the doubts."""
    told = {
        "adapt": adapt(results),
        "merge": merge(results),
        "compress": compress(results),
        "inspect": inspect(results, spectra),
    }
    parts = [Part(stage.capitalize(), told[stage]) for stage in STAGES if told[stage]]
    absent = [s for s in STAGES if not results.has(s) and not told[s]]
    if absent:
        parts.append(Part("Not run", [missing(results, s) for s in absent]))
    return [*parts, Part("Doubts", doubts(results, meta))]


def tiles(results: Results, meta: Mapping[str, Any]) -> list[Tile]:
    """Headline numbers: the best adapted, merged and compressed model and the time it all took."""
    found = []
    for stage, label in (("adapt", "best adapted model"), ("merge", "best merged model")):
        domain, _ = _pooled(results, stage)
        best, _ = results.ranking(stage, domain)
        if best is None:
            continue
        gain, value = results.gain(stage, best, domain), results.accuracy(stage, best, domain)
        note, tone = "", "neutral"
        if gain is not None:
            p = gain.scaled(100)
            note = f"{f.signed(p.value)} points against the probe" + (f", {f.bounds(p, sign=True)}" if p.known else "")
            tone = "neutral" if gain.contains_zero or not gain.known else "good" if gain.value > 0 else "bad"
        found.append(Tile(label, f"{f.percent(value.value)} %", best, note, tone))  # type: ignore[union-attr]
    domain, _ = _pooled(results, "compress")
    best, _ = results.ranking("compress", domain)
    if best is not None:
        value, gap = results.accuracy("compress", best, domain), None
        size = _ratio(results, best, "size_bytes")
        if DENSE in results.methods("compress"):
            gap = results.difference(("compress", best), ("compress", DENSE), domain)
        note = f"{f.signed(100 * gap.value)} points" if gap is not None else ""
        note += f" at {100 * size:.0f} % of the bytes" if size is not None else ""
        found.append(Tile("best compressed model", f"{f.percent(value.value)} %", best, note.strip()))  # type: ignore[union-attr]
    timings = {k: v for k, v in (meta.get("timings") or {}).items() if isinstance(v, int | float)}
    if timings:
        total = timings.get("total", sum(timings.values()))
        longest = max((k for k in timings if k != "total"), key=timings.__getitem__, default="")
        found.append(Tile("whole run", f.duration(total), "", f"longest stage: {longest}" if longest else ""))
    return found
