"""Bodies, heads, layer groups, and whether weights fit."""

import json
import shlex
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn

from pipelines.errors import UserError
from trainer import models, optim, weights

GOLDEN = json.loads((Path(__file__).parent / "golden/groups.json").read_text())

BODIES = ["resnet18", "resnet34", "mobilenet_v3_small", "densenet121", "efficientnet_b0", "vgg11_bn"]
BODIES += ["tf_efficientnet_lite0", "convnext_atto", "timm_resnet"]


def build(name, **options):
    name = {"timm_resnet": "resnet14t"}.get(name, name)
    return models.build(name, **{"head": "fastai", "classes": 5, "size": 64, **options})


@pytest.mark.parametrize("name", BODIES)
def test_layer_groups_are_a_partition_and_the_model_gives_logits(name):
    model = build(name)
    groups = models.layer_groups(model, 64)
    ids = [id(parameter) for group in groups for parameter in group]
    assert len(ids) == len(set(ids)) == len(list(model.parameters()))
    assert all(groups)
    assert model(torch.zeros(2, 3, 96, 96)).shape == (2, 5)


def test_a_resnet_is_cut_where_fastai_cuts_it():
    model = build("resnet34")
    early, late, head = models.layer_groups(model, 64)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)].split(".")[1] for p in early} == {"conv1", "bn1", "layer1", "layer2"}
    assert {names[id(p)].split(".")[1] for p in late} == {"layer3", "layer4"}
    assert {names[id(p)].split(".")[0] for p in head} == {"head"}


@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_groups_and_decay_of_a_resnet_are_fastais(name):
    model = build(name)
    groups = models.layer_groups(model, 64)
    assert [[list(p.shape) for p in group] for group in groups] == GOLDEN["resnet"][name]["groups"]
    optimizer = optim.build(model, 0.1, 64)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [[decay[id(p)] > 0 for p in group] for group in groups] == GOLDEN["resnet"][name]["decayed"]


STAGES = {
    "resnet18": ["conv1 bn1", "layer1.0 layer1.1", "layer2.0 layer2.1", "layer3.0 layer3.1", "layer4.0 layer4.1"],
    "densenet121": ["conv0 norm0"] + [f"denseblock{i} transition{i}" for i in (1, 2, 3)] + ["denseblock4 norm5"],
    "convnext_atto": ["stem.0 stem.1 stages.0", "stages.1", "stages.2", "stages.3 head.norm"],
    "mobilenetv3_small_050": [
        "conv_stem bn1", "blocks.0", "blocks.1", "blocks.2 blocks.3", "blocks.4 blocks.5 conv_head",
    ],
    "swin_t": ["0 1", "2 3", "4 5", "6 7 norm"],
    "hrnet_w18_small": [
        "conv1 bn1", "conv2 bn2 layer1 transition1.0", "transition1.1 stage2", "transition2 stage3",
        "transition3 stage4 incre_modules downsamp_modules final_layer",
    ],
    "vgg11_bn": ["0 1", "4 5", "8 9 11 12", "15 16 18 19", "22 23 25 26"],
}  # fmt: skip


@pytest.mark.parametrize("name", STAGES)
def test_stages_end_where_the_resolution_falls(name):
    model = build(name)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    *stages, head = [
        list(dict.fromkeys(".".join(names[id(p)].split(".")[:-1]).removeprefix("body.") for p in group))
        for group in models.stage_groups(model, 64)
    ]
    assert all(part.startswith("head.") for part in head)
    assert len(stages) == len(STAGES[name])
    for stage, expected in zip(stages, STAGES[name], strict=True):
        parts = [part.removeprefix("features.") for part in stage]
        heads = list(
            dict.fromkeys(next((e for e in expected.split() if f"{p}.".startswith(f"{e}.")), p) for p in parts)
        )
        assert heads == expected.split()


def test_groups_by_name():
    model = build("resnet18")
    patterns = ("body.conv1|body.bn1|body.layer[12]", r"body\.layer(3|4)", "head")
    for named, cut in zip(models.layer_groups(model, 64, patterns), models.layer_groups(model, 64), strict=True):
        assert [id(p) for p in named] == [id(p) for p in cut]


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (("body.layer1", "head"), "body.conv1.weight is matched by none of them"),
        (("body", "body.layer4", "head"), "body.layer4.0.conv1.weight is matched by 'body' and 'body.layer4'"),
        (("bod", "body", "head"), "'bod' matches no parameter"),
        (("body(", "head"), r"'body\(' is no regular expression"),
    ],
)
def test_names_that_make_no_groups_are_told(patterns, words):
    with pytest.raises(UserError, match=words):
        models.layer_groups(build("resnet18"), 64, patterns)


