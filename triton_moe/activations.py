"""The activations' names, shared by every backend. Their formulas live with each backend and with the oracle."""

from __future__ import annotations

GATE_ACTIVATION = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}
"""Gated activation -> the plain activation of its gate: `a = act(x w1) * (x w3)`."""

PLAIN_ACTIVATIONS = ("relu_squared", "relu", "gelu", "gelu_tanh", "silu", "none")
"""Not gated: `a = act(x w1)`. gelu is the exact erf form, gelu_tanh its approximation."""

ACTIVATIONS = (*PLAIN_ACTIVATIONS, *GATE_ACTIVATION)


def is_gated(activation: str) -> bool:
    """Whether the activation needs w3. Raises ValueError on an unknown name."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return activation in GATE_ACTIVATION
