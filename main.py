"""`python main.py ...` is `rowtune ...`, for a checkout that is not installed."""

from rowtune.cli.app import main

if __name__ == "__main__":
    main()
