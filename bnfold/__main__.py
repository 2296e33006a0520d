"""python -m bnfold: the console script, without its being installed."""

import sys

from bnfold.cli import main

if __name__ == "__main__":
    sys.exit(main())
