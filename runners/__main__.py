"""`python -m runners` is `deadbench`."""

from runners.cli import main

main()
