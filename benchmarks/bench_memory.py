"""What a training step keeps for backward, and its peak.

    python benchmarks/bench_memory.py --cases seed training

On the CPU, which does not count what it allocates, only what is kept.
"""

import sys
from functools import partial

from command import timing_command

main = partial(timing_command, "bench_memory", ("memory",))

if __name__ == "__main__":
    sys.exit(main())
