"""Transformers, mixers and maps with the features last: what they make, how they divide, at any size, with weights."""

from dataclasses import replace

import pytest
import safetensors.torch
import timm
import torch
from torch import nn
from torchvision.models import vision_transformer

from pipelines import scan
from pipelines.errors import UserError
from trainer import models, optim, weights

FAMILIES = {
    "test_vit": (48, None, 6 + 2),
    "test_vit3": (48, None, 9 + 2),
    "test_vit_relpos": (48, None, 9 + 2),
    "test_mambaout": (64, (1, 2), 4 + 1),
    "test_nfnet": (64, (2, 3), 5 + 1),
    "deit_tiny_distilled_patch16_224": (32, None, 12 + 2),
    "eva02_tiny_patch14_224": (28, None, 12 + 2),
    "convmixer_768_32": (32, (2, 3), 32 + 2),
    "resmlp_12_224": (32, None, 12 + 2),
    "levit_128s": (64, None, 9 + 2),
    "swin_s3_tiny_224": (64, (1, 2), 4 + 1),
    "sam2_hiera_tiny": (64, (1, 2), 12 + 2),
    "pit_ti_224": (64, None, 3 + 1),
    "vit_b_16": (64, None, 12 + 2),
}  # size; the positions of a map, None for a vector; layer groups: blocks with their embedding, or stages, and the head


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_divides_into_groups_and_learns(name):
    size, positions, count = FAMILIES[name]
    with torch.device("cpu" if name.startswith("test_") else "meta"):  # of the larger ones, shapes and gradients alone
        model = models.build(name, head="fastai", classes=5, size=size)
        logits_NC = model(torch.randn(2, 3, size, size))
        assert logits_NC.shape == (2, 5)
        logits_NC.square().sum().backward()
        three, many = models.layer_groups(model, size), models.stage_groups(model, size)
    assert getattr(model.head[0], "positions", None) == positions
    assert (len(three), len(many)) == (3, count)
    everything = sorted(map(id, model.parameters()))
    for groups in (three, many):
        assert sorted(id(p) for group in groups for p in group) == everything
        assert all(groups)
    first = {id(p) for p in three[0]}
    order = [id(p) in first for group in many for p in group]  # from the input on: the early ones come first
    assert order == sorted(order, reverse=True)
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def names_of(model, groups):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [{names[id(p)] for p in group} for group in groups]


