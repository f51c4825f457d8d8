"""The recipe's micro-step as a CUDA graph."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny_gpt import CPU, OF_DYNAMO, TINY, tiny_tokens
from train_gpt import Training


@pytest.mark.parametrize(
    "changes",
    [{}, {"accumulation": 2, "optimizer": "muon", "balancing": "smebu"}, {"accumulation": 3}],
    ids=str,
)
def test_what_a_graph_is_given_adds_up(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    """On the CPU, with a stand-in for the graph: nothing captured has happened yet, and a replay does it once more,
    with the same inputs, results and gradients, as far as these have been added to or made anew."""
    plain, captured = (Training(dataclasses.replace(TINY, **changes), tiny_tokens(), CPU) for _ in range(2))
    captured.config = dataclasses.replace(captured.config, compile="graph")
    micro_step, parameters = captured.micro_step, list(captured.model.parameters())

    class Graph:
        @contextlib.contextmanager
        def capture(self) -> Iterator[None]:
            self.had_gradients = parameters[0].grad is not None
            before = {name: buffer.clone() for name, buffer in captured.model.named_buffers()}
            yield
            for name, buffer in captured.model.named_buffers():
                buffer.copy_(before[name])
            for parameter in parameters:
                assert parameter.grad is not None
                parameter.grad.fill_(0 if self.had_gradients else math.nan)

        def replay(self) -> None:
            graph, kept = captured._captured, [parameter.grad for parameter in parameters]
            assert graph is not None
            if not self.had_gradients:
                captured.model.zero_grad()
            for result, again in zip(graph.results, micro_step(graph.inputs), strict=True):
                result.copy_(again)
            for parameter, grad in zip(parameters, kept, strict=True):
                assert grad is not None
                assert parameter.grad is not None
                parameter.grad = grad.copy_(parameter.grad)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Graph.capture)
    for _ in range(TINY.steps):
        assert torch.equal(captured.step(), plain.step())
    assert captured._captured is not None
    for name, value in plain.model.state_dict().items():
        assert torch.equal(captured.model.state_dict()[name], value), name


@pytest.mark.gpu
@OF_DYNAMO
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"accumulation": 2, "optimizer": "muon", "balancing": "smebu"},
        {"experts": "grouped_mm", "precision": "bf16"},
    ],
    ids=str,
)
def test_captured_steps_are_the_steps(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    torch.compiler.reset()
    real: Callable[..., Any] = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: real(f, backend="eager", **kwargs))
    config = dataclasses.replace(TINY, **changes)
    plain, captured = (
        Training(dataclasses.replace(config, compile=how), tiny_tokens(), torch.device("cuda"))
        for how in ("blocks", "graph")
    )
    tolerance = 1e-4 if config.precision == "fp32" else 1e-2
    for _ in range(config.steps):
        torch.testing.assert_close(captured.step(), plain.step(), rtol=tolerance, atol=0)
    weights = zip(captured.model.parameters(), plain.model.parameters(), strict=True)
    assert all((a - b).norm() < 0.02 * b.norm() for a, b in weights)
    torch.testing.assert_close(captured.usage, plain.usage, rtol=0, atol=0.02)
    assert captured.held_out_loss(4) == pytest.approx(plain.held_out_loss(4), rel=tolerance)
