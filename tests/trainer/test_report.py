"""The page of a run: it holds what the journal says, and nothing of what a class may be called."""

import html
import json
import re
import shlex
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from pipelines.errors import UserError
from trainer import TrainConfig, chart, report
from trainer.chart import Series
from trainer.journal import Journal
from trainer.report import spent, working
from trainer.run_folder import RunFolder

NASTY = "<script>alert('x')</script>"


def write_run(path, *, classes=3, epochs=4, steps=50, finished=True, size=0.0, **settings):
    """A folder with the journal of a run that was stopped once, and with pictures."""
    path.mkdir(parents=True)
    names = [NASTY, *(f"class {i}" for i in range(1, classes))]
    config = TrainConfig(data="/photographs/<b>bold</b>", name=path.name, epochs=epochs - 1, **settings).as_dict()
    journal = Journal(path / "journal.jsonl")
    begun = {"command": "train", "config": config, "classes": names, "train": 1000, "valid": 341, "epochs": epochs}
    begun |= {"world_size": 2, "device": "cpu", "precision": "fp32", "versions": {"torch": "2.14"}, "name": path.name}
    journal.write("run", **begun, resumed_from=None)
    rng = np.random.default_rng(0)
    for epoch in range(epochs):
        for step in range(epoch * steps, (epoch + 1) * steps):
            loss = float(np.exp(-step / 100) + 0.05 * rng.random())
            journal.write(
                "step", step=step, epoch=epoch, loss=loss, lr=[1e-5, 1e-4, 1e-3], images_per_second=40.0, data_wait=0.02
            )
        measured = {"train_loss": 0.5, "valid_loss": 0.4, "error_rate": 0.25, "top5_accuracy": 0.9, "macro_f1": 0.7}
        journal.write("epoch", epoch=epoch, phase="unfrozen", **measured, images_per_second=39.0, seconds=83.0)
    journal.write("warning", message=f"Worker 1 failed (of {NASTY}).")
    journal.write("run", **begun, resumed_from=steps)
    if finished:
        rows = [{"name": n, "images": 9, "predicted": 9, "right": 5, "precision": 0.6, "recall": 0.5} for n in names]
        rows[-1] |= {"images": 0, "predicted": 0, "precision": 0.0, "recall": 0.0}
        end = {"error_rate": 61 / 341, "valid_loss": 0.4, "per_class": rows, "most_confused": [[NASTY, "class 1", 7]]}
        best = {"epoch": 2, "error_rate": 0.17, "valid_loss": 0.39}
        journal.write("finished", **end, seconds=411.2, best=best, advice=["It got worse after epoch 2."])
    journal.close()
    if size:
        for name in ("show_batch", "lr_find", "confusion", "top_losses"):
            noise_HWC = rng.integers(0, 256, (int(1000 * size), int(1400 * size), 3), dtype=np.uint8)
            smooth = Image.fromarray(noise_HWC).resize((350, 250)).resize((int(1400 * size), int(1000 * size)))
            smooth.save(path / f"{name}.png")
    return RunFolder(path)


def test_a_page_says_what_the_journal_does(tmp_path):
    path = report.write(write_run(tmp_path / "shown", size=0.2))
    page = path.read_text()
    assert path == tmp_path / "shown/report.html"
    assert "Error <b>17.9%</b>: 61 of 341 validation images, after 4 epochs on 1,000 images in 0 s." in page
    assert page.count('<tr><td class="text">') == 2  # what happened: the warning, and the new start
    assert "Started on 2 workers, from step 50." in page
    assert "It got worse after epoch 2." in page
    assert "waited for images 2.0% of their time" in page
    assert page.count("data:image/webp;base64,") == 4
    assert page.count("<svg") == 3 and page.count("1 min 23 s") == 4
    assert f"onewarp evaluate {tmp_path}/shown --data DIR" in page


def test_a_class_without_images_has_no_share_of_them(tmp_path):
    page = report.write(write_run(tmp_path / "shown")).read_text()
    rows = re.findall(r"<tr><td>(class \d)</td><td>(\d+)</td><td>([^<]*)</td><td>([^<]*)</td></tr>", page)
    assert rows == [("class 1", "9", "60%", "50%"), ("class 2", "0", "", "")]


