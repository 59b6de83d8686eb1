"""Signs and surrogate gradients, binary layers, their parts, and dimension-consistent blocks."""

from binarize.layers.activations import (
    ApproxSign,
    ClippedSign,
    EDESign,
    IdentitySign,
    MeanClippedSign,
    NormalizedApproxSign,
    UnitRound,
)
from binarize.layers.affine import ChannelScale, InputMeanScale, KMapScale, RPReLU, Shift
from binarize.layers.binary import BinaryConv2d, BinaryLinear
from binarize.layers.parts import LayerSpec, Part, list_parts, register_part
from binarize.layers.product import BinaryWeight, binary_conv2d, binary_linear
from binarize.layers.schedule import Scheduled, training_step
from binarize.layers.shortcut import PoolShortcut, ProjectionShortcut, ScaledShortcut
from binarize.layers.signs import approx_sign, clipped_sign, ede_sign, hard_sign, identity_sign, unit_round
from binarize.layers.structure import (
    AddFusion,
    ConcatFusion,
    ConvDown,
    ConvUp,
    CPDown,
    CPUp,
    CSFusion,
    PixelDown,
    PixelUp,
    SplitFusion,
)
from binarize.layers.weights import (
    LibraWeight,
    RectifiedWeight,
    ScaledSignWeight,
    SignWeight,
    TensorScaledWeight,
    TwoBasisWeight,
    TwoStageWeight,
    XnorWeight,
)

__all__ = [
    "AddFusion",
    "ApproxSign",
    "BinaryConv2d",
    "BinaryLinear",
    "BinaryWeight",
    "CPDown",
    "CPUp",
    "CSFusion",
    "ChannelScale",
    "ClippedSign",
    "ConcatFusion",
    "ConvDown",
    "ConvUp",
    "EDESign",
    "IdentitySign",
    "InputMeanScale",
    "KMapScale",
    "LayerSpec",
    "LibraWeight",
    "MeanClippedSign",
    "NormalizedApproxSign",
    "Part",
    "PixelDown",
    "PixelUp",
    "PoolShortcut",
    "ProjectionShortcut",
    "RPReLU",
    "RectifiedWeight",
    "ScaledShortcut",
    "ScaledSignWeight",
    "Scheduled",
    "Shift",
    "SignWeight",
    "SplitFusion",
    "TensorScaledWeight",
    "TwoBasisWeight",
    "TwoStageWeight",
    "UnitRound",
    "XnorWeight",
    "approx_sign",
    "binary_conv2d",
    "binary_linear",
    "clipped_sign",
    "ede_sign",
    "hard_sign",
    "identity_sign",
    "list_parts",
    "register_part",
    "training_step",
    "unit_round",
]
