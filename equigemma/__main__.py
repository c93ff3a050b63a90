"""`python -m equigemma`: the command line."""

from equigemma.cli import main


if __name__ == "__main__":
    main()
