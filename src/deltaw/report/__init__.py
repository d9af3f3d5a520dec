"""The report of a run: statistics, tables, plots and one self-contained HTML file.

from deltaw.report import build_report
build_report("runs/sentiment", rows, meta=meta, predictions=predictions, spectra=spectra)
"""

from deltaw.report.html import build_report
from deltaw.report.results import Results
from deltaw.report.statistics import (
    Interval,
    accuracy_interval,
    bootstrap_mean,
    paired_bootstrap,
    paired_bootstrap_mean,
    wilson,
)
from deltaw.report.summary import summarise

__all__ = [
    "Interval",
    "Results",
    "accuracy_interval",
    "bootstrap_mean",
    "build_report",
    "paired_bootstrap",
    "paired_bootstrap_mean",
    "summarise",
    "wilson",
]