def test_a_model_without_stages_says_how_to_name_its_groups():
    body = nn.Sequential(OrderedDict(convolution=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), more=nn.Conv2d(4, 4, 3)))
    model = models.Classifier(body, models.build_head("plain", 4, 3))
    with pytest.raises(UserError, match="one of them has no parameter.*--layer-groups") as caught:
        models.layer_groups(model, 32)
    patterns = shlex.split(str(caught.value).partition("--layer-groups ")[2])
    groups = models.layer_groups(model, 32, patterns)
    assert [len(group) for group in groups] == [2, 4, 2]
    assert sum(map(len, groups)) == len(list(model.parameters()))


def test_a_parameter_outside_the_groups_is_named():
    model = build("resnet18")
    groups = models.layer_groups(model, 64)
    with pytest.raises(UserError, match=r"head\.7\.weight lies in 0"):
        models.check_partition(model, [groups[0], groups[1], groups[2][:-1]])
    with pytest.raises(UserError, match=r"body\.conv1\.weight lies in 2"):
        models.check_partition(model, [groups[0], [*groups[1], groups[0][0]], groups[2]])


@pytest.mark.parametrize("name", ["inception_v3", "googlenet"])
def test_auxiliary_classifiers_are_cut_out_and_nothing_else(name):
    body = build(name, size=96).body
    whole = torchvision.models.get_model(name, weights=None, init_weights=False, transform_input=False)
    taken = []
    whole.avgpool.register_forward_hook(lambda module, inputs, output: taken.append(inputs[0]))
    body.load_state_dict({k: v for k, v in whole.state_dict().items() if k in body.state_dict()})
    images_NCHW = torch.randn(1, 3, 96, 96)
    with torch.inference_mode():
        whole.eval()(images_NCHW)
        assert torch.equal(body.eval()(images_NCHW), taken[0])


@pytest.mark.parametrize("name", ["inception_v3", "googlenet"])
def test_a_body_that_rebases_its_images_gets_them_rebased(name):
    """Published weights come with `transform_input`, which `forward` alone does, before the parts that are kept."""
    whole = torchvision.models.get_model(name, weights=None, init_weights=False, transform_input=True)
    colours_N3 = torch.rand(5, 3)
    mean_3, std_3 = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    imagenet_N3HW = ((colours_N3 - mean_3) / std_3)[:, :, None, None]
    ours = models.statistics(name)
    expected = (colours_N3 - torch.tensor(ours.mean)) / torch.tensor(ours.std)
    assert torch.allclose(whole._transform_input(imagenet_N3HW)[:, :, 0, 0], expected, atol=1e-5)


def test_a_size_that_the_body_cannot_take_is_told():
    with pytest.raises(UserError, match="takes no images of --size 32"):
        build("alexnet", size=32)


def test_the_head_is_fastais():
    kinds = [type(module).__name__ for module in build("resnet18").head]
    assert kinds == ["ConcatPool", "BatchNorm1d", "Dropout", "Linear", "ReLU", "BatchNorm1d", "Dropout", "Linear"]
    features_NFHW = torch.randn(2, 3, 4, 5)
    expected = torch.cat(
        [nn.AdaptiveMaxPool2d(1)(features_NFHW), nn.AdaptiveAvgPool2d(1)(features_NFHW)], dim=1
    ).flatten(1)
    assert torch.allclose(models.ConcatPool()(features_NFHW), expected)


