"""Number formats: what a name means, where it is refused, and what is in which format."""

import subprocess
import sys

import pytest
import torch

from pipelines.errors import UserError
from trainer import compression, models, precision
from trainer.ranks import Ranks

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_the_network_computes_in_the_format_it_is_told(name):
    numbers = precision.resolve(name, CPU)
    with numbers.autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    assert numbers.scaler().is_enabled() == (name == "fp16")


@pytest.mark.parametrize(("name", "half"), [("fp32", False), ("tf32", False), ("bf16", True), ("fp16", True)])
def test_images_come_in_half_where_the_network_computes_in_half(name, half):
    assert precision.Precision(name=name, device=GPU).half_images == half
    assert not precision.Precision(name=name, device=CPU).half_images


def test_tf32_is_refused_where_no_unit_computes_in_it(monkeypatch):
    with pytest.raises(UserError, match="this machine has none. Choose --precision fp32"):
        precision.resolve("tf32", CPU)
    monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: False)
    with pytest.raises(UserError, match="this GPU is older than that"):
        precision.resolve("tf32", GPU)
    monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: True)
    assert precision.resolve("tf32", GPU).name == "tf32"


class Mates(Ranks):
    """Ranks of which the others answer this."""

    others = ()

    def gather(self, values):
        return [*values, *self.others]


@pytest.mark.parametrize(
    ("others", "name"),
    [(["bf16"], "bf16"), (["fp16", "bf16"], "fp16"), (["bf16", "fp32"], "fp32")],
)
def test_gpus_of_different_generations_agree_on_what_all_have(monkeypatch, others, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(Mates, "others", others)
    agreed = precision.agreed("auto", Mates(world_size=3))
    assert (agreed.name, agreed.device) == (name, GPU)


SWITCHES = """
import torch
from trainer.precision import Precision

def switches():
    # The second would raise where torch's two generations of switches contradict each other.
    return torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

assert switches() == (False, "highest", True)  # torch's own choice: convolutions alone
for name, wanted in (("tf32", (True, "high", True)), ("fp32", (False, "highest", False))):
    Precision(name=name, device=torch.device("cuda", 0)).set_tf32()
    assert switches() == wanted, name
Precision(name="tf32", device=torch.device("cuda", 0)).set_tf32()
Precision(name="fp32", device=torch.device("cpu")).set_tf32()
assert switches() == (True, "high", True)  # a CPU has nothing to switch
"""


def test_convolutions_and_products_are_rounded_together_or_not_at_all():
    done = subprocess.run([sys.executable, "-c", SWITCHES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format])
def test_images_and_filters_have_the_order_in_memory_that_is_set(order):
    torch.manual_seed(0)
    model = models.build("test_resnet", head="plain", classes=3, size=32).eval()
    images_NCHW = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)  # as the loader gives them
    expected_NC = model(images_NCHW)
    seen = []
    model.ordered(order)
    model.body.register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0], output]))
    assert torch.allclose(model(images_NCHW), expected_NC, atol=1e-5)
    assert all(tensor.is_contiguous(memory_format=order) for tensor in seen)
    assert len(seen) == 2
    filters = [p for p in model.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert filters
    assert all(weight.is_contiguous(memory_format=order) for weight in filters)


def test_a_torch_that_cannot_send_bf16_says_so_before_a_step(monkeypatch):
    compression.check("bf16" if torch.version.cuda else "fp16")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    compression.check("fp16")
    compression.check("none")
    with pytest.raises(UserError, match="--grad-compression bf16 needs .*Choose --grad-compression fp16 or none"):
        compression.check("bf16")
