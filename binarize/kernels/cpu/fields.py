"""The parameters of the compiled workers: int64 fields that hold addresses, strides in bytes, sizes and flags.

Every block begins with WORKERS, how many workers have started, TASKS, how many tasks have been taken, and COUNT, how
many there are. BF16 is 1 for bfloat16 images and 0 for float32. SCRATCH is the memory of the first worker and
SCRATCH_STEP the step to the next. An image X has X_BATCH, X_ROW and X_PIXEL, its strides. An address of 0 stands for an
absent tensor.
"""

from enum import IntEnum

# A binary convolution. STRIP: output rows of a task; GROUP_IN, GROUP_OUT: channels of a group; WORDS: of a pixel and
# group; OUT_BLOCKS: of 16 channels, of a group; FILTER_SUMS: int32 (taps, lanes); BASE: int32 (lanes), the dot product
# of no differing bits; GROUP: int64 (B), rows of THRESHOLDS and TABLE; LIMITS: not an address but two floats, the
# clamp; EARLY: 1 for a shortcut before the activation; CHANNEL_BIAS: float32 (B, C_out); NORM_FACTORS, NORM_OFFSETS:
# float32 (B, C_in); ROW_SUMS: of the output, as in Norm, or 0; BORDERS: output columns with a tap outside the input;
# INNER_FIRST, INNER_LAST: the first column whose taps are all inside and the one after the last.
Conv = IntEnum(
    "Conv",
    "WORKERS TASKS COUNT BF16 SCRATCH SCRATCH_STEP STRIP HEIGHT WIDTH OUT_HEIGHT OUT_WIDTH GROUPS GROUP_IN "
    "GROUP_OUT WORDS OUT_BLOCKS KERNEL_H KERNEL_W STRIDE_H STRIDE_W LEFT RIGHT TOP DILATION_H DILATION_W X X_BATCH "
    "X_ROW X_PIXEL OUT OUT_BATCH OUT_ROW OUT_PIXEL RESIDUAL RESIDUAL_BATCH RESIDUAL_ROW RESIDUAL_PIXEL FILTERS "
    "FILTER_SUMS BASE UNSIGNED THRESHOLDS TABLE GROUP LIMITS SHORTCUT EARLY CHANNEL_BIAS NORM_FACTORS NORM_OFFSETS "
    "ROW_SUMS BORDERS INNER_FIRST INNER_LAST",
    start=0,
)

# GroupNorm's moments, or its result and SiLU. ROW_SUMS: float32 (B, H, 2, C), sums of rows and of their squares;
# FACTORS, OFFSETS, SHIFT: float32 (B, C); WEIGHT, BIAS: float32 (C); EPS: the address of a float64;
# TOTALS: scratch for 2 C float64, rounded up to whole vectors.
Norm = IntEnum(
    "Norm",
    "WORKERS TASKS COUNT BF16 HEIGHT WIDTH CHANNELS X X_BATCH X_ROW X_PIXEL OUT OUT_BATCH OUT_ROW OUT_PIXEL "
    "ROW_SUMS FACTORS OFFSETS GROUPS WEIGHT BIAS SHIFT EPS TOTALS",
    start=0,
)

# A shuffle of channels. CHANNELS: of X; WAYS: the number of places, 2 or 4; PLACE: the first place, with the strides
# from one pixel of X to the next; COLUMN, ROW: bytes from PLACE to the others; BACK: 1 to copy from the places to X.
Deal = IntEnum(
    "Deal",
    "WORKERS TASKS COUNT BF16 HEIGHT WIDTH CHANNELS WAYS BACK X X_BATCH X_ROW X_PIXEL PLACE PLACE_BATCH PLACE_ROW "
    "PLACE_PIXEL COLUMN ROW",
    start=0,
)

# A full-precision 3x3 convolution by Winograd's algorithm, and the transform of its weights. TILE: m of m x m outputs,
# 2 or 4; TILE_ROWS: rows of tiles of a task; TILES: multiplied together, a multiple of 4; FILTERS: float32 (n * n,
# C_out / 16, C_in, 16), or (n * n, C_in, C_out) if torch multiplies, with the steps FILTERS_OUT per 16 output channels,
# FILTERS_IN, and FILTERS_STEP per n * n; DOT_BF16: 1 to multiply bfloat16, with FILTERS bfloat16 (n * n, C_out / 16,
# C_in / 2, 16, 2); ROW_SUMS: of the output, as in Norm, or 0; WEIGHT: float32, or bfloat16 if WEIGHT_BF16, of the
# direct convolution, with its strides.
Winograd = IntEnum(
    "Winograd",
    "WORKERS TASKS COUNT BF16 SCRATCH SCRATCH_STEP TILE TILE_ROWS TILES HEIGHT WIDTH IN_CHANNELS OUT_CHANNELS X "
    "X_BATCH X_ROW X_PIXEL OUT OUT_BATCH OUT_ROW OUT_PIXEL RESIDUAL RESIDUAL_BATCH RESIDUAL_ROW RESIDUAL_PIXEL "
    "FILTERS FILTERS_OUT FILTERS_IN FILTERS_STEP DOT_BF16 BIAS NORM_FACTORS NORM_OFFSETS ROW_SUMS WEIGHT WEIGHT_OUT "
    "WEIGHT_IN WEIGHT_ROW WEIGHT_COLUMN WEIGHT_BF16",
    start=0,
)

# Winograd's transforms of all tiles, and sums of their products for the gradient of the weights; all float32. TILES: of
# a group; GROUPS: of tiles; TASK_GROUPS: groups of a task; COUNT_TILES, FIRST: how many tiles, and the first; ROWS,
# COLUMNS: of tiles of an image; GRAD: the gradient of the output, or 0 to transform the input alone; SUMS: (tasks, n *
# n, C_in, C_out), zeros at first, or 0 to keep the transforms and multiply nothing; PATCHES: the transforms of the
# input, n * n times (tiles, C_in) with PATCHES_STEP between; PRODUCTS: those of the gradient, or products of torch's;
# OUT: an image, or a dense gradient of weights.
Tiles = IntEnum(
    "Tiles",
    "WORKERS TASKS COUNT TILE TILES GROUPS TASK_GROUPS COUNT_TILES FIRST ROWS COLUMNS HEIGHT WIDTH IN_CHANNELS "
    "OUT_CHANNELS X X_BATCH X_ROW X_PIXEL GRAD GRAD_BATCH GRAD_ROW GRAD_PIXEL SUMS OUT OUT_BATCH OUT_ROW OUT_PIXEL "
    "BIAS PATCHES PATCHES_STEP PRODUCTS PRODUCTS_STEP SCRATCH SCRATCH_STEP",
    start=0,
)
