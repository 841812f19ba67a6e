"""``python -m anymla``: the command line."""

from anymla.cli import main

main()
