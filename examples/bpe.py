"""Text as the tokens of a byte-pair encoding trained on it, and the batches of a pass over them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from triton_moe.train.data import Corpus

_PIECE = 1 << 16
"""Characters of a piece of text, give or take a line: pieces are encoded in parallel."""


def _pieces(text: str) -> list[str]:
    """The text cut at line ends, into pieces of about `_PIECE` characters."""
    lines = text.splitlines(keepends=True)
    pieces: dict[int, list[str]] = {}
    for line, end in zip(lines, accumulate(map(len, lines)), strict=True):
        pieces.setdefault(end // _PIECE, []).append(line)
    return ["".join(piece) for piece in pieces.values()]


def train_tokenizer(text: str, vocabulary: int) -> Tokenizer:
    """A byte-level BPE of so many tokens; any text can be encoded.

    Raises ValueError if it cannot have that many: below 256 there is no room for the bytes, and a short text has few
    pairs to merge.
    """
    if vocabulary < 256:
        raise ValueError(f"vocabulary: expected at least the 256 bytes, got {vocabulary}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_pieces(text), trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        raise ValueError(f"vocabulary: expected at most {tokenizer.get_vocab_size()} on this text, got {vocabulary}")
    return tokenizer


def _encode(text: str, tokenizer: Tokenizer) -> Tensor:
    encoded = tokenizer.encode_batch(_pieces(text), add_special_tokens=False)
    return torch.tensor([token for piece in encoded for token in piece.ids], dtype=torch.int32)


@dataclass(frozen=True)
class Tokens:
    """A corpus, encoded."""

    tokenizer: Tokenizer
    train: Tensor
    """(N) int32, on the CPU"""
    held_out: Tensor
    """likewise"""
    held_out_bytes: int
    """Of the text that `held_out` encodes."""
    source: str
    sha256: str
    """Of the text, as `Corpus` has it."""

    @classmethod
    def load(cls, data: Path | None, vocabulary: int, tokenizer: Tokenizer | None = None) -> Tokens:
        """A file, a folder, or the standard library's sources, as `Corpus.load`. The tokenizer knows the training part
        alone, unless one is given.

        Raises ValueError as `Corpus.load` and `train_tokenizer` do, or if the given tokenizer has another size.
        """
        corpus = Corpus.load(data)
        train, held_out = (bytes(part.numpy()).decode(errors="ignore") for part in (corpus.train, corpus.held_out))
        tokenizer = tokenizer or train_tokenizer(train, vocabulary)
        if tokenizer.get_vocab_size() != vocabulary:
            raise ValueError(f"vocabulary: expected the tokenizer's {tokenizer.get_vocab_size()}, got {vocabulary}")
        encoded, encoded_held_out = (_encode(part, tokenizer) for part in (train, held_out))
        return cls(tokenizer, encoded, encoded_held_out, len(held_out.encode()), corpus.source, corpus.sha256)

    def check_context(self, context: int) -> None:
        """Raise ValueError unless both parts hold two sequences of `context` tokens, one of them anywhere."""
        for name, part in (("training", self.train), ("held-out", self.held_out)):
            if part.numel() <= 2 * context:
                raise ValueError(
                    f"data: expected over {2 * context} {name} tokens for a context of {context}, got {part.numel()}"
                )

    def sequences_per_pass(self, context: int) -> int:
        """How many sequences a pass has. They do not overlap, and start anywhere below `context`."""
        return (self.train.numel() - context) // context

    def batch(self, first: int, count: int, context: int, seed: int) -> Tensor:
        """`(count, context + 1)` int64: sequences `first`, `first + 1`, ... of a training that takes pass after pass.

        Each pass has all of the text once, in an order of its own. The numbers alone decide the batch.
        """
        per_pass = self.sequences_per_pass(context)
        passes = range(first // per_pass, (first + count - 1) // per_pass + 1)
        starts = torch.cat([self._starts(number, context, seed) for number in passes])
        starts = starts[first - passes[0] * per_pass :][:count]
        return self.train[starts[:, None] + torch.arange(context + 1)].long()

    def _starts(self, number: int, context: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        shift = torch.randint(context, (), generator=generator)
        return shift + context * torch.randperm(self.sequences_per_pass(context), generator=generator)
