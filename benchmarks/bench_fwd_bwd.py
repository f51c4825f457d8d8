"""Time a training step: forward, and backward into gradients that were None.

python benchmarks/bench_fwd_bwd.py --batch-sizes 4 8 16
"""

import sys
from functools import partial

from command import timing_command

main = partial(timing_command, "bench_fwd_bwd", ("step",))

if __name__ == "__main__":
    sys.exit(main())
