"""The `onewarp` command."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from cluster import bench, help
from cluster.apply import evaluate, predict
from cluster.doctor import doctor
from cluster.export import check_export, export
from cluster.look import show_batch, summarise
from cluster.output import Output
from cluster.pack import pack
from cluster.report import report
from cluster.scan import scan
from cluster.sync import wandb_sync
from pipelines.errors import UserError
from trainer.config import TrainConfig
from trainer.stopping import StoppedError, WorkersError

Flags = Annotated[TrainConfig, tyro.conf.arg(name="")]
Shown = Annotated[Output, tyro.conf.arg(name="")]


def train(config: Flags, output: Shown) -> None:
    """Fine-tune a classifier on a folder of images, on all GPUs or CPU cores of this machine.

    Scans the images, finds a learning rate, trains the head and then everything, validates after each epoch,
    and leaves plots, checkpoints, the journal and an offline wandb run in runs/<name>/.
    """
    console = output.console()
    from trainer.job import fine_tune, summary  # which takes seconds

    summary(fine_tune(config, console, output.on_event()), config, console)


def find_rate(config: Flags, output: Shown) -> None:
    """Run the learning-rate range test alone, and plot its curve with suggested rates."""
    console = output.console()
    from trainer.job import lr_find  # which takes seconds

    found = lr_find(config, console, output.on_event())
    for method, lr in found.suggestions.items():
        console.print(f"{method:8s}  {lr:.2e}", highlight=False)
    console.print(f"plot      {found.folder / 'lr_find.png'}", highlight=False, soft_wrap=True)


def completion(shell: tyro.conf.Positional[Literal["bash", "zsh", "fish", "tcsh"]]) -> None:
    """Print what lets a shell complete verbs and flags: `source <(onewarp completion bash)`."""
    tyro.extras.subcommand_cli_from_dict(VERBS, prog="onewarp", args=["--tyro-print-completion", shell])


VERBS: dict[str, Callable[..., None]] = {
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
    "completion": completion,
}
HELP = ("-h", "--help")
FOLDER_FIRST = ("train", "lr-find")  # `train DIR` is `train --data DIR`


def _act(words: Sequence[str]) -> None:
    """Do what the words after `onewarp` say."""
    console = Console()
    if not words or words[0] in HELP:
        help.verbs(VERBS, console)
        return
    verb, *rest = words
    if verb not in VERBS:
        raise UserError(f"There is no verb {verb!r}. {help.meant(verb, VERBS)}")
    if verb == "bench":
        bench.main(rest)
    elif verb == "doctor" and (of_folder := _of_folder(rest)):
        bench.measure("bottleneck", of_folder, "onewarp doctor")
    elif verb in help.LONG and set(HELP) & set(rest):
        help.short(verb, VERBS[verb], console)
    else:
        if verb in FOLDER_FIRST and rest and not rest[0].startswith("-"):
            rest = ["--data", *rest]
        args = ["--help" if verb in help.LONG and word == help.ALL else word for word in rest]
        act: Callable[..., Any] = VERBS[verb]
        tyro.cli(act, prog=f"onewarp {verb}", args=args)


def _of_folder(words: Sequence[str]) -> list[str] | None:
    """The flags of the benchmark behind `doctor DIR`, whose folder comes first or last; None where there is none."""
    if not words or "--cluster" in words:
        return None
    if not words[0].startswith("-"):
        return ["--data", *words]
    if "--data" in words:
        return list(words)
    return [*words[:-1], "--data", words[-1]] if Path(words[-1]).is_dir() else None


def _to_go_on(words: Sequence[str], name: str) -> str:
    """The command that goes on with the run that `words` began."""
    kept = [word for word in words if word != "--restart"]
    if not any(word.partition("=")[0] == "--name" for word in kept):
        kept += ["--name", name]
    return shlex.join(["onewarp", *kept])


def main() -> None:
    """Entry point: a user's mistake is one paragraph and exit code 2, Ctrl-C is 130."""
    told = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    words = sys.argv[1:]
    try:
        _act(words)
    except UserError as error:
        told.print(f"onewarp: {error}", style="red")
        sys.exit(2)
    except WorkersError as error:
        told.print(f"{error}", style="red")
        goes_on = (
            " more often than --restarts has them started again. When what ails them is mended, the same command with "
            "the run's --name goes on from its last checkpoint."
        )
        told.print(f"onewarp: the workers failed{goes_on if words[:1] == ['train'] else ''}")
        sys.exit(1)
    except StoppedError as stopped:
        told.print(f"onewarp: {stopped}")
        if stopped.run is not None:
            told.print(f"go on with  {_to_go_on(words, stopped.run)}")
        sys.exit(stopped.exit_code)
    except KeyboardInterrupt:
        goes_on = words and words[0] in ("train", "lr-find")
        more = "; the same command with the run's --name goes on from its last checkpoint" if goes_on else ""
        told.print(f"interrupted{more}")
        sys.exit(130)


if __name__ == "__main__":
    main()
