"""What `torch.compile` needs of a machine, looked for before a worker would fail in its first step."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sysconfig
from pathlib import Path

import torch

from pipelines.errors import UserError

# A network is compiled anew where it is trained and where it is judged, for each set of layers that learns, and once
# more when it meets a batch of another size; torch's own limit of 8 would send the rest through slow Python.
RECOMPILATIONS = 64


def check(device: torch.device) -> None:
    """Raise UserError where there is no compiler for the device: C++ for CPUs, Triton and C for GPUs."""
    missing = []
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            missing.append("the package triton")
        if not any(map(_is_program, [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"])):
            missing.append("a C compiler (gcc)")
    elif not _is_program(os.environ.get("CXX", "g++")):
        missing.append("a C++ compiler (g++)")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing.append("Python's headers (the package python3-dev)")
    if missing:
        raise UserError(
            f"--compile needs {' and '.join(missing)}, which this machine does not have. Install what is missing, or "
            "leave --compile out."
        )


def _is_program(command: str) -> bool:
    """Whether the first word of `command`, as CXX="ccache g++" has several, can be run."""
    words = shlex.split(command)
    return bool(words) and shutil.which(words[0]) is not None


def compile_in_place(model: torch.nn.Module) -> None:
    """Let calls of the model run compiled; the module stays what it is, with the names of its parameters."""
    import torch._dynamo.config  # a second, which only those pay who compile

    torch._dynamo.config.recompile_limit = RECOMPILATIONS  # ty: ignore[invalid-assignment]
    model.compile()
