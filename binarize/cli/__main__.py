"""``python -m binarize.cli``: the same as ``python -m binarize``."""

from _binarize_program import main

if __name__ == "__main__":
    main()
