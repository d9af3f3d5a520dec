"""The command line: one file a verb; heavy imports wait until a verb runs."""

from deltaw.cli.app import main

__all__ = ["main"]
