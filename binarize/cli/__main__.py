"""``python -m binarize.cli``: the same as ``python -m binarize``."""

from binarize.cli import main

if __name__ == "__main__":
    main()
