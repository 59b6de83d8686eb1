"""``python -m binarize``: the same as the `binarize` command."""

from binarize.cli import main

if __name__ == "__main__":
    main()
