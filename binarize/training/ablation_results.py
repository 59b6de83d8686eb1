"""The former place of `binarize.studies.results`."""

from binarize.deprecation import renamed

_NEW = "binarize.studies.results:"
__getattr__ = renamed(__name__, {"AblationResult": _NEW + "AblationResult", "TrialResult": _NEW + "RunResult"})
