"""Gradients in half the bytes on their way between ranks: torch's own hooks of DistributedDataParallel."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from pipelines.errors import UserError
from trainer.config import Compression

# Each divides by the number of ranks before it sums, so that a sum does not overflow where the mean does not.
HOOKS = {"bf16": default_hooks.bf16_compress_hook, "fp16": default_hooks.fp16_compress_hook}


def check(compression: Compression) -> None:
    """Raise UserError where DDP would refuse the hook: bf16 in a torch built without CUDA and NCCL, even for gloo."""
    built = (torch.version.cuda or torch.version.hip) and dist.is_nccl_available()
    if compression == "bf16" and not (built and torch.cuda.nccl.version() >= (2, 10)):
        raise UserError(
            "--grad-compression bf16 needs a PyTorch that is built with CUDA and NCCL 2.10 or newer; this one, "
            f"{torch.__version__}, is not. Choose --grad-compression fp16 or none."
        )
