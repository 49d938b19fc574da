"""The graph for a GPU cannot run without one, but DALI checks its operators, arguments and devices as it is defined."""

import re

import pytest

from pipelines.graph import define


def operators(device, half=False):
    """(operator, device of each input, device of each output, arguments), in order, of the defined graph."""
    pipeline = define(iter([]), 64, device, half, batch_size=4, num_threads=1, device_id=None)
    found = []
    pipeline._build_graph()
    for operator in pipeline._ops:
        text = str(operator.spec)
        name = re.search(r"OpSpec for (\S+):", text)[1]
        inputs, outputs = re.search(r"Inputs:(.*?)Outputs:(.*?)Arguments:", text, re.DOTALL).groups()
        arguments = dict(re.findall(r"^ +(\w+): (.+)$", text.split("Arguments:")[1], re.MULTILINE))
        devices = [re.findall(r"_(cpu|gpu)\s", part) for part in (inputs, outputs)]
        found.append((name, *devices, arguments))
    return found


def one(found, fragment):
    (match,) = [operator for operator in found if fragment.lower() in operator[0].lower()]
    return match


@pytest.mark.parametrize("half", [False, True])
def test_everything_after_the_gpu_decoder_stays_on_the_gpu(half):
    found = operators("gpu", half)
    _, inputs, outputs, arguments = one(found, "decoders__Image")
    assert (inputs, outputs, arguments["device"]) == (["cpu"], ["gpu"], "mixed")
    assert arguments["jpeg_fancy_upsampling"] in ("True", "true", "1")
    _, inputs, outputs, _ = one(found, "WarpPerspective")
    assert (inputs, outputs) == (["gpu", "gpu"], ["gpu"])
    _, inputs, outputs, arguments = one(found, "Resize")
    assert inputs[0] == "gpu"
    assert outputs == ["gpu"]
    _, inputs, outputs, arguments = one(found, "CropMirrorNormalize")
    assert inputs == ["gpu", "cpu", "cpu"]  # images; shift and scale are arguments
    assert outputs == ["gpu"]
    assert arguments["output_layout"] == "HWC"
    float16, float32 = "8", "9"
    assert arguments["dtype"] == (float16 if half else float32)


def test_nothing_of_the_cpu_graph_needs_a_gpu():
    for name, inputs, outputs, arguments in operators("cpu"):
        assert "gpu" not in (*inputs, *outputs, arguments.get("device")), name


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_each_image_is_warped_once(device):
    names = [name for name, *_ in operators(device)]
    assert sum("warp" in name.lower() for name in names) == 1
