"""A recipe that trains in a blink, and its text."""

import argparse
import functools
from pathlib import Path

import pytest
import torch
from bpe import Tokens
from settings import Config

CPU = torch.device("cpu")
TEXT = Path(argparse.__file__)
"""Any text of some 100 kB."""
TINY = Config(
    expert_sizes=((2, 16), (1, 5), (1, 0)), num_active_experts=2, hidden_size=16, num_layers=2, num_heads=2,
    vocabulary=300, context=16, batch_size=4, steps=6, warm_up=2, learning_rate=0.01, precision="fp32", compile="off",
)  # fmt: skip

OF_DYNAMO = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
"""Where it looks, and hides that."""


@functools.cache
def tiny_tokens() -> Tokens:
    return Tokens.load(TEXT, TINY.vocabulary)