def test_commands_can_be_copied_where_names_have_spaces(tmp_path):
    folder = write_run(tmp_path / "my runs" / "it's one")
    page = report.write(folder).read_text()
    (line,) = re.findall(r"onewarp export (.*)</pre>", page)
    assert shlex.split(html.unescape(line)) == [str(folder.path)]
    unfinished = report.write(write_run(tmp_path / "two words", finished=False)).read_text()
    assert "<code>--name &#x27;two words&#x27;</code>" in unfinished


def test_a_range_test_alone_says_what_it_found(tmp_path):
    folder = write_run(tmp_path / "rate", epochs=1, finished=False)
    text = folder.journal.read_text().replace('"command": "train"', '"command": "lr-find"')
    folder.journal.write_text(text)
    assert "Not finished: the range test" in report.write(folder).read_text()
    journal = Journal(folder.journal)
    found = {"suggestions": {"valley": 2e-3, "slide": 5e-3}, "chosen": 2e-3, "choice": "valley"}
    journal.write("range_result", **found)
    page = report.write(folder).read_text()
    assert "Suggested learning rate: <b>0.002</b> (valley). By method: valley 0.002, slide 0.005." in page
    assert "Learning</h2>" not in page
    journal.write("range_result", **found | {"chosen": None})
    journal.close()
    assert "says nothing about the learning rate" in report.write(folder).read_text()


def test_losses_that_are_no_numbers_are_left_empty(tmp_path):
    folder = write_run(tmp_path / "shown")
    text = folder.journal.read_text()
    row = {"path": "a.jpg", "actual": "x", "predicted": "y", "loss": None, "probability": None}
    end = json.dumps([row])
    folder.journal.write_text(
        text.replace('"valid_loss": 0.4, "per_class"', f'"valid_loss": null, "top_losses": {end}, "per_class"')
    )
    assert "<td>a.jpg</td><td>x</td><td>y</td><td></td><td></td>" in report.write(folder).read_text()
    report.compare([folder, folder], tmp_path / "comparison.html")


def test_names_stay_text_and_nothing_comes_from_elsewhere(tmp_path):
    page = report.write(write_run(tmp_path / "shown")).read_text()
    assert "<script" not in page and "<b>bold" not in page
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;" in page
    outside = [
        link for link in re.findall(r"""(?:src|href)=["']([^"']*)|url\(([^)]*)""", page) if link[0][:5] != "data:"
    ]
    assert outside == []


def test_a_run_that_goes_on_has_a_page_too(tmp_path):
    page = report.write(write_run(tmp_path / "going", finished=False)).read_text()
    assert "Not finished: error 25.0% after epoch 3." in page
    assert "<code>--name going</code> goes on" in page
    with pytest.raises(UserError, match="holds no run that has begun"):
        report.write(RunFolder(tmp_path / "none"))


def test_two_hundred_classes_stay_below_three_megabytes(tmp_path):
    path = report.write(write_run(tmp_path / "many", classes=200, epochs=10, steps=1000, size=2))
    assert path.stat().st_size < 3_000_000
    assert "<details><summary>Each class</summary>" in path.read_text()  # shut


def test_several_runs_are_held_against_each_other(tmp_path):
    runs = [write_run(tmp_path / "one"), write_run(tmp_path / "two", size=0.1, lr=1e-3, mixup=0.2)]
    page = report.compare(runs, tmp_path / "comparison.html").read_text()
    differences = page.split("Settings that differ")[1].split("Learning")[0]
    assert re.findall(r"<tr><td>(\w+)</td>", differences) == ["lr", "mixup"]
    assert "Data and versions that differ</h2><p>None." in page
    text = runs[1].journal.read_text()
    runs[1].journal.write_text(
        text.replace('"train": 1000', '"train": 999').replace('"torch": "2.14"', '"torch": "2.15"')
    )
    page = report.compare(runs, tmp_path / "comparison.html").read_text()
    facts = page.split("Data and versions that differ")[1].split("Learning")[0]
    assert re.findall(r"<tr><td>(\w+)</td><td>([^<]+)</td><td>([^<]+)</td>", facts) == [
        ("train", "1000", "999"),
        ("torch", "2.14", "2.15"),
    ]
    assert page.count("17.9%") == 2 and page.count("<svg") == 2
    twins = [RunFolder(tmp_path / "one"), write_run(tmp_path / "other/one")]
    assert report.compare(twins, tmp_path / "comparison.html").read_text().count("17.9%") == 2


