"""`python -m mergesfl`, the same as the console script."""

from mergesfl.cli import main

if __name__ == "__main__":
    main()
