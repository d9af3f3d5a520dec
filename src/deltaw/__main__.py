"""`python -m deltaw`, the command line."""

from deltaw.cli import main

main()
