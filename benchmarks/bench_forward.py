"""Time the forward pass of training, the graph recorded, and nothing else.

python benchmarks/bench_forward.py --batch-sizes 4 8 16
"""

import sys
from functools import partial

from command import timing_command

main = partial(timing_command, "bench_forward", ("forward",))

if __name__ == "__main__":
    sys.exit(main())