def three_groups():
    """The model that fastai froze for the golden file."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.LayerNorm(4)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10), nn.BatchNorm1d(10)),
    )


@pytest.mark.parametrize("train_bn", [True, False])
@pytest.mark.parametrize("n", [-1, -2, 0, 1, 2])
def test_freezing_leaves_what_fastai_leaves(n, train_bn):
    model = three_groups()
    groups = [list(part.parameters()) for part in model]
    models.freeze_to(model, groups, 2)  # whatever was frozen before
    models.freeze_to(model, groups, n, train_bn=train_bn)
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert learning == GOLDEN["learning"][f"freeze_to({n}), train_bn={train_bn}"]


def test_freezing_everything_is_refused():
    model = three_groups()
    groups = [list(part.parameters()) for part in model]
    for n in (3, -4):
        with pytest.raises(UserError, match=f"freeze_to\\({n}\\) of a model with 3 layer groups"):
            models.freeze_to(model, groups, n)
    models.freeze(model, groups, train_bn=False)
    assert [p.requires_grad for group in groups for p in group] == [False] * 10 + [True] * 4
    models.unfreeze(model, groups)
    assert all(p.requires_grad for p in model.parameters())


def test_norms_and_biases_are_not_decayed():
    model = build("convnext_atto")
    optimizer = optim.build(model, 0.1, 64)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert len(decay) == len(named)
    for name, parameter in named.items():
        norm_or_bias = name.endswith("bias") or ".norm" in name or "gamma" in name or parameter.ndim <= 1
        assert decay[id(parameter)] == (0.0 if norm_or_bias else 0.1), name
    optim.set_hyper(optimizer, [1.0, 2.0, 3.0], 0.9)
    assert {group["layer_group"]: group["lr"] for group in optimizer.param_groups} == {0: 1.0, 1: 2.0, 2: 3.0}


def test_the_packaged_weights_are_the_published_ones():
    """The body with its weights computes what timm's whole model computes with the same tensors."""
    model = build("tf_efficientnet_lite0")
    assert weights.load(model, "tf_efficientnet_lite0", size=64, pretrained=True, weights=None).startswith("package")
    whole = timm.create_model("tf_efficientnet_lite0")
    state = torch.load(weights.packaged("tf_efficientnet_lite0"), weights_only=True)
    whole.load_state_dict(dict(zip(whole.state_dict(), state.values(), strict=True)))
    images_NCHW = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        assert torch.equal(model.body.eval()(images_NCHW), whole.eval().forward_features(images_NCHW))
    assert models.statistics("tf_efficientnet_lite0").mean == (0.5, 0.5, 0.5)
    assert models.statistics("resnet34").mean == (0.485, 0.456, 0.406)


def test_weights_of_an_earlier_run_and_of_a_plain_body_load(tmp_path):
    first, second = build("resnet18"), build("resnet18")
    safetensors.torch.save_file(first.state_dict(), tmp_path / "run.safetensors")
    weights.load(second, "resnet18", size=64, pretrained=True, weights=tmp_path / "run.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    torch.save({"state_dict": {f"module.{k}": v for k, v in first.body.state_dict().items()}}, tmp_path / "body.pth")
    third = build("resnet18")
    weights.load(third, "resnet18", size=64, pretrained=True, weights=tmp_path / "body.pth")
    assert torch.equal(third.body.conv1.weight, first.body.conv1.weight)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet43", "unknown to torchvision and to timm.*Similar names: .*resnet"),
        ("qqq", "unknown"),
        ("fcn_resnet50", "unknown"),
    ],
)
def test_models_that_cannot_be_used_are_named(name, words):
    with pytest.raises(UserError, match=words):
        models.build(name, head="fastai", classes=3, size=64)


def test_weights_that_do_not_fit_name_the_tensors(tmp_path):
    safetensors.torch.save_file(build("resnet34").body.state_dict(), tmp_path / "resnet34.safetensors")
    (tmp_path / "text.pth").write_text("no weights")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(UserError, match=r"do not fit.*features\.0\.0\.weight \(16, 3, 3, 3\) is missing"):
        weights.load(
            build("mobilenet_v3_small"), "", size=64, pretrained=True, weights=tmp_path / "resnet34.safetensors"
        )
    with pytest.raises(UserError, match="cannot be read as weights"):
        weights.load(build("resnet18"), "", size=64, pretrained=True, weights=tmp_path / "text.pth")
    with pytest.raises(UserError, match="holds no state dict"):
        weights.load(build("resnet18"), "", size=64, pretrained=True, weights=tmp_path / "list.pth")
    with pytest.raises(UserError, match="no such file"):
        weights.load(build("resnet18"), "", size=64, pretrained=True, weights=tmp_path / "absent.pth")
