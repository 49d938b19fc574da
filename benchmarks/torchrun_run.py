"""Our training under torchrun, without Ray: the processes that `benchmarks.startup` starts.

    torchrun --nproc-per-node 2 -m benchmarks.torchrun_run --config FILE

The first rank prepares the run, as the command does where Ray starts the workers.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from trainer.arrival import Arrival
from trainer.config import TrainConfig
from trainer.ranks import Ranks
from trainer.run_folder import RunFolder
from trainer.starting import POLL


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    config = TrainConfig.read(parser.parse_args().config)
    ranks = Ranks(
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
        local_world_size=int(os.environ["LOCAL_WORLD_SIZE"]),
    )
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    dist.init_process_group("nccl" if ranks.device.type == "cuda" else "gloo")
    met = time.time()
    from trainer.prepare import prepare
    from trainer.worker import run

    arrival = Arrival(met=met)
    assert config.name is not None
    folder = RunFolder(config.runs / config.name)
    if ranks.rank == 0:
        prepare(config, Console())
    while not folder.config.exists():
        time.sleep(POLL)
    run(folder.path, "train", ranks, arrival=arrival)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
