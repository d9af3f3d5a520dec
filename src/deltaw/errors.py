"""The errors deltaw raises on bad input.

Every message names the thing, says what was found and what was expected, and ends with what to do. The
command line prints the message alone; `--debug` adds the traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DeltawError(Exception):
    """Base class: anything a user can mend by changing the input."""


class OptionError(DeltawError, ValueError):
    """An option has a value outside its range, or the wrong type."""


class UnknownNameError(DeltawError, LookupError):
    """A method, role, pattern, column or key does not exist; the message lists near misses."""


class TargetError(DeltawError, ValueError):
    """A selection of matrices matched nothing, or something that does not fit the method."""


class CheckpointError(DeltawError, ValueError):
    """A model folder or file is missing, corrupt, of the wrong kind or of another architecture."""


class DataError(DeltawError, ValueError):
    """Training or calibration data that cannot be used as asked."""


class NonFiniteError(DeltawError, ArithmeticError):
    """NaN or infinity where a finite number is needed."""


class CompositionError(DeltawError, TypeError):
    """Two parts that do not fit together (two rotations on one layer, a driver under a trainer that refuses it)."""


def nearest(name: str, candidates: Iterable[str], count: int = 3) -> list[str]:
    """The candidates closest in spelling to `name`, best first."""
    pool = sorted(set(candidates))
    found = difflib.get_close_matches(name, pool, n=count, cutoff=0.5)
    return found or [c for c in pool if name and (name in c or c in name)][:count]


def unknown_name(kind: str, name: str, candidates: Iterable[str], todo: str = "") -> UnknownNameError:
    """Build the error for a name that does not exist, with the nearest ones that do."""
    pool = list(candidates)
    close = nearest(name, pool)
    text = f"unknown {kind} {name!r}"
    if close:
        text += "; did you mean " + " or ".join(repr(c) for c in close) + "?"
    elif len(pool) <= 20:
        text += "; known: " + ", ".join(sorted(pool))
    if todo:
        text += f" {todo}"
    return UnknownNameError(text)
