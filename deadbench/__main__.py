"""`python -m deadbench` is the command `deadbench`."""

from deadbench.runners.cli.main import main

if __name__ == "__main__":
    main()
