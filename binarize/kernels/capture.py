"""What is watching the running call: compilers, tracers, dispatch modes and function transforms.

Compiled kernels read memory by address, and nothing that records or transforms operators can see that.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad
from torch.utils import _python_dispatch


def is_transformed() -> bool:
    """Return whether ``torch.autograd.Function`` of this package cannot run: then plain operators are used.

    This holds for torch.jit.trace, which cannot save such a function, for torch.func (vmap, grad, jvp) and for
    forward-mode differentiation, for which they have no rules.
    """
    if torch.compiler.is_compiling():  # first: compilers cannot trace the next lines
        return False
    return torch.jit.is_tracing() or _interpreter() is not None or forward_ad._current_level >= 0


def is_captured() -> bool:
    """Return whether all arithmetic has to be torch's operators, since something sees, records or transforms them.

    Besides compilers and the above, this holds for dispatch modes, such as FakeTensorMode's and make_fx's.
    """
    return torch.compiler.is_compiling() or _python_dispatch.is_in_torch_dispatch_mode() or is_transformed()


_interpreter = torch._C._functorch.peek_interpreter_stack
