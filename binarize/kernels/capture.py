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
    # Compilers cannot trace `_is_transformed`.
    return not torch.compiler.is_compiling() and _is_transformed()


def is_captured() -> bool:
    """Return whether all arithmetic has to be torch's operators, since something sees, records or transforms them.

    Besides compilers and the above, this holds for dispatch modes, such as FakeTensorMode's and make_fx's.
    """
    return torch.compiler.is_compiling() or _python_dispatch.is_in_torch_dispatch_mode() or _is_transformed()


def _is_transformed() -> bool:
    return torch._C._is_tracing() or _interpreter() is not None or forward_ad._current_level >= 0


_interpreter = torch._C._functorch.peek_interpreter_stack
