import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from pipelines.errors import UserError
from tests.full_disk import small_disk
from trainer import TrainConfig, fine_tune
from trainer.journal import read
from trainer.run_folder import RunFolder
from trainer.tracking import Tracker, replay

ROOT = Path(__file__).parents[2]
KEY = "0123456789abcdef" * 3


def event(kind, **more):
    return {"event": kind, "time": 1.0, **more}


def journal():
    config = {"seed": 3, "model": {"name": "lite0"}}
    yield event("run", name="first", config=config, classes=["a", "b"], world_size=2, resumed_from=None)
    yield event("phase", phase="lr_find", epochs=0, steps=3, lr=[1e-7], first_step=0)
    for step in range(3):
        yield event("range_step", step=step, lr=10.0 ** (step - 7), loss=2.0 - step, smoothed=2.5 - step)
    yield event("range_result", suggestions={"valley": 2.5e-3}, chosen=2.5e-3)
    yield event("phase", phase="frozen", epochs=1, steps=4, lr=[1.0], first_step=0)
    for step in range(4):
        speed = {"images_per_second": 64.0, "data_wait": 0.25}
        yield event("step", step=step, epoch=0, loss=1.0 / (step + 1), lr=[1e-5, 1e-3], **speed)
    losses = {"train_loss": 0.5, "valid_loss": None, "error_rate": 0.125}
    yield event("epoch", epoch=0, phase="frozen", images_per_second=60.0, seconds=4.0, **losses)
    yield event("warning", message="cold")
    yield event("finished", error_rate=0.125, valid_loss=0.375, most_confused=[["a", "b", 3]], seconds=9.0)


def records(run_folder):
    """Records of each wandb transaction log: LevelDB's log format, read without wandb's own reader.

    A header of 7 bytes, then blocks of 32 KiB of (crc32 u32, length u16, type u8, payload); types are
    1 whole, 2 first, 3 middle, 4 last. https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    from wandb.proto.wandb_internal_pb2 import Record  # ty: ignore[missing-module-member]

    logs = []
    for path in sorted(run_folder.glob("wandb/*run-*/*.wandb")):
        data, place, whole, found = path.read_bytes(), 7, b"", []
        while place + 7 <= len(data):
            room = 32768 - place % 32768
            if room < 7:
                place += room
                continue
            _, length, kind = struct.unpack_from("<IHB", data, place)
            if kind == 0 or place + 7 + length > len(data):
                break
            whole += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):
                found.append(Record.FromString(whole))
                whole = b""
        logs.append(found)
    return logs


def finished(run_folder):
    """`records` once they are whole: wandb writes the last of them shortly after `finish` has returned."""
    deadline = time.monotonic() + 20
    while True:
        logs = records(run_folder)
        ended = [any(record.WhichOneof("record_type") == "exit" for record in log) for log in logs]
        if all(ended) or time.monotonic() > deadline:
            return logs
        time.sleep(0.05)


def rows(log):
    """History rows of a transaction log as {key: value}, of which wandb's own are `_step` and the like."""
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in log
        if record.WhichOneof("record_type") == "history"
    ]


def last(log, what):
    """The final {key: value} of all "config" or "summary" updates."""
    found = {}
    for record in log:
        if record.WhichOneof("record_type") == what:
            for item in getattr(record, what).update:
                found[".".join(item.nested_key) or item.key] = json.loads(item.value_json)
    return found


def environment(tmp_path, **more):
    """An environment in which nobody is logged in, whatever this machine's owner is."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "NETRC"))}
    paths = {"NETRC": str(tmp_path / "netrc"), "HOME": str(tmp_path), "WANDB_CONFIG_DIR": str(tmp_path / "c")}
    return bare | paths | {"PYTHONPATH": str(ROOT)} | more


def track(tmp_path, mode, before="", after="", **environ):
    """Track the journal in a process of its own, as wandb reads its environment once; returns its output."""
    folder = tmp_path / "run"
    folder.mkdir(exist_ok=True)
    code = f"""
