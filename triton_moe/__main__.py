"""`python -m triton_moe` is the command `triton-moe`."""

from triton_moe.cli import app

app(prog_name="triton-moe")
