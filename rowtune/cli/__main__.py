"""`python -m rowtune.cli` is `rowtune`."""

from rowtune.cli.app import main

main()
