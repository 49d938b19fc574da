"""Batch-norm over the global batch: its statistics are those of all ranks' images together (`--sync-bn`).

GPUs have torch's own `SyncBatchNorm`, which refuses tensors of the CPU; the CPU's is here, from the kernels of torch's
batch-norm. The modules keep their tensors and names: state dicts and checkpoints are those without it.

The collectives within forward and backward go over the default group, as DDP's do: every rank runs through the same
graph in the same order, so their calls come in one order too. In evaluation there are none.
"""

from __future__ import annotations

from typing import Any

import timm.layers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from trainer.models import Classifier
from trainer.ranks import Ranks


def synchronised(model: Classifier, ranks: Ranks) -> Classifier:
    """The model, changed in place, with batch-norms over all ranks; one rank alone is left as it is."""
    if ranks.world_size > 1 and ranks.device.type == "cuda":
        return timm.layers.convert_sync_batchnorm(model)
    if ranks.world_size > 1:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.__class__ = GLOBAL[type(module)]
    return model


class _Global(nn.modules.batchnorm._BatchNorm):
    """What the batch-norms below do while they train."""

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, …], N of this rank, to the mean and variance of all ranks' N; updates the running statistics."""
        self._check_input_dim(x)
        momentum = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            momentum = 1 / self.num_batches_tracked.item() if momentum is None else momentum
        return _Normalise.apply(x, self.weight, self.bias, self.running_mean, self.running_var, momentum, self.eps)


class GlobalBatchNorm1d(_Global, nn.BatchNorm1d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.normalise(input) if self.training else super().forward(input)


class GlobalBatchNorm2d(_Global, nn.BatchNorm2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.normalise(input) if self.training else super().forward(input)


class GlobalBatchNormAct2d(_Global, timm.layers.BatchNormAct2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(self.normalise(x))) if self.training else super().forward(x)


GLOBAL: dict[type[nn.modules.batchnorm._BatchNorm], type[_Global]] = {
    nn.BatchNorm1d: GlobalBatchNorm1d,
    nn.BatchNorm2d: GlobalBatchNorm2d,
    timm.layers.BatchNormAct2d: GlobalBatchNormAct2d,
}  # all that torchvision and timm build classifiers from


class _Normalise(torch.autograd.Function):
    """y = (x - mean) / sqrt(variance + eps) * weight + bias, mean and variance over all ranks; one collective each way.

    The gradients of weight and bias are this rank's own sums, as those of every other parameter: DDP reduces them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight_C: torch.Tensor | None,
        bias_C: torch.Tensor | None,
        running_mean_C: torch.Tensor | None,
        running_var_C: torch.Tensor | None,
        momentum: float,
        eps: float,
    ) -> torch.Tensor:
        channels = x.shape[1]
        # Running statistics of its own make the kernel answer in float32 where x is of 16 bits.
        scratch_C = torch.zeros(channels, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        moments = torch.batch_norm_update_stats(x, scratch_C, scratch_C.clone(), 1.0)
        own = torch.cat([*moments, scratch_C.new_tensor([x.numel() // channels])])
        of_all = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(of_all, own)
        # Squares of deviations, which do not cancel as sums of squares do: Chan, Golub and LeVeque, "Updating formulae
        # and a pairwise algorithm for computing sample variances", 1979.
        means_RC, variances_RC, counts_R1 = torch.stack(of_all).split([channels, channels, 1], dim=1)
        count = counts_R1.sum()
        mean_C = (counts_R1 * means_RC).sum(dim=0) / count
        variance_C = (counts_R1 * (variances_RC + (means_RC - mean_C) ** 2)).sum(dim=0) / count
        if running_mean_C is not None and running_var_C is not None:
            running_mean_C.lerp_(mean_C.to(running_mean_C), momentum)
            running_var_C.lerp_((variance_C * (count / (count - 1))).to(running_var_C), momentum)  # Bessel's correction
        ctx.save_for_backward(x, weight_C, mean_C, variance_C, count)
        ctx.eps = eps
        return F.batch_norm(x, mean_C, variance_C, weight_C, bias_C, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight_C, mean_C, variance_C, count = ctx.saved_tensors
        learns_x, learns_weight, learns_bias = ctx.needs_input_grad[:3]
        # As if mean and variance were constants; it also sums grad_y and grad_y * x_hat, x_hat being x normalised.
        grad_x, grad_weight_C, grad_bias_C = torch.ops.aten.native_batch_norm_backward(
            grad_y, x, weight_C, mean_C, variance_C, None, None, False, ctx.eps, [learns_x, True, True]
        )
        if learns_x:
            # They are not: grad_x = scale * (grad_y - mean(grad_y) - x_hat * mean(grad_y * x_hat)), means of all ranks.
            sums_2C = torch.stack([grad_bias_C, grad_weight_C]).to(mean_C.dtype)
            dist.all_reduce(sums_2C)
            scale_C = (variance_C + ctx.eps).rsqrt() * (1 if weight_C is None else weight_C)
            shift_C, slope_C = scale_C * sums_2C / count
            grad_x -= F.batch_norm(x, mean_C, variance_C, slope_C, shift_C, training=False, eps=ctx.eps)
        return grad_x, grad_weight_C if learns_weight else None, grad_bias_C if learns_bias else None, *[None] * 4
