"""A demonstration: train a small binary super-resolution network and compare it with bicubic upscaling."""

from binarize.demo.run import run_demo

__all__ = ["run_demo"]