import pathlib
from tests.trainer.test_tracking import journal
import trainer.tracking as tracking
{before}
warn = lambda text: print("WARNED", text)
tracker = tracking.Tracker(pathlib.Path({str(folder)!r}), {mode!r}, warnings=warn)
for item in journal():
    tracker.on(item)
{after}
tracker.close()
"""
    return folder, [sys.executable, "-c", code], environment(tmp_path, **environ)


def output(tmp_path, mode, **more):
    folder, command, environ = track(tmp_path, mode, **more)
    done = subprocess.run(command, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, done.stderr


@pytest.fixture
def tracked(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for name in ("lr_find", "confusion"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    warned = []
    tracker = Tracker(tmp_path, "offline", project="p", warnings=warned.append)
    for item in journal():
        tracker.on(item)
    tracker.close()
    tracker.close()
    assert warned == []
    return tmp_path


def test_every_number_arrives_on_its_own_axis(tracked):
    (log,) = finished(tracked)
    found = rows(log)
    steps = [row for row in found if "train/loss" in row]
    assert [row["global_step"] for row in steps] == [0, 1, 2, 3]
    assert [row["train/loss"] for row in steps] == [1.0, 1 / 2, 1 / 3, 1 / 4]
    assert {(row["lr/group_0"], row["lr/group_1"], row["train/data_wait"]) for row in steps} == {(1e-5, 1e-3, 0.25)}
    assert [row["range_test/lr"] for row in found if "range_test/lr" in row] == [1e-7, 1e-6, 1e-5]
    assert [row["range_test/smoothed"] for row in found if "range_test/lr" in row] == [2.5, 1.5, 0.5]
    (epoch,) = [row for row in found if "epoch" in row]
    assert (epoch["epoch/error_rate"], epoch["epoch/train_loss"], epoch["global_step"]) == (0.125, 0.5, 3)
    assert "epoch/valid_loss" not in epoch  # it was no number
    axes = {
        record.metric.glob_name or record.metric.name: record.metric.step_metric
        for record in log
        if record.WhichOneof("record_type") == "metric" and record.metric.step_metric
    }
    assert axes["train/*"] == axes["lr/*"] == "global_step"
    assert axes["epoch/*"] == "epoch"
    assert axes["range_test/loss"] == axes["range_test/smoothed"] == "range_test/lr"


def test_config_summary_and_pictures_arrive(tracked):
    (log,) = finished(tracked)
    (run,) = [record.run for record in log if record.WhichOneof("record_type") == "run"]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert run.project == "p"
    assert run.display_name == "first"
    assert config["seed"] == 3
    assert config["model"] == {"name": "lite0"}
    assert config["run"]["world_size"] == 2
    summary = last(log, "summary")
    assert summary["error_rate"] == 0.125
    assert summary["valid_loss"] == 0.375
    assert summary["chosen_lr"] == summary["suggested_lr/valley"] == 2.5e-3
    end = rows(log)[-1]
    assert end["confusion/_type"] == end["lr_find/_type"] == "image-file"
    assert end["most_confused/nrows"] == 1
    assert not [key for key in end if key.startswith("top_losses")]
    (exits,) = [record.exit for record in log if record.WhichOneof("record_type") == "exit"]
    assert exits.exit_code == 0


@pytest.mark.parametrize("skipped", [0, 10], ids=["whole journal", "new events only"])
def test_a_restart_goes_on_under_the_same_id_and_place(tracked, skipped):
    before, after = list(journal())[:10], list(journal())[10:]
    restart = event("run", name="first", config={"seed": 4}, resumed_from=2)
    lines = [*before, event("stopped", step=1), restart, *after]
    (tracked / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tracker = Tracker(tracked, "offline", warnings=pytest.fail)
    for item in lines[skipped:]:
        tracker.on(item)
    tracker.close()
    first, second = finished(tracked)
    ids = {record.run.run_id for record in [*first, *second] if record.WhichOneof("record_type") == "run"}
    assert ids == {(tracked / "wandb-id").read_text()}
    # What both saw before the restart has the same place in both, so that it is never counted twice.
    losses = [[(row["_step"], row.get("train/loss")) for row in rows(log)] for log in (first, second)]
    assert losses[0][:6] == losses[1][:6]
    assert [loss for _, loss in losses[1] if loss] == [1.0, 1 / 2, 1 / 3, 1 / 4]
    assert losses[1][-1][0] == len(lines) - 1
    # What failed before does not count: this time it went on to the end, with this configuration.
    assert [record.exit.exit_code for record in second if record.WhichOneof("record_type") == "exit"] == [0]
    (run,) = [record.run for record in second if record.WhichOneof("record_type") == "run"]
    started = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (started | last(second, "config"))["seed"] == 4


def test_a_replay_is_what_the_run_was_live(tracked, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    for name in ("lr_find", "confusion"):
        Image.new("RGB", (8, 8)).save(other / f"{name}.png")
    (other / "journal.jsonl").write_text("".join(json.dumps(item) + "\n" for item in journal()))
    replay(RunFolder(other), "offline", pytest.fail)
    (live,), (replayed,) = finished(tracked), finished(other)

    def told(log):
        kept = [{key: value for key, value in row.items() if key != "_runtime"} for row in rows(log)]
        return [{key: row[key] for key in row if not key.endswith(("path", "_timestamp"))} for row in kept]

    assert told(live) == told(replayed) and len(told(live)) == 3 + 4 + 1 + 1
    assert last(live, "summary").keys() == last(replayed, "summary").keys()
    with pytest.raises(UserError, match="holds no run that has begun"):
        replay(RunFolder(other / "none"), "offline", pytest.fail)


def test_a_run_that_does_not_come_to_its_end_is_told_to_have_failed(tmp_path):
    tracker = Tracker(tmp_path, "offline", warnings=pytest.fail)
    for item in list(journal())[:8]:
        tracker.on(item)
    tracker.close()
    (log,) = finished(tmp_path)
    assert [record.exit.exit_code for record in log if record.WhichOneof("record_type") == "exit"] == [1]


def test_off_leaves_nothing(tmp_path):
    folder, out, err = output(tmp_path, "off")
    assert (out, err) == ("", "")
    assert list(folder.iterdir()) == []


def test_auto_without_a_key_is_offline_and_silent(tmp_path):
    folder, out, err = output(tmp_path, "auto")
    assert (out, err) == ("", "")
    assert len(rows(records(folder)[0])) == 9


def test_wandb_mode_is_heard(tmp_path):
    folder, out, _ = output(tmp_path, "auto", WANDB_MODE="disabled")
    assert out == ""
    assert list(folder.iterdir()) == []


def test_online_without_a_key_warns_once_and_never_asks_a_terminal(tmp_path):
    pty = pytest.importorskip("pty")
    _, command, environ = track(tmp_path, "online")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, env=environ | {"TERM": "xterm"}, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    # Reading a terminal that its last process has left is an error on Linux, an empty read elsewhere.
    try:
        while chunk := os.read(ours, 4096):
            seen += chunk
    except OSError:
        pass
    os.close(ours)
    assert process.wait() == 0
    (line,) = seen.decode().splitlines()
    assert line.startswith("WARNED Weights & Biases tracking stopped (no API key was found: run `wandb login`")


def test_offline_calls_nobody(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        _, out, err = output(tmp_path, "offline", WANDB_API_KEY=KEY, WANDB_BASE_URL=url)
        silent.settimeout(0.1)
        with pytest.raises(TimeoutError):
            silent.accept()
    assert (out, err) == ("", "")


def test_a_server_that_does_not_answer_costs_one_warning(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        _, out, err = output(
            tmp_path, "auto", before="tracking.INIT_SECONDS = 1.0", WANDB_API_KEY=KEY, WANDB_BASE_URL=url
        )
    (line,) = out.splitlines()
    assert line.startswith("WARNED Weights & Biases tracking stopped (")
    assert err == ""


def test_the_key_stays_out_of_the_run_folder(tmp_path):
    folder, _, _ = output(tmp_path, "offline", WANDB_API_KEY=KEY)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_rows_reach_the_disk_while_the_run_lives(tmp_path):
    folder, command, environ = track(tmp_path, "offline", after="import time; time.sleep(600)")
    process = subprocess.Popen(command, env=environ)
    try:
        # wandb's default would keep them in memory for 15 s after the first.
        deadline = time.monotonic() + 12
        while time.monotonic() < deadline and len(found := [row for log in records(folder) for row in rows(log)]) < 9:
            time.sleep(0.2)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(found) == 9


def test_a_real_run_brings_its_worst_images_and_its_weights(small_set, tmp_path):
    config = {"data": str(small_set), "model": "test_convnext", "head": "plain", "pretrained": False, "size": 32}
    config |= {"batch": 8, "epochs": 1, "freeze_epochs": 0, "lr": 4e-3, "wandb": "offline", "workers": 0}
    folder = fine_tune(TrainConfig.from_dict(config | {"runs": str(tmp_path)}), Console(file=io.StringIO())).folder
    (log,) = finished(folder)
    (end,) = (row for row in rows(log) if "top_losses_table/nrows" in row)
    assert end["top_losses_table/nrows"] == 9
    for name in ("confusion", "confused", "top_losses"):
        assert end[f"{name}/_type"] == "image-file"
    sent = {
        record.artifact.name.partition("-")[0] + record.artifact.name[-5:]: {
            entry.path: entry.local_path for entry in record.artifact.manifest.contents
        }
        for record in log
        if record.WhichOneof("record_type") == "artifact"
    }
    (worst,) = (files for name, files in sent.items() if name == "runtable" and len(files) > 2)
    table = json.loads(Path(worst.pop("top_losses_table.table.json")).read_text())
    assert table["columns"] == ["image", "path", "actual", "predicted", "loss", "probability"]
    losses = read(folder / "journal.jsonl")[-1]["top_losses"]
    assert [row[1:] for row in table["data"]] == [list(row.values()) for row in losses]
    assert [(row[0]["width"], row[0]["height"]) for row in table["data"]] == [(32, 32)] * 9
    assert len(worst) == 9 and all(Path(file).is_relative_to(folder / "wandb") for file in worst.values())
    (weights,) = (files for name, files in sent.items() if name.startswith("model"))
    # Those are sent from where they lie.
    assert weights == {n: str(folder / n) for n in ("best.safetensors", "config.json", "model.safetensors")}


def test_a_sweep_names_its_runs(tmp_path):
    folder, _, _ = output(tmp_path, "offline", WANDB_RUN_ID="abc123", WANDB_SWEEP_ID="s")
    assert (folder / "wandb-id").read_text() == "abc123"
    assert next(folder.glob("wandb/offline-run-*")).name.endswith("-abc123")


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/wandb").touch()  # where its folder would be
    _, out, _ = output(tmp_path, "offline")
    (line,) = out.splitlines()
    assert line.startswith("WARNED Weights & Biases tracking stopped (")


def test_a_full_disk_costs_one_warning_at_most(tmp_path):
    (tmp_path / "run/wandb").mkdir(parents=True)
    with small_disk(tmp_path / "run/wandb", 1), (tmp_path / "run/wandb/filler").open("wb", buffering=0) as filler:
        with suppress(OSError):
            while True:
                filler.write(bytes(4096))
        _, out, _ = output(tmp_path, "offline")
    assert len(out.splitlines()) <= 1
    assert all(line.startswith("WARNED Weights & Biases tracking stopped (") for line in out.splitlines())
