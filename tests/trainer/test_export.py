"""A model that leaves: what goes with it, what it says outside, and that nothing of us is needed there."""

import csv
import io
import json
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import safetensors.numpy
import torch
from PIL import Image
from rich.console import Console

from pipelines.errors import UserError
from trainer import (
    CheckExportConfig,
    ExportConfig,
    PredictConfig,
    TrainConfig,
    check_export,
    checking,
    export,
    exported,
    fine_tune,
    predict,
)
from trainer.exported import Exported
from trainer.ranks import Ranks
from trainer.trained import open_run

FORMS = ["onnx", "torch", "safetensors"]
SIZE = 40
# The command on a machine that lacks what training needs.
WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, *_):
        names = "torch torchvision nvidia ray timm numba matplotlib wandb torchmetrics cv2 pandas scipy sklearn".split()
        if name.split(".")[0] in names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
from cluster.cli import main
main()
"""


@pytest.fixture(scope="module")
def run(small_set, tmp_path_factory):
    config = {"data": str(small_set), "model": "test_convnext", "head": "fastai", "pretrained": False, "size": SIZE}
    config |= {"batch": 8, "epochs": 1, "freeze_epochs": 0, "lr": 4e-3, "wandb": "off", "workers": 0}
    config |= {"runs": str(tmp_path_factory.mktemp("runs")), "name": "run", "loss": "one-vs-rest"}
    return fine_tune(TrainConfig.from_dict(config), Console(file=io.StringIO())).folder


@pytest.fixture(scope="module", params=FORMS)
def made(request, run):
    return export(ExportConfig(run=run, to=request.param), Console(file=io.StringIO()))


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_an_export_says_what_the_run_says(made, run):
    trained, manifest = open_run(run, "last")
    images_NCHW = next(trained.loader(manifest.valid, Ranks(), device=torch.device("cpu")).epoch(0)).images_NCHW
    with torch.inference_mode():
        expected_NC = trained.model(Ranks())(images_NCHW).numpy()
    there = Exported.open(made.folder)
    for n in (1, 2, 7):  # any number of images
        logits_NC = there.logits(images_NCHW[:n].contiguous().numpy())
        np.testing.assert_allclose(logits_NC, expected_NC[:n], atol=1e-4)
    probabilities_NC = trained.loss().probabilities(torch.from_numpy(expected_NC))
    np.testing.assert_allclose(there.probabilities(expected_NC), probabilities_NC.numpy(), rtol=1e-12)


def test_the_golden_images_come_out_again(made, run):
    contract = json.loads((made.folder / "contract.json").read_text())
    tensors = safetensors.numpy.load_file(made.folder / "golden.safetensors")
    assert len(contract["golden"]["images"]) == made.images == 8
    namespace = {}
    exec((made.folder / "preprocess.py").read_text(), namespace)  # as a stranger has it
    images = [namespace["read"](made.folder / path, contract["preprocessing"]) for path in contract["golden"]["images"]]
    np.testing.assert_allclose(np.stack(images), tensors["images_NCHW"], atol=1.01 / 255 / 0.225)
    assert np.abs(np.stack(images) - tensors["images_NCHW"]).mean() < 0.01 / 255 / 0.225
    assert contract["classes"] == ["class0", "class1", "class2"]
    assert contract["output"]["shape"] == ["n", 3]
    assert (contract["output"]["probabilities"], contract["output"]["threshold"]) == ("sigmoid of each", 0.5)
    if contract["model"]["kind"] == "onnx":
        session = onnxruntime.InferenceSession(made.model, providers=["CPUExecutionProvider"])
        (logits_NC,) = session.run(["logits"], {"images": tensors["images_NCHW"]})
        np.testing.assert_allclose(logits_NC, tensors["logits_NC"], atol=1e-4)
        assert contract["input"]["shape"] == list(session.get_inputs()[0].shape) == ["n", 3, SIZE, SIZE]


def test_an_export_predicts_what_its_run_predicts(made, run, small_set, tmp_path, quiet):
    said = {}
    for name, what in (("run", run), ("export", made.folder)):
        config = PredictConfig(run=what, data=small_set / "valid", out=tmp_path / f"{name}.csv")
        said[name] = predict(config, quiet)
    assert said["export"].paths == said["run"].paths and said["export"].threshold == 0.5
    np.testing.assert_allclose(said["export"].probabilities_NK, said["run"].probabilities_NK, atol=5e-3)
    assert said["export"].predicted == said["run"].predicted
    columns = [list(rows(tmp_path / f"{name}.csv")[0]) for name in said]
    assert columns[0] == columns[1]


def test_onnx_needs_neither_torch_nor_dali_nor_ray(run, small_set, tmp_path):
    folder = run / "export-onnx"
    if not folder.exists():
        export(ExportConfig(run=run), Console(file=io.StringIO()))
    (tmp_path / "new").mkdir()
    for i, file in enumerate(sorted((small_set / "valid/class1").glob("*"))):
        (tmp_path / f"new/{i}.jpg").write_bytes(file.read_bytes())
    (tmp_path / "new/bad.jpg").write_bytes(b"no image")
    words = [sys.executable, "-c", WITHOUT, "predict", folder, "new", "--threshold", "0"]
    told = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    assert "left out  bad.jpg: cannot identify image file" in told.stdout
    expected = predict(PredictConfig(run=run, data=tmp_path / "new", out=tmp_path / "run.csv", threshold=0))
    assert [row["predicted"] for row in rows(tmp_path / "predictions.csv")] == expected.predicted
    assert [row["path"] for row in rows(tmp_path / "predictions.csv")] == list(expected.paths)


def test_all_ways_are_compared(made, quiet):
    found = check_export(CheckExportConfig(export=made.folder), quiet)
    assert [way.name for way in found.ways] == ["DALI", "Pillow", "torchvision", "OpenCV"] and not found.skipped
    dali, pillow, torchvision, opencv = found.ways
    assert (dali.mean_levels, dali.logits, dali.changed) == (0, 0, ())
    assert found.golden_levels["DALI"] < 1e-5  # of the loader, to the last bit but one
    for way in (pillow, torchvision):
        assert way.mean_levels < 0.02 and way.max_levels <= 1.01 and not way.changed
    assert 0 < opencv.mean_levels < 3  # its filter is another
    assert not found.troubles
    checking.summary(found, quiet)
    told = quiet.file.getvalue()
    assert "DALI                8       0.000       0.0    0.0000                0\n" in told


def test_a_way_whose_library_is_missing_is_named(made, quiet, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    found = check_export(CheckExportConfig(export=made.folder, limit=3), quiet)
    assert [way.name for way in found.ways] == ["Pillow", "torchvision"] and found.ways[0].images == 3
    assert set(found.skipped) == {"DALI", "OpenCV"}
    assert found.skipped["DALI"].startswith("not installed: pip install nvidia-dali-cuda130 (")
    assert found.skipped["OpenCV"].startswith("not installed: pip install opencv-python-headless (")


def test_what_does_not_agree_is_told(made, tmp_path, copies, quiet):
    folder = copies(made.folder, "export")
    tensors = safetensors.numpy.load_file(folder / "golden.safetensors")
    tensors["logits_NC"] = tensors["logits_NC"] + 0.5
    tensors["images_NCHW"] = tensors["images_NCHW"][:, ::-1].copy()  # as if it were BGR
    safetensors.numpy.save_file(tensors, folder / "golden.safetensors")
    found = check_export(CheckExportConfig(export=folder), quiet)
    assert len(found.troubles) == 5
    assert "gives other outputs than when it was exported" in found.troubles[0]
    assert "DALI reads the golden images otherwise" in found.troubles[1]


def test_a_model_that_has_changed_is_refused(made, copies):
    folder = copies(made.folder, "export")
    contract = json.loads((folder / "contract.json").read_text())
    model = folder / contract["model"]["file"]
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    with pytest.raises(UserError, match="is not the one that was exported"):
        Exported.open(folder)
    model.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        Exported.open(folder)
    (folder / "contract.json").write_text(json.dumps({**contract, "format": 99}))
    with pytest.raises(UserError, match="exported in format 99"):
        Exported.open(folder)
    (folder / "contract.json").write_text("{")
    with pytest.raises(UserError, match="holds no export"):
        Exported.open(folder)


def test_an_export_is_replaced_and_nothing_else_is(made, run, tmp_path, quiet):
    form = json.loads((made.folder / "contract.json").read_text())["model"]["kind"]
    before = sorted(path.name for path in made.folder.iterdir())
    (made.folder / "stray").touch()
    export(ExportConfig(run=run, to=form), quiet)
    assert sorted(path.name for path in made.folder.iterdir()) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").touch()
    with pytest.raises(UserError, match="is there and is no export"):
        export(ExportConfig(run=run, to=form, out=tmp_path / "mine"), quiet)
    assert not list(run.parent.glob("*/.onewarp-*"))


def test_golden_images_come_from_where_they_are(run, small_set, tmp_path, quiet, monkeypatch):
    for i, file in enumerate(sorted((small_set / "valid/class1").glob("*"))[:3]):
        (tmp_path / f"{i}.jpg").write_bytes(file.read_bytes())
    made = export(ExportConfig(run=run, to="safetensors", images=tmp_path, out=tmp_path / "e"), quiet)
    assert made.images == 3
    assert [path.read_bytes() for path in sorted((tmp_path / "e/golden").iterdir())] == [
        (tmp_path / f"{i}.jpg").read_bytes() for i in range(3)
    ]


def test_a_model_that_says_something_else_is_not_written(run, tmp_path, quiet, monkeypatch):
    monkeypatch.setattr(exported, "_safetensors", lambda file, contract: lambda images: np.ones((len(images), 3)))
    with pytest.raises(UserError, match=r"does not say what the run's own says"):
        export(ExportConfig(run=run, to="safetensors", out=tmp_path / "e"), quiet)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        ({"tta": 2}, "--tta is of no"),
        ({"workers": 2}, "--workers is of no"),
        ({"weights": "best"}, "--weights best is"),
    ],
)
def test_what_an_export_cannot_do_is_said(made, tmp_path, quiet, settings, answer):
    with pytest.raises(UserError, match=answer):
        predict(PredictConfig(run=made.folder, data=tmp_path, out=tmp_path / "p.csv", **settings), quiet)
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_missing_is_named(run, made, tmp_path, quiet, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="pip install onnx onnxscript onnxruntime"):
        export(ExportConfig(run=run, to="onnx", out=tmp_path / "e"), quiet)
    if (made.folder / "model.onnx").exists():
        with pytest.raises(UserError, match="pip install onnxruntime"):
            predict(PredictConfig(run=made.folder, data=made.folder / "golden", out=tmp_path / "p.csv"), quiet)
    assert list(tmp_path.iterdir()) == []


def test_images_that_not_every_library_reads_are_named_and_count_for_none(made, tmp_path, quiet, small_set):
    some = sorted((small_set / "valid").rglob("*.jpg"))[:4]
    folder = tmp_path / "images"
    folder.mkdir()
    for number, suffix in enumerate((".jpg", ".png", ".bmp", ".tif")):
        with Image.open(some[number]) as image:
            image.save(folder / f"{number}{suffix}")
    found = check_export(CheckExportConfig(export=made.folder, data=folder), quiet)
    assert set(found.unread) == {"2.bmp", "3.tif"}
    assert all(why.startswith("torchvision: ") for why in found.unread.values())
    assert {way.images for way in found.ways} == {2}
    assert not found.troubles


def test_sixteen_bits_are_read_as_the_upper_eight_of_them(made, tmp_path, quiet):
    cv2 = pytest.importorskip("cv2")
    levels_HWC = np.random.default_rng(0).integers(0, 65536, (40, 50, 3)).astype(np.uint16)
    folder = tmp_path / "images"
    folder.mkdir()
    cv2.imwrite(str(folder / "deep.png"), cv2.resize(levels_HWC, (200, 160), interpolation=cv2.INTER_CUBIC))
    found = check_export(CheckExportConfig(export=made.folder, data=folder), quiet)
    assert not found.unread
    assert max(way.mean_levels for way in found.ways if way.name in ("torchvision", "Pillow")) < 1.0
