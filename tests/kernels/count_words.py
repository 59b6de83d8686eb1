"""Compares word counts with plain torch on the processor that numba is configured for.

It is a program, because numba reads its configuration when it is imported; see test_packed_conv.py.
"""

import torch

from binarize.kernels import backends
from binarize.kernels.cpu.simd import cpu_features
from binarize.layers import BinaryConv2d
from binarize.methods import Method
from binarize.packed import PackedConv2d

for words in (*range(1, 20), 31, 32, 63, 72, 255, 263, 264, 520):
    layer = PackedConv2d(BinaryConv2d(32 * words, 40, 1, method=Method(weight="sign")))
    codes = layer.codes()[0].float().flatten(1)
    x = torch.stack([codes[3], -codes[3], *torch.randn(3, 32 * words)], 1).view(1, -1, 1, 5)
    found = []
    for backend in ("numba", "torch"):
        with backends.use(backend):
            found.append(layer(x))
    assert torch.equal(*found), words
convolution = PackedConv2d(BinaryConv2d(64, 72, 3, 2, 1, method="reactnet").eval())
x = torch.randn(2, 64, 21, 19)
for kind in (torch.float32, torch.bfloat16):
    with backends.use("torch"):
        expected = convolution(x.to(kind))
    torch.testing.assert_close(convolution(x.to(kind)), expected, rtol=1.6e-2, atol=2e-2)
print(cpu_features(), "equal")
