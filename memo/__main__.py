"""`python -m memo`: the same as the command `memo`."""

from __future__ import annotations

from memo.cli.commands import main

if __name__ == "__main__":
    main(prog_name="memo")
