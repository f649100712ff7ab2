"""`python -m rowtune` is `rowtune`."""

from rowtune.cli.app import main

main()
