"""Compile the CUDA kernels for a GPU that the machine may lack. test_cuda.py runs this outside Triton's interpreter."""

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from binarize.kernels import cuda

BYTES, WORDS, ROWS, FLOATS = "*i8", "*i32", "*i64", "*fp32"
IMAGES = ("*fp32", "*bf16", "*fp16")
READ = {"group": ROWS, "thresholds": FLOATS, "factors": FLOATS, "offsets": FLOATS}
PRODUCT = {**READ, "codes": BYTES, "filters": WORDS, "table": FLOATS, "channel_bias": FLOATS}
PRODUCT |= {"low": "fp32", "high": "fp32"}
FACTORS = dict.fromkeys(("means", "variances", "channel_bias", "weight", "bias", "factors", "offsets"), FLOATS)
FACTORS["eps"] = "fp32"


def compile_kernel(kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int) -> None:
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    target = GPUTarget("cuda", capability, 32)
    assert triton.compile(source, target=target, options={"num_warps": 4, "enable_fp_fusion": False}).asm["ptx"]


def main(capability: int) -> None:
    for image in IMAGES:
        both: dict[str, Any] = {"GROUPED": True, "NORMED": True}
        for signs, out in ((True, BYTES), (False, image)):
            constants = {**both, "SIGNS": signs, "UNSIGNED": False, "PIXELS": 64, "CHANNELS": 32}
            compile_kernel(cuda._input_kernel, {**READ, "x": image, "out": out}, constants, capability)
        last = {"SHORTCUT": 1, "CLAMPED": True, "BIASED": True, "RESIDUAL": True}
        constants = {**both, **last, "LANES": 16, "PIXELS": 64, "OUTS": 16, "STEP": 32}
        types = {**PRODUCT, **dict.fromkeys(("x", "out", "residual"), image)}
        compile_kernel(cuda._product_kernel, types, constants, capability)
    given = {"SHIFTED": True, "WEIGHT": True, "BIAS": True, "CHANNELS": 32}
    compile_kernel(cuda._factors_kernel, FACTORS, given, capability)


if __name__ == "__main__":
    main(int(sys.argv[1]))
