"""gather against the oracle, output and gradient."""

import pytest
import torch

from operators import check_operator, inputs_for, unit
from triton_moe.testing import CASES, Case


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_gather(case: Case, device: str, dtype: torch.dtype) -> None:
    inputs = inputs_for(case, dtype, device)
    rows = case.num_tokens * case.top_k
    check_operator("gather", [inputs.x], unit((rows, case.hidden_size), inputs.x), inputs)


def test_gather_takes_any_strides(device: str, dtype: torch.dtype) -> None:
    inputs = inputs_for(CASES[-1], dtype, device)
    x = inputs.x.t().contiguous().t()
    assert x.stride(-1) != 1
    rows = inputs.topk_ids.numel()
    check_operator("gather", [x], unit((x.shape[1], rows), x).t(), inputs)
