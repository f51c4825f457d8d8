"""A kernel around a kernel, which reads the clock; apart from busy_time.py, which is imported where Triton is not."""

import triton
import triton.language as tl
from triton.language.extra import cuda


@triton.jit
def timed_kernel(times, args, KERNEL: tl.constexpr):
    """times[program] = multiprocessor, start and end in ns of `KERNEL(*args)`."""
    of_program = times + 3 * tl.program_id(0)
    start = cuda.globaltimer()
    KERNEL(*args)
    tl.debug_barrier()
    tl.store(of_program, cuda.smid().to(tl.int64))
    tl.store(of_program + 1, start)
    tl.store(of_program + 2, cuda.globaltimer())
