"""Weights & Biases as one more reader of the journal. The only file that imports `wandb`."""

from __future__ import annotations

import itertools
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipelines import preprocess
from trainer import journal
from trainer.run_folder import RunFolder

if TYPE_CHECKING:
    import wandb

INIT_SECONDS = 20.0  # to reach the server
FINISH_SECONDS = 60.0  # to upload what is left at the end; what does not make it can be synced later
PICTURES = ("show_batch", "lr_find", "confusion", "confused", "top_losses")  # <name>.png in the run folder

DATA_FOLDER = "WANDB_DATA_DIR"

TrackingMode = Literal["auto", "off", "offline", "online"]


class Tracker:
    """Sends the events of a run's journal to Weights & Biases.

    `mode` "auto" is online where the user is logged in and offline elsewhere (`WANDB_MODE` overrides it).
    Nothing here ends or holds up a run: there is no prompt, connecting is bounded by `INIT_SECONDS` and the
    last upload by `FINISH_SECONDS`, and at the first failure `warnings` gets one sentence and tracking stops.
    What is missing can be sent later, from the offline folder or from the journal: a `patient` tracker takes as long as
    that takes, and sends the weights again (those that are there cost nothing).

    After a restart it does not matter whether the events come from the journal's beginning or only the new
    ones: the tracker reads what was before. The id of the wandb run is kept in `<run_folder>/wandb-id`, and an
    event's place in the journal is its wandb step, so that what the server has already is left out; an
    offline restart writes a new folder, complete in itself. The charts use our own steps: `global_step`,
    `epoch`, and the learning rate of the range test.
    """

    _ours: str | None = None  # the value of `DATA_FOLDER` that the last of them has set

    def __init__(
        self,
        run_folder: Path,
        mode: TrackingMode,
        project: str = "onewarp",
        *,
        warnings: Callable[[str], None],
        patient: bool = False,
    ) -> None:
        self._patient = patient
        self._folder = run_folder.absolute()
        self._journal = RunFolder(self._folder).journal
        self._mode = mode
        self._project = project
        self._warn = warnings
        self._run: wandb.Run | None = None
        self._is_off = mode == "off"
        self._place = -1  # of the current event in the journal
        self._known = 0  # places below this one are on the server already
        self._global_step: int | None = None
        self._exit_code = 1  # until it has come to its end
        self._goal = "train"
        self._config: Mapping[str, Any] = {}
        self._warned = False

    def on(self, event: Mapping[str, Any]) -> None:
        """Track one event of the journal. The first `run` event connects, which may take `INIT_SECONDS`."""
        self._place += 1
        if not self._is_off:
            self._guard(lambda: self._track(event))

    def close(self) -> None:
        """Upload what is left, for at most `FINISH_SECONDS`, and end the wandb run. Can be called twice."""
        run, self._run, self._is_off = self._run, None, True
        if run is not None:
            self._guard(lambda: run.finish(exit_code=self._exit_code))

    def _guard(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            # Whatever wandb raises, the run is worth more than its tracking.
            self._is_off, warned, self._warned = True, self._warned, True
            if warned:  # ending it fails as it did
                return
            reason = " ".join(str(error).split()) or type(error).__name__
            self._warn(
                f"Weights & Biases tracking stopped ({reason.rstrip('.')}); "
                + (
                    "the same command again sends what is missing."
                    if self._patient
                    else "the run goes on, and `onewarp wandb-sync` sends what is missing from its journal."
                )
            )

    def _track(self, event: Mapping[str, Any]) -> None:
        match event["event"]:
            case "run":
                self._on_run(event)
            case "range_step":
                self._log({f"range_test/{key}": event.get(key) for key in ("lr", "loss", "smoothed")})
            case "range_result":
                self._summarise({f"suggested_lr/{name}": lr for name, lr in event["suggestions"].items()})
                if event["chosen"] is not None:
                    self._summarise({"chosen_lr": event["chosen"]})
                if self._goal == "lr-find":
                    self._exit_code = 0
            case "step":
                self._global_step = event["step"]
                values = {
                    f"train/{key}": event.get(key) for key in ("loss", "grad_norm", "images_per_second", "data_wait")
                }
                # Layer groups from the first layers to the head.
                rates = {f"lr/group_{index}": lr for index, lr in enumerate(event["lr"])}
                self._log({"global_step": event["step"]} | values | rates)
            case "epoch":
                keys = ("train_loss", "valid_loss", "error_rate", "top5_accuracy", "macro_f1", "calibration_error")
                keys += ("images_per_second", "seconds")
                values = {f"epoch/{key}": event.get(key) for key in keys}
                self._log({"epoch": event["epoch"], "global_step": self._global_step} | values)
            case "finished":
                self._on_finished(event)
                self._exit_code = 0

    def _on_run(self, event: Mapping[str, Any]) -> None:
        self._exit_code, self._goal, self._config = 1, event.get("command", "train"), event["config"]
        facts = {key: value for key, value in event.items() if key not in ("event", "time", "config", "name")}
        config = {**event["config"], "run": facts}
        if self._run is not None:  # the workers restarted, this process did not
            self._run.config.update(config, allow_val_change=True)
            return
        # wandb's reports about itself call its server even offline, and hold up the exit by 10 s where that
        # is not reached. Who wants to send them sets the variable.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        if os.environ.get(DATA_FOLDER) in (None, self._ours):  # what it sends later, and would leave in the home folder
            Tracker._ours = os.environ[DATA_FOLDER] = str(self._folder / "wandb")
        import wandb  # half a second, which only runs that track pay for

        wandb.setup(wandb.Settings(silent=True))
        mode = _resolve(self._mode)
        if mode == "disabled":
            self._is_off = True
            return
        self._run = run = wandb.init(
            project=self._project,
            id=self._id(),
            name=event["name"],
            dir=str(self._folder),
            config=config,
            mode=mode,
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=INIT_SECONDS,
                finish_timeout=0.0 if self._patient else FINISH_SECONDS,
                finish_timeout_raises=True,  # else nobody hears that something is missing
                # By default rows may stay 15 s in memory, where the end of a killed run is lost.
                x_transaction_log_flush_interval=1,
            ),
        )
        run.define_metric("global_step", hidden=True)
        run.define_metric("epoch", hidden=True)
        run.define_metric("range_test/lr", hidden=True)
        for name in ("train/*", "lr/*"):
            run.define_metric(name, step_metric="global_step")
        run.define_metric("epoch/*", step_metric="epoch")
        for name in ("loss", "smoothed"):
            run.define_metric(f"range_test/{name}", step_metric="range_test/lr")
        self._known, self._place = run.step, 0
        for past in itertools.takewhile(lambda past: past != event, journal.read(self._journal)):
            if past["event"] != "run":
                self._track(past)
            self._place += 1

    def _on_finished(self, event: Mapping[str, Any]) -> None:
        import wandb

        pictures = {name: RunFolder(self._folder).figure(name) for name in PICTURES}
        values: dict[str, Any] = {name: wandb.Image(str(path)) for name, path in pictures.items() if path.exists()}
        if event["most_confused"]:
            values["most_confused"] = wandb.Table(
                columns=["actual", "predicted", "count"], data=[list(row) for row in event["most_confused"]]
            )
        if rows := event.get("top_losses"):
            thumbnails = self._thumbnails([row["path"] for row in rows])
            values["top_losses_table"] = wandb.Table(
                columns=["image", *rows[0]],
                data=[[image, *row.values()] for image, row in zip(thumbnails, rows, strict=True)],
            )
        self._log(values)
        self._keep_weights()
        self._summarise({key: event.get(key) for key in ("error_rate", "valid_loss", "seconds")})
        self._summarise({f"best/{key}": value for key, value in (event.get("best") or {}).items()})

    def _thumbnails(self, paths: Sequence[str]) -> Iterator[wandb.Image | None]:
        """Images of the run's as validation sees them; none where a file is not to be had here."""
        import wandb

        for path in paths:
            try:
                image = preprocess.upright(Path(self._config["data"], path))
            except OSError:
                yield None
            else:
                yield wandb.Image(preprocess.sampled(image, self._config).round().astype(np.uint8))

    def _keep_weights(self) -> None:
        """The weights as an artifact: sent from where they lie, and not copied before."""
        import wandb

        folder = RunFolder(self._folder)
        known = self._place < self._known and not self._patient
        if self._run is None or known or not folder.model.exists():
            return
        artifact = wandb.Artifact(f"model-{self._run.id}", type="model")
        for file in (folder.model, folder.best, folder.config):
            if file.exists():
                artifact.add_file(str(file), policy="immutable")
        self._run.log_artifact(artifact)

    def _log(self, values: Mapping[str, Any]) -> None:
        run = self._run
        known = {key: value for key, value in values.items() if value is not None}
        if run is not None and known and self._place >= self._known:
            run.log(known, step=self._place, commit=True)

    def _summarise(self, values: Mapping[str, Any]) -> None:
        if self._run is not None:
            self._run.summary.update(dict(values))

    def _id(self) -> str:
        path = self._folder / "wandb-id"
        if not path.exists() and (given := os.environ.get("WANDB_RUN_ID")):  # of a sweep
            path.write_text(given, encoding="utf-8")
        if path.exists() and (known := path.read_text(encoding="utf-8").strip()):
            return known
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(new := uuid.uuid4().hex[:12], encoding="utf-8")
        return new


def _resolve(mode: TrackingMode) -> Literal["online", "offline", "disabled"]:
    import wandb

    wish = os.environ.get("WANDB_MODE", "") if mode == "auto" else mode
    if wish in ("offline", "dryrun"):
        return "offline"
    if wish == "disabled":
        return "disabled"
    # wandb's own search (environment, settings, netrc), and the only one of its doors that never asks.
    if wandb.login(prompt=False, verify=False):
        return "online"
    if mode == "online":
        raise RuntimeError("no API key was found: run `wandb login`, or track offline")
    return "offline"


def replay(folder: RunFolder, mode: TrackingMode, warnings: Callable[[str], None]) -> None:
    """Track a run that is over, or goes on, from its journal: what the server has already is not sent again.

    Raises:
        UserError: there is no run.
    """
    events = journal.of_run(folder.journal)
    tracker = Tracker(folder.path, mode, warnings=warnings, patient=True)
    for event in itertools.dropwhile(lambda event: event["event"] != "run", events):
        tracker.on(event)
    tracker.close()
