"""The step's own random numbers."""

import pytest
import torch

from trainer.loop import dropout_seed, seed_dropout


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_dropout_is_drawn_as_after_torchs_own_seed(device):
    device = torch.device(device)
    torch.zeros(1, device=device)
    for seed in (0, dropout_seed(2**40, 3, 17, 1), 2**63 - 1):
        seed_dropout(device, seed)
        drawn = torch.rand(5, device=device), torch.rand(5)
        torch.manual_seed(seed)
        assert torch.equal(torch.rand(5, device=device), drawn[0])
        assert torch.equal(torch.rand(5), drawn[1])
