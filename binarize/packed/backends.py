"""The former place of `binarize.kernels.backends`."""

from binarize.deprecation import renamed

_NEW = "binarize.kernels.backends:"
__getattr__ = renamed(__name__, {name: _NEW + name for name in ("BACKENDS", "current", "kernels_for", "use")})
