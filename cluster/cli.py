"""The `onewarp` command."""

from __future__ import annotations

import sys
from typing import Annotated

import tyro
from rich.console import Console

from cluster import bench
from cluster.apply import evaluate, predict
from cluster.doctor import doctor
from cluster.export import check_export, export
from cluster.look import show_batch, summarise
from cluster.pack import pack
from cluster.report import report
from cluster.scan import scan
from cluster.sync import wandb_sync
from pipelines.errors import UserError
from trainer.config import TrainConfig
from trainer.stopping import StoppedError

Flags = Annotated[TrainConfig, tyro.conf.arg(name="")]


def train(config: Flags) -> None:
    """Fine-tune a classifier on a folder of images, on all GPUs or CPU cores of this machine.

    Scans the images, finds a learning rate, trains the head and then everything, validates after each epoch,
    and leaves plots, checkpoints, the journal and an offline wandb run in runs/<name>/.
    """
    from trainer.job import fine_tune, summary  # which takes seconds

    console = Console()
    summary(fine_tune(config, console), config, console)


def find_rate(config: Flags) -> None:
    """Run the learning-rate range test alone, and plot its curve with suggested rates."""
    from trainer.job import lr_find  # which takes seconds

    console = Console()
    found = lr_find(config, console)
    for method, lr in found.suggestions.items():
        console.print(f"{method:8s}  {lr:.2e}", highlight=False)
    console.print(f"plot      {found.folder / 'lr_find.png'}", highlight=False, soft_wrap=True)


def main() -> None:
    """Entry point: a user's mistake is one paragraph and exit code 2, Ctrl-C is 130."""
    try:
        verb, words = sys.argv[1:2], sys.argv[2:]
        if verb == ["bench"]:
            bench.main(words)
            return
        if verb == ["doctor"] and words and not words[0].startswith("-"):  # of a folder
            bench.measure("bottleneck", ["--data", *words], "onewarp doctor")
            return
        tyro.extras.subcommand_cli_from_dict(
            {
                "train": train,
                "lr-find": find_rate,
                "evaluate": evaluate,
                "predict": predict,
                "export": export,
                "check-export": check_export,
                "scan": scan,
                "pack": pack,
                "show-batch": show_batch,
                "summary": summarise,
                "report": report,
                "wandb-sync": wandb_sync,
                "doctor": doctor,
                "bench": bench.bench,
            },
            prog="onewarp",
            description="Distributed training of image classifiers: one warp an image, every rank fed.",
        )
    except UserError as error:
        Console(stderr=True).print(f"onewarp: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except StoppedError as stopped:
        told = f"onewarp: {stopped}; the same command with the run's --name goes on from there"
        Console(stderr=True).print(told, markup=False, highlight=False, soft_wrap=True)
        sys.exit(stopped.exit_code)
    except KeyboardInterrupt:
        told = "interrupted; the same command with the run's --name goes on from its last checkpoint"
        Console(stderr=True).print(told)
        sys.exit(130)


if __name__ == "__main__":
    main()
