"""Which number format the forward pass runs in, and whether the loss needs scaling."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Precision:
    """A resolved choice of `--precision` for one device."""

    name: str
    """`fp32`, `bf16` or `fp16`."""
    device: torch.device

    @property
    def half_images(self) -> bool:
        """The loader may hand over float16: fp16's own format, and on a GPU half the memory traffic for bf16 too."""
        return self.device.type == "cuda" and self.name != "fp32"

    def autocast(self) -> AbstractContextManager:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.name]
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.name != "fp32")

    def scaler(self) -> torch.amp.GradScaler:
        """Scales the loss for fp16, whose gradients underflow; a scaler that does nothing for the others."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")


def resolve(choice: str, device: torch.device) -> Precision:
    """`auto` becomes bf16 on GPUs that compute in it, fp16 on older ones, fp32 on CPUs.

    On CPUs fp32 won where it was measured (x86 without AMX; EfficientNet-Lite0, 160 px: fp32 34, bf16 28 images/s).
    """
    if choice == "auto":
        if device.type == "cuda":
            choice = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        else:
            choice = "fp32"
    return Precision(name=choice, device=device)
