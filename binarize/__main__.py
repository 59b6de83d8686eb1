"""``python -m binarize``: the same as the `binarize` command."""

from _binarize_program import main

if __name__ == "__main__":
    main()
