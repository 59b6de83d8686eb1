"""Binary layers, their parts, and dimension-consistent blocks."""

from binarize.kernels.product import BinaryWeight, binary_conv2d, binary_linear
from binarize.kernels.signs import (
    approx_sign,
    clipped_identity,
    clipped_sign,
    ede_sign,
    hard_sign,
    identity_sign,
    unit_round,
)
from binarize.layers.activations import (
    ApproxSign,
    ClippedSign,
    EDESign,
    IdentitySign,
    MeanClippedSign,
    NormalizedApproxSign,
    UnitRound,
)
from binarize.layers.binary import BinaryConv2d, BinaryLinear
from binarize.layers.delayed import (
    Delayed,
    DelayedActivation,
    DelayedScale,
    DelayedWeight,
    TwoStageWeight,
    delayed,
    undelayed,
)
from binarize.layers.fused import norm_silu
from binarize.layers.parts import (
    ActivationBinarizer,
    LayerPart,
    LayerSpec,
    Part,
    Scale,
    WeightBinarizer,
    list_parts,
    register_part,
)
from binarize.layers.scales import ChannelScale, InputMeanScale, KMapScale
from binarize.layers.schedule import Scheduled, training_step
from binarize.layers.shortcut import PoolShortcut, ProjectionShortcut, ScaledShortcut
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
from binarize.layers.timestep_aware import RPReLU, Shift
from binarize.layers.weights import (
    FixedWeight,
    LibraWeight,
    RectifiedWeight,
    ScaledSignWeight,
    SignWeight,
    TensorScaledWeight,
    TwoBasisWeight,
    XnorWeight,
)

__all__ = [
    "ActivationBinarizer", "AddFusion", "ApproxSign", "BinaryConv2d", "BinaryLinear", "BinaryWeight", "CPDown",
    "CPUp", "CSFusion", "ChannelScale", "ClippedSign", "ConcatFusion", "ConvDown", "ConvUp", "Delayed",
    "DelayedActivation", "DelayedScale", "DelayedWeight", "EDESign", "FixedWeight", "IdentitySign",
    "InputMeanScale", "KMapScale", "LayerPart", "LayerSpec", "LibraWeight", "MeanClippedSign",
    "NormalizedApproxSign", "Part", "PixelDown", "PixelUp", "PoolShortcut", "ProjectionShortcut", "RPReLU",
    "RectifiedWeight", "Scale", "ScaledShortcut", "ScaledSignWeight", "Scheduled", "Shift", "SignWeight",
    "SplitFusion", "TensorScaledWeight", "TwoBasisWeight", "TwoStageWeight", "UnitRound", "WeightBinarizer",
    "XnorWeight", "approx_sign", "binary_conv2d", "binary_linear", "clipped_identity", "clipped_sign", "delayed",
    "ede_sign",
    "hard_sign", "identity_sign", "list_parts", "norm_silu", "register_part", "training_step", "undelayed",
    "unit_round",
]  # fmt: skip
