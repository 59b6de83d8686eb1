"""Binarization methods: one paper, one file, one frozen dataclass whose fields are the recipe's keys."""

from binarize.layers.method import METHODS, Method, get_method, list_methods, register_method
from binarize.methods._bbcu import BBCU
from binarize.methods._bidiffsr import BiDiffSR
from binarize.methods._bidm import BiDM
from binarize.methods._bimacosr import BiMaCoSR
from binarize.methods._binarydm import BinaryDM
from binarize.methods._bireal import BiReal
from binarize.methods._bnn import BNN
from binarize.methods._dorefa import DoReFa
from binarize.methods._irnet import IRNet
from binarize.methods._reactnet import ReActNet
from binarize.methods._recu import ReCU
from binarize.methods._xnor import XNOR
from binarize.methods._xnorpp import XNORPlusPlus

METHODS.register(Method.name)(Method)  # "custom"
# The lower-case names are aliases.
bbcu = BBCU
bidiffsr = BiDiffSR
bidm = BiDM
bimacosr = BiMaCoSR
binarydm = BinaryDM
bireal = BiReal
bnn = BNN
dorefa = DoReFa
irnet = IRNet
reactnet = ReActNet
recu = ReCU
xnor = XNOR
xnorpp = XNORPlusPlus

__all__ = [
    "BBCU",
    "BNN",
    "XNOR",
    "BiDM",
    "BiDiffSR",
    "BiMaCoSR",
    "BiReal",
    "BinaryDM",
    "DoReFa",
    "IRNet",
    "Method",
    "ReActNet",
    "ReCU",
    "XNORPlusPlus",
    "bbcu",
    "bidiffsr",
    "bidm",
    "bimacosr",
    "binarydm",
    "bireal",
    "bnn",
    "dorefa",
    "get_method",
    "irnet",
    "list_methods",
    "reactnet",
    "recu",
    "register_method",
    "xnor",
    "xnorpp",
]
