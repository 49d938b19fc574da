"""Which number format the forward pass runs in, and whether the loss needs scaling."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from pipelines.errors import UserError
from trainer.ranks import Ranks

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Precision:
    """A resolved choice of `--precision` for one device."""

    name: str
    """`fp32`, `tf32`, `bf16` or `fp16`."""
    device: torch.device

    @property
    def half_images(self) -> bool:
        """The loader may hand over float16: fp16's own format, and on a GPU half the memory traffic for bf16 too."""
        return self.device.type == "cuda" and self.name in AUTOCAST

    def set_tf32(self) -> None:
        """On a GPU: `tf32` rounds what enters a float32 product to 10 bits of mantissa, anything else does not.

        Left alone, torch has convolutions do it and matrix products not, so that fp32 would be neither. By torch's
        older switches: after the newer `fp32_precision` its own compiler stops at an error (pytorch issue 166387).
        """
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high" if self.name == "tf32" else "highest")
            torch.backends.cudnn.allow_tf32 = self.name == "tf32"

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, dtype=AUTOCAST.get(self.name), enabled=self.name in AUTOCAST)

    def scaler(self) -> torch.amp.GradScaler:
        """Scales the loss for fp16, whose gradients underflow; a scaler that does nothing for the others."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")


def has_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_tf32_supported()


def resolve(choice: str, device: torch.device) -> Precision:
    """`auto` becomes bf16 on GPUs that compute in it, fp16 on older ones, fp32 on CPUs.

    On CPUs fp32 won where it was measured (x86 without AMX; EfficientNet-Lite0, 160 px: fp32 34, bf16 28 images/s).

    Raises:
        UserError: `tf32` on a device that has no such unit.
    """
    if choice == "tf32" and not has_tf32(device):
        where = "this GPU is older than that" if device.type == "cuda" else "this machine has none"
        raise UserError(
            f"--precision tf32 is a format of GPUs from NVIDIA's Ampere on, and {where}. Choose --precision fp32 or "
            "auto."
        )
    if choice == "auto":
        if device.type == "cuda":
            choice = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        else:
            choice = "fp32"
    return Precision(name=choice, device=device)


def agreed(choice: str, ranks: Ranks) -> Precision:
    """The same for all ranks: `auto` on GPUs of different generations is what the oldest of them has.

    Raises:
        UserError: see `resolve`.
    """
    own = resolve(choice, ranks.device)
    names = set(ranks.gather([own.name]))
    oldest = next(name for name in ("fp32", "fp16", "bf16", "tf32") if name in names)
    return Precision(name=oldest, device=ranks.device)