def small_vit(size=32):
    """torchvision's own class, with 4 blocks."""
    torch.manual_seed(size)
    whole = vision_transformer.VisionTransformer(size, 8, num_layers=4, num_heads=2, hidden_dim=16, mlp_dim=32)
    nn.init.normal_(whole.class_token)
    return models.Classifier(models.cut(whole), models.build_head("plain", 16, 3, None))


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_transformer_is_cut_in_the_middle_of_its_blocks(library):
    if library == "timm":
        model, depth, prefix = models.build("test_vit2", head="plain", classes=3, size=48), 8, "body.blocks."
        last_norm = "body.fc_norm"
    else:
        model, depth, prefix = small_vit(48), 4, "body.encoder.layers.encoder_layer_"
        last_norm = "body.encoder.ln"
    early, late, head = names_of(model, models.layer_groups(model, 48))
    blocks = {i: {n for n, _ in model.named_parameters() if n.startswith(f"{prefix}{i}.")} for i in range(depth)}
    in_blocks = set().union(*blocks.values())
    assert early & in_blocks == set().union(*(blocks[i] for i in range(depth // 2)))
    embedding = {n for n in ("reg_token", "pos_embed", "class_token", "encoder.pos_embedding") if f"body.{n}" in early}
    assert len(embedding) == 2  # all that these models have
    norms = {f"{last_norm}.weight", f"{last_norm}.bias"}
    assert late - in_blocks == norms
    assert head == {"head.1.weight", "head.1.bias"}
    stages = names_of(model, models.stage_groups(model, 48))
    assert stages[0] == early - in_blocks
    assert stages[1:-2] == [blocks[i] for i in range(depth - 1)]
    assert stages[-2:] == [blocks[depth - 1] | norms, head]
    optimizer = optim.build(model, 0.1, 48, by_stage=True)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert {n for n, p in model.named_parameters() if id(p) in decayed} == {
        n
        for n, p in model.named_parameters()
        if p.ndim > 1 and not n.endswith(("_token", "pos_embed", "pos_embedding"))
    }


def test_what_a_body_names_itself_is_not_decayed():
    model = models.build("levit_128s", head="plain", classes=3, size=64)
    optimizer = optim.build(model, 0.1, 64)
    plain = {id(p) for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    named = {n for n, p in model.named_parameters() if id(p) in plain and p.ndim > 1}
    assert named == {f"body.{n}" for n in model.body.no_weight_decay()} != set()


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_vit3"])
def test_tokens_are_pooled_as_the_model_does_it(name):
    """By the class token, by the mean of the patches, by attention."""
    model, whole = (
        models.build(name, head="plain", classes=3, size=48).eval(),
        timm.create_model(name, img_size=48).eval(),
    )
    left = whole.load_state_dict(model.body.state_dict(), strict=False)
    assert left.missing_keys == ["head.weight", "head.bias"]
    assert not left.unexpected_keys
    images_NCHW = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        expected_NF = whole.forward_head(whole.forward_features(images_NCHW), pre_logits=True)
        assert torch.equal(model.body(images_NCHW), expected_NF)


@pytest.mark.parametrize("kind", ["fastai", "plain"])
def test_features_last_are_pooled_as_features_first(kind):
    first, last = models.build_head(kind, 6, 3), models.build_head(kind, 6, 3, (1, 2))
    last.load_state_dict(first.state_dict())
    features_NFHW = torch.randn(4, 6, 2, 3)
    assert torch.allclose(first.eval()(features_NFHW), last.eval()(features_NFHW.permute(0, 2, 3, 1)), atol=1e-6)


def test_a_vector_goes_into_the_same_head_without_pooling():
    kinds = [type(module).__name__ for module in models.build_head("fastai", 6, 3, None)]
    assert kinds == ["Identity", "BatchNorm1d", "Dropout", "Linear", "ReLU", "BatchNorm1d", "Dropout", "Linear"]
    assert models.build_head("fastai", 6, 3, None)(torch.randn(2, 6)).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("test_vit", 50, r"50 is no multiple of its patches' 16 pixels.*fit: 48 and 64\."),
        ("vit_b_32", 100, r"fit: 96 and 128\."),
        ("maxvit_t", 160, r"fit: 224\."),
    ],
)
def test_sizes_near_one_that_does_not_fit_are_told(name, size, words):
    with pytest.raises(UserError, match=f"--model {name} takes no images of --size {size} .*{words}"):
        models.build(name, head="plain", classes=3, size=size)


def test_maxvit_is_cut_before_its_classifier():
    with torch.device("meta"):
        model = models.build("maxvit_t", head="plain", classes=3, size=224)
    assert [name for name, _ in model.body.named_children()] == ["stem", "blocks"]
    assert model.head[1].in_features == 512
    models.check_partition(model, models.stage_groups(model, 224))


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_maxvit"])
def test_weights_for_another_size_are_resampled_as_timm_does(name, tmp_path):
    published = timm.create_model(name)  # at its own 160 pixels
    safetensors.torch.save_file(published.state_dict(), tmp_path / "published.safetensors")
    model = models.build(name, head="plain", classes=3, size=96)
    told = weights.load(model, name, size=96, pretrained=True, weights=tmp_path / "published.safetensors")
    assert told.endswith("(body)")
    options = {"pretrained_cfg_overlay": {"file": str(tmp_path / "published.safetensors")}, "img_size": 96}
    expected = timm.create_model(
        name, pretrained=True, num_classes=0, **options, **({} if model.pooled else {"global_pool": ""})
    )
    for key, value in expected.state_dict().items():
        assert torch.equal(model.body.state_dict()[key], value), key
    assert any(v.shape != published.state_dict()[k].shape for k, v in model.body.state_dict().items())


def test_a_run_is_taken_up_at_another_size(tmp_path):
    before, after = small_vit(32), small_vit(48)
    safetensors.torch.save_file(before.state_dict(), tmp_path / "run.safetensors")
    weights.load(after, "", size=48, pretrained=True, weights=tmp_path / "run.safetensors")
    expected = vision_transformer.interpolate_embeddings(48, 8, before.body.state_dict())
    assert after.body.state_dict().keys() == expected.keys()
    assert all(torch.equal(after.body.state_dict()[key], expected[key]) for key in expected)
    assert torch.equal(after.head[1].weight, before.head[1].weight)


@pytest.mark.parametrize(
    ("head", "classes", "words"),
    [("fastai", 9, "it has 5 classes and not 9"), ("plain", 5, "it is of another kind")],
)
def test_a_run_brings_its_body_to_another_task(tmp_path, head, classes, words):
    before = models.build("test_vit", head="fastai", classes=5, size=32)
    after = models.build("test_vit", head=head, classes=classes, size=32)
    fresh = {key: value.clone() for key, value in after.head.state_dict().items()}
    safetensors.torch.save_file(before.state_dict(), tmp_path / "run.safetensors")
    told = weights.load(after, "test_vit", size=32, pretrained=True, weights=tmp_path / "run.safetensors")
    assert f"(body; its head is left out, {words}, and a fresh one begins)" in told
    assert all(torch.equal(after.body.state_dict()[k], v) for k, v in before.body.state_dict().items())
    assert all(torch.equal(after.head.state_dict()[k], v) for k, v in fresh.items())


@pytest.mark.parametrize(
    ("known", "kept"), [(("a", "b", "c"), True), (("a", "c", "b"), False), (("x", "y", "z"), False)]
)
def test_a_head_is_for_its_own_classes_in_their_order(small_set, tmp_path, known, kept):
    before, after = (models.build("test_vit", head="fastai", classes=3, size=32) for _ in range(2))
    safetensors.torch.save_file(before.state_dict(), tmp_path / "model.safetensors")
    manifest = scan(small_set)
    places = {name: known[label] for label, name in enumerate(manifest.classes)}
    replace(manifest, classes=tuple(places.values())).write(tmp_path / "manifest.parquet")
    told = weights.load(
        after, "", size=32, pretrained=True, weights=tmp_path / "model.safetensors", classes=("a", "b", "c")
    )
    assert torch.equal(after.head[-1].weight, before.head[-1].weight) == kept
    assert told.endswith("(body and head)" if kept else "it is of other classes, and a fresh one begins)")


def test_names_with_a_tag():
    models.check_known("vit_tiny_patch16_224.augreg_in21k")
    assert models.build("test_vit.r160_in1k", head="plain", classes=3, size=32)
    assert models.statistics("vit_tiny_patch16_224.augreg_in21k").mean == (0.5, 0.5, 0.5)
    assert models.statistics("convnext_tiny.fb_in22k").mean == (0.485, 0.456, 0.406)
    assert models.statistics("vit_base_patch16_clip_224.openai").mean == (0.48145466, 0.4578275, 0.40821073)
    with pytest.raises(UserError, match=r"without weights of that name. It has .*vit_tiny_patch16_224\.augreg_in21k"):
        models.check_known("vit_tiny_patch16_224.absent")


def test_a_model_without_published_weights_says_so():
    model = models.build("convnext_atto", head="plain", classes=3, size=32)
    with pytest.raises(UserError, match=r"no published weights of --model .* --no-pretrained"):
        weights.load(model, "vit_tiny_patch32_224", size=32, pretrained=True, weights=None)


def test_downloads_that_fail_say_why(monkeypatch):
    """The library's loader on weights that it cannot resample, and on a network that is not there."""
    published = timm.create_model("pit_ti_224").state_dict()
    model = models.build("pit_ti_224", head="plain", classes=3, size=160)

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: published)
    with pytest.raises(UserError, match=r"could not be loaded into it, made for images of --size 160 .*own --size 224"):
        weights.load(model, "pit_ti_224", size=160, pretrained=True, weights=None)

    def unreachable(*_, **__):
        raise FileNotFoundError("no route to the host")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", unreachable)
    with pytest.raises(UserError, match=r"could not be had \(no route to the host\)\. Without a network"):
        weights.load(model, "pit_ti_224", size=160, pretrained=True, weights=None)


def test_downloads_are_resampled_by_timm(monkeypatch):
    published = timm.create_model("test_vit").state_dict()
    model = models.build("test_vit", head="plain", classes=3, size=64)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(published))
    assert weights.load(model, "test_vit", size=64, pretrained=True, weights=None) == "downloaded"
    assert model.body.pos_embed.shape[1] == 17 < published["pos_embed"].shape[1]
    assert torch.equal(model.body.blocks[5].mlp.fc1.weight, published["blocks.5.mlp.fc1.weight"])
