"""Kernels around a kernel, which read the clock; apart from busy_time.py, which is imported where Triton is not.

times[program] = multiprocessor, start and end in ns of `KERNEL(a, b, c, d, e, f, g, *rest)`. The first seven arguments
come one by one: all TMA descriptors are among them, and triton 3.6 takes none in a tuple.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra import cuda

SINGLE = 7


@triton.jit
def timed_kernel(times, KERNEL: tl.constexpr, a, b, c, d, e, f, g, rest):
    of_program = times + 3 * tl.program_id(0)
    start = cuda.globaltimer()
    KERNEL(a, b, c, d, e, f, g, *rest)
    tl.debug_barrier()
    tl.store(of_program, cuda.smid().to(tl.int64))
    tl.store(of_program + 1, start)
    tl.store(of_program + 2, cuda.globaltimer())


@gluon.jit
def timed_gluon_kernel(times, KERNEL: gl.constexpr, a, b, c, d, e, f, g, rest):
    of_program = times + 3 * gl.program_id(0)
    start = cuda.globaltimer()
    KERNEL(a, b, c, d, e, f, g, *rest)
    gl.store(of_program, cuda.smid().to(gl.int64))
    gl.store(of_program + 1, start)
    gl.store(of_program + 2, cuda.globaltimer())
