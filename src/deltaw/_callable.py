"""Rooms that are called by their verb: `deltaw.merge(…)` and `deltaw.merge.merge(…)` are the same."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def make_callable(room: str, verb: Callable[..., Any]) -> None:
    """Let the module `room` be called as `verb`.

    A package and a function cannot share the name `deltaw.merge`: importing the package would replace the
    function. So the package itself takes the call.
    """

    class Room(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return verb(*args, **kwargs)

    Room.__call__.__doc__ = verb.__doc__
    sys.modules[room].__class__ = Room