def test_half_a_picture_is_none(tmp_path):
    folder = write_run(tmp_path / "shown", size=0.2)
    whole = folder.figure("show_batch").read_bytes()
    folder.figure("show_batch").write_bytes(whole[: len(whole) // 2])
    assert report.write(folder).read_text().count("data:image/webp;base64,") == 3


def test_a_chart_is_drawn_to_scale_and_leaves_out_what_is_no_number():
    drawn = chart.lines([Series(name="a & b", x_N=[0, 5, 10, 11], y_N=[0.0, 2.0, 4.0, None])], x="step", y="loss")
    (points,) = re.findall(r'points="([^"]*)"', drawn)
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in points.split())
    assert (x1, y1) == (pytest.approx((x0 + x2) / 2, abs=0.1), pytest.approx((y0 + y2) / 2, abs=0.1))
    assert x0 < x2 and y0 > y2  # up is less in SVG
    assert "a &amp; b" in drawn
    assert chart.lines([Series(name="empty", x_N=[], y_N=[])], x="x", y="y") == ""
    long = chart.lines([Series(name="", x_N=range(100_000), y_N=range(100_000))], x="x", y="y")
    assert len(long) < 20_000


def test_ticks_are_round_and_span_what_is_shown():
    assert chart.ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert chart.ticks(0.13, 0.87) == [0.2, 0.4, 0.6, 0.8]
    assert chart.ticks(3e-5, 2e-3, log=True) == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2])
    assert chart.ticks(5, 5) == [5]


def test_time_goes_to_whatever_ended_at_each_event():
    kinds = [("run", 0), ("range_step", 3), ("range_result", 4), ("step", 6), ("step", 7), ("epoch", 17)]
    kinds += [("run", 50_000), ("step", 50_002)]  # stopped over night
    events = [{"event": kind, "time": seconds} for kind, seconds in kinds]
    assert dict(spent(events)) == {"range test": 4, "training steps": 5, "validation, checkpoints, pictures": 10}
    assert working(events) == 19


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium to show the page in")
@pytest.mark.parametrize("scheme", ["dark", "light"])
@pytest.mark.parametrize("width", [360, 1400])
def test_a_browser_shows_it_without_a_word(tmp_path, width, scheme):
    page = report.write(write_run(tmp_path / "shown", size=0.5))
    shot = tmp_path / "shot.png"
    assert "CONSOLE" not in browsed(page, width, tmp_path, f"--screenshot={shot}", scheme=scheme)
    with Image.open(shot) as picture:
        assert picture.width == width
        shown = picture.convert("RGB")
    assert len(shown.getcolors(2**24)) > 100  # not an empty page
    assert shown.getpixel((2, 2)) == {"dark": (0x19, 0x19, 0x18), "light": (255, 255, 255)}[scheme]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium to show the page in")
@pytest.mark.parametrize("width", [360, 1400])
def test_no_page_is_wider_than_the_screen(tmp_path, width):
    one = report.write(write_run(tmp_path / "one with a long name that goes on and on and on", size=0.5))
    several = report.compare([RunFolder(one.parent), write_run(tmp_path / "two", lr=1e-3)], tmp_path / "several.html")
    for page in (one, several):
        # A window of a browser is never as narrow as a phone; a frame is.
        framed = html.escape(page.read_text())
        frame = f'<iframe style="width:{width}px;height:2000px;border:0" srcdoc="{framed}"></iframe>'
        measure = "const d = document.querySelector('iframe').contentDocument.documentElement;"
        measure += "console.log('MEASURED', d.scrollWidth, d.clientWidth)"
        measuring = page.with_name("measuring.html")
        measuring.write_text(f"<!doctype html><body>{frame}<script>onload = () => {{ {measure} }}</script>")
        said = browsed(measuring, 1600, tmp_path, f"--screenshot={tmp_path / 'shot.png'}")
        (found,) = re.findall(r"MEASURED (\d+) (\d+)", said)
        assert int(found[0]) <= int(found[1]) <= width


def browsed(page, width, tmp_path, *words, scheme="light"):
    """What a browser says of the page."""
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    flags += ["--enable-logging=stderr", f"--window-size={width},2000", "--host-resolver-rules=MAP * ~NOTFOUND"]
    flags += [f"--blink-settings=preferredColorScheme={('dark', 'light').index(scheme)}"]
    done = subprocess.run(
        ["chromium", *flags, *words, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stderr
