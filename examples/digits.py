"""Write scikit-learn's handwritten digits, 1,797 images of 8x8 pixels, into a folder with a sub-folder per digit.

python examples/digits.py digits
"""

import sys
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

folder = Path(sys.argv[1])
digits = load_digits()
for number, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
    (folder / str(digit)).mkdir(parents=True, exist_ok=True)
    Image.fromarray((pixels * 255 / 16).round().astype("uint8")).save(folder / str(digit) / f"{number:04}.png")
