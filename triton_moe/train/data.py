"""Text as bytes: where it comes from, its two parts, and the batches drawn from them."""

from __future__ import annotations

import hashlib
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 256
"""Every byte is a token."""
HELD_OUT_SHARE = 20
"""One part in so many is held out."""
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def standard_library() -> Path:
    """The folder of the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def _standard_library_sources() -> Iterator[Path]:
    """Its modules, without their tests, whose data is not text that anyone wrote."""
    root = standard_library()
    for path in root.rglob("*.py"):
        if not _SKIPPED_FOLDERS & set(path.relative_to(root).parts):
            yield path


def _read_text(path: Path) -> bytes | None:
    """The file's bytes, None if they are no text: not UTF-8, or with a zero byte in them."""
    content = path.read_bytes()
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return None if b"\0" in content else content


@dataclass(frozen=True)
class Corpus:
    """Text as bytes, the last twentieth of it held out."""

    train: Tensor
    """(N) uint8, on the CPU"""
    held_out: Tensor
    """likewise"""
    source: str
    """Where the text came from, and how much of it."""
    data: Path | None
    """The file or folder it is in, resolved; None is the standard library."""

    @cached_property
    def sha256(self) -> str:
        """Of all the bytes: the training part, then the one held out."""
        digest = hashlib.sha256(self.train.numpy().data)
        digest.update(self.held_out.numpy().data)
        return digest.hexdigest()

    @classmethod
    def load(cls, data: Path | None = None) -> Corpus:
        """A file, every text file in a folder (hidden ones left out), or by default the standard library's sources.

        Files are joined in an order that is random and always the same, so that both parts hold some of everything;
        those without text do not change it.

        Raises:
            ValueError: there is no such file or folder, or no text in it.
        """
        if data is None:
            origin, paths = "the Python standard library", sorted(_standard_library_sources())
        elif (data := data.resolve()).is_file():
            origin, paths = str(data), [data]
        elif data.is_dir():
            visible = (path for path in data.rglob("*") if not _is_hidden(path.relative_to(data)))
            origin, paths = str(data), sorted(path for path in visible if path.is_file())
        else:
            raise ValueError(f"data: expected a file or a folder of text, got {data}, which does not exist")
        texts = [text for text in map(_read_text, paths) if text]
        random.Random(0).shuffle(texts)
        if not texts:
            raise ValueError(f"data: expected UTF-8 text, got none in {len(paths)} files of {origin}")
        skipped = len(paths) - len(texts)
        content = torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8)
        cut = content.numel() - content.numel() // HELD_OUT_SHARE
        source = f"{content.numel() / 1e6:.1f} MB in {len(texts)} files of {origin}"
        source += f" ({skipped} empty or not text)" if skipped else ""
        return cls(content[:cut], content[cut:], source, data)

    def check_context(self, context: int) -> None:
        """Raise ValueError unless both parts hold a sequence of `context` bytes and the byte that follows."""
        if self.held_out.numel() <= context:
            needed = (context + 1) * HELD_OUT_SHARE
            got = self.train.numel() + self.held_out.numel()
            raise ValueError(f"data: expected at least {needed} bytes for a context of {context}, got {got}")

    def batch(self, step: int, batch_size: int, context: int, seed: int) -> Tensor:
        """`(batch_size, context + 1)` int64: random places in the training part, which the step and the seed decide."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(self.train.numel() - context, (batch_size, 1), generator=generator)
        return self.train[starts + torch.arange(context + 1)].long()

    def unigram_loss(self, targets: Tensor) -> float:
        """Nats a byte of a model that knows how frequent each byte is in the training part, and nothing else.

        Every byte counts once more than it was seen, so that none is impossible.
        """
        counts = torch.bincount(self.train.long(), minlength=VOCABULARY).double() + 1
        return float(-(counts / counts.sum()).log()[targets.flatten().long()].mean())


def windows(text: Tensor, context: int, most: int = 256) -> Tensor:
    """`text (N) uint8` -> `(W, context + 1)` int64: windows spread evenly over it, at most so many."""
    every = text.unfold(0, context + 1, context)
    return every[torch.linspace(0, every.shape[0] - 1, min(most, every.shape[0])).round().long()].long()


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)
