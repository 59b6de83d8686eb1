"""Functions that the compiled workers call, which become machine code only inside a worker.

``numba.njit`` would optimize each of them and make it machine code by itself, and optimize it again inside each caller
of its callers, which doubles the time until a worker is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba.core import compiler
from numba.core.codegen import JITCodeLibrary
from numba.core.registry import CPUDispatcher

OPTIONS = {"nopython": True, "error_model": "numpy"}


class _Library(JITCodeLibrary):
    """LLVM code that is left as it is until it is linked into the library of a worker."""

    def finalize(self) -> None:
        for library in dict.fromkeys(self._linking_libraries):
            self._final_module.link_in(library._get_module_for_linking(), preserve=True)
        self._finalized = True


class _Part(CPUDispatcher):
    def compile(self, args: tuple[Any, ...]) -> None:
        """Make LLVM code for these types of arguments. Numba calls this for each call that it compiles."""
        if args in self.overloads:
            return
        context, flags = self.targetctx, compiler.Flags()
        self.targetdescr.options.parse_as_flags(flags, self.targetoptions)
        flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
        library = _Library(context.codegen(), self.py_func.__qualname__)
        library.enable_object_caching()
        result = compiler.compile_extra(self.typingctx, context, self.py_func, args, None, flags, {}, library)
        result = result._replace(entry_point=object())  # the key by which compiling a caller finds the code
        context.insert_user_function(result.entry_point, result.fndesc, [library])
        self.overloads[args] = result


def part(function: Callable[..., Any]) -> Any:
    """Make a function one that workers and other parts can call."""
    return _Part(function, {}, dict(OPTIONS))
