"""The training loop's state and its one step; saving, resuming and evaluating it."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_moe.moe import MoEMLP
from triton_moe.train.checkpoint import Checkpoint, load_optimizer_state, optimizer_state
from triton_moe.train.config import TrainConfig
from triton_moe.train.data import Corpus
from triton_moe.train.gpt import GPT, GPTOutput, MLPFactory

_WARM_UP_SHARE, _FINAL_SHARE = 0.05, 0.1


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine down to a tenth of the peak at the last step."""
    warm_up = max(1, round(_WARM_UP_SHARE * config.steps))
    if step < warm_up:
        return config.learning_rate * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, config.steps - 1 - warm_up)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return config.learning_rate * (_FINAL_SHARE + (1 - _FINAL_SHARE) * cosine)


class Trainer:
    """A model in training. The config's seed and the step decide every number, so a resumed run is the same run.

    `mlp` builds the model's MoE layers.
    """

    def __init__(
        self,
        config: TrainConfig,
        corpus: Corpus,
        device: torch.device,
        checkpoint: Checkpoint | None = None,
        mlp: MLPFactory = MoEMLP,
    ) -> None:
        corpus.check_context(config.context)
        self.config, self.corpus, self.device = config, corpus, device
        torch.manual_seed(config.seed)
        self.model = GPT(config, mlp).to(device)
        self._train_model = (
            torch.compile(self.model, mode="reduce-overhead", fullgraph=True) if config.compile else self.model
        )
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=device.type == "cuda"
        )
        self.done, self.seconds = 0, 0.0
        num_experts = config.moe.layout.num_experts
        self.usage = torch.zeros(config.num_layers, num_experts, dtype=torch.int64, device=device)
        if checkpoint is not None:
            self.model.load_state_dict(dict(checkpoint.model))
            load_optimizer_state(self.model, self.optimizer, checkpoint.optimizer)
            self.done, self.seconds = checkpoint.step, checkpoint.seconds
            self.usage.copy_(checkpoint.usage)

    @property
    def tokens_per_step(self) -> int:
        return self.config.batch_size * self.config.context

    def _run(self, model: Callable[..., GPTOutput], sequences: Tensor) -> tuple[GPTOutput, Tensor]:
        """`sequences (B, L + 1)` -> the model's output for the first L of each, and its loss, nats a byte."""
        sequences = sequences.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            out = model(sequences[:, :-1])
        return out, F.cross_entropy(out.logits.flatten(0, 1), sequences[:, 1:].flatten())

    def step(self) -> Tensor:
        """One optimizer step; its loss, nats a byte, stays on the device."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.done)
        self.model.train()
        if config.compile:
            torch.compiler.cudagraph_mark_step_begin()
        sequences = self.corpus.batch(self.done, config.batch_size, config.context, config.seed)
        out, loss = self._run(self._train_model, sequences)
        total = loss + config.load_balance_weight * out.load_balance_loss + config.router_z_weight * out.router_z_loss
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        slots = self.tokens_per_step * config.num_active_experts
        self.usage += (out.usage.detach() * slots).round().long()
        self.done += 1
        return loss.detach()

    @torch.no_grad()
    def loss_on(self, windows: Tensor) -> float:
        """Nats a byte over `windows (W, context + 1)`. Raises FloatingPointError if that is no number."""
        self.model.eval()
        losses = [self._run(self.model, part)[1] * part.shape[0] for part in windows.split(self.config.batch_size)]
        loss = float(torch.stack(losses).sum()) / windows.shape[0]
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} after {self.done} steps: try a lower learning rate")
        return loss

    def checkpoint(self) -> Checkpoint:
        return Checkpoint(
            config=self.config,
            source=self.corpus.source,
            data=self.corpus.data,
            sha256=self.corpus.sha256,
            step=self.done,
            seconds=self.seconds,
            model=self.model.state_dict(),
            optimizer=optimizer_state(self.model, self.optimizer),
            usage=self.usage,
        )

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the time of what is done inside, the device's included, as training time."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds += time.perf_counter() - start


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets, so that no step is left half done; the second one raises."""
    stop = threading.Event()

    def ask(_number: int, _frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
