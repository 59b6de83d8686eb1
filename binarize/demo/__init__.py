"""A demonstration: train a small binary super-resolution network and compare it with bicubic upscaling."""

from typing import TYPE_CHECKING

from binarize.importing import exports

if TYPE_CHECKING:
    from binarize.demo.run import run_demo

__all__ = ["run_demo"]

__getattr__ = exports(__name__, {"run": ("run_demo",)})
