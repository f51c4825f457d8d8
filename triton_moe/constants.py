"""Tables of constants on a device, copied there once."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_tables: dict[int, Tensor] = {}
"""By address, kept for good."""


def on_device(rows: Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Tables of constants. Waits for the copies, once a layout: the next call may be on another stream.

    Made in a thread of their own, where no fake tensors, inference mode or memory pool of a CUDA graph reach: they
    outlive all of these.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the layout's tables are not on the device yet: call the layer once before a CUDA graph is captured"
        )
    with ThreadPoolExecutor(1) as thread:
        tables = thread.submit(lambda: [torch.tensor(row, dtype=dtype).to(device) for row in rows]).result()
    _tables.update((table.data_ptr(), table) for table in tables)
    return tables


def is_table(address: int) -> bool:
    """Whether a table of constants begins there."""
    return address in _tables
