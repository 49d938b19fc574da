"""Batches for one rank: the plan says which samples, the geometry how each is read, the graph reads them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from pipelines import graph
from pipelines.cache import Cache
from pipelines.errors import UserError
from pipelines.geometry import UNIFORMS, Augment, Centre, Draws, compose, draw, prefilter
from pipelines.images import images_of
from pipelines.manifest import Samples
from pipelines.plan import Plan, rank_slice, uniforms
from pipelines.standin import Spoiled, Watch
from pipelines.window import below, rows

if TYPE_CHECKING:
    from pipelines.reader import Hands, Reader

HALF = (0.5, 0.5, 0.5)


class _Fed(NamedTuple):
    """A batch that the graph has been given."""

    step: int
    positions_N: np.ndarray
    """Of the samples that are read, in the set."""
    images: list[np.ndarray]
    """See `GraphInput`."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's part of a global batch, on the loader's device."""

    step: int
    """Global batch within the epoch."""
    images_NCHW: torch.Tensor
    """Normalised images, in channels_last memory order."""
    labels_N: torch.Tensor
    """Class indices, int64."""
    ids_N: torch.Tensor
    """Row numbers in the manifest, int64, always on the CPU."""


class Loader:
    """Reads any epoch of a set of samples, from any step, for one rank.

    Args:
        samples: one part of a manifest's split, in files or in a store.
        size: height and width of the images, pixels.
        global_batch: samples in a step over all ranks.
        seed: seed of order and augmentation.
        rank, world_size: which slice of each global batch this loader reads.
        augment: training augmentation, in an order of its own each epoch. Or how validation reads, in the order of the
            samples, to the last one; `None` is `Centre()`.
        quality: "high" reads each output pixel at 2 x 2 points instead of one, at four times the cost of the warp.
        weights_N: how often training sees each sample, in proportion; see `Plan` and `plan.balanced`.
        repeats: how often, in a row and each time augmented anew, training sees a sample; see `Plan`.
        each_once: read each sample once and in order, to the last one, as validation does, with training augmentation
            too: test-time augmentation.
        drop_last: leave out the last incomplete global batch of a training epoch.
        cache: takes the pixels of each image as it is decoded, and gives them back from the second time on.
        device: "cpu" or "gpu".
        device_id: index of the GPU, with `device="gpu"`.
        threads: CPU threads that read and decode.
        mean, std: of the model's training data, for values in [0, 1].
        half: float16 images instead of float32.
        on_batch: called whenever a batch is ready.

    Raises:
        UserError: batch, ranks, weights or repeats do not fit the samples or one another, or the store is damaged.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        size: int,
        global_batch: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        augment: Augment | Centre | None = None,
        quality: graph.Quality = "normal",
        weights_N: np.ndarray | None = None,
        repeats: int = 1,
        each_once: bool = False,
        drop_last: bool = True,
        cache: Cache | None = None,
        device: graph.Device = "cpu",
        device_id: int = 0,
        threads: int = 2,
        mean: tuple[float, ...] = HALF,
        std: tuple[float, ...] = HALF,
        half: bool = False,
        on_batch: Callable[[], None] = lambda: None,
    ) -> None:
        training = isinstance(augment, Augment) and not each_once
        if training and global_batch > len(samples):
            raise UserError(
                f"The batch of {global_batch} is larger than the {len(samples)} training images. "
                f"Choose --batch {max(2, len(samples) // 4)} or less."
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of a world of {world_size}")
        if training and global_batch < world_size:
            raise UserError(
                f"A global batch of {global_batch} leaves some of the {world_size} workers without an image. "
                f"Choose a batch of at least {world_size}, or fewer workers."
            )
        self.samples, self.size, self.augment, self.seed = samples, size, augment, seed
        self.rank, self.world_size = rank, world_size
        self._training, self._on_batch = training, on_batch
        self.plan = Plan(
            n=len(samples),
            global_batch=global_batch,
            seed=seed,
            shuffle=training,
            drop_last=training and drop_last,
            weights_N=weights_N,
            repeats=repeats,
        )
        self._points = size if quality == "normal" else 2 * size
        self._device = torch.device("cuda", device_id) if device == "gpu" else torch.device("cpu")
        self._mean_3, self._std_3 = np.asarray(mean, np.float64), np.asarray(std, np.float64)
        self._watch = Watch(samples, threads)
        self._images = images_of(samples, self._watch, cache)
        self._reads_rows = graph.reads_rows(self._images.kind, device)
        self._options: dict[str, Any] = {
            "size": size,
            "device": device,
            "device_id": device_id,
            "threads": threads,
            "quality": quality,
        }
        self._statistics = {"mean": mean, "std": std}
        self._threads = threads
        self._hands: Hands | None = None
        self._batch_options: dict[str, Any] = {"size": size, "batch": -(-global_batch // world_size), "half": half}
        self._warp_options: dict[str, Any] = {
            "kind": self._images.kind,
            "padding": augment.padding if isinstance(augment, Augment) else "reflect",
            "quality": quality,
        }
        self._graph_options: dict[str, Any] = (
            self._batch_options
            | self._warp_options
            | {
                "device": "gpu",
                "device_id": device_id,
                "threads": threads,
                "largest": (int(samples.heights_N.max(initial=0)), int(samples.widths_N.max(initial=0))),
            }
        )

    @property
    def steps(self) -> int:
        """Global batches in an epoch."""
        return self.plan.steps

    def draws(self, epoch: int, positions_N: np.ndarray, occurrences_N: np.ndarray | None = None) -> Draws:
        """The random parameters of the samples at `positions_N` in `epoch`, when it sees them for the n-th time."""
        ids_N = self.samples.ids_N[positions_N]
        return draw(self.augment, uniforms(self.seed, epoch, ids_N, UNIFORMS, occurrences_N))

    @property
    def spoiled(self) -> tuple[Spoiled, ...]:
        """Samples of this rank whose files have gone bad since the scan, as far as they came up.

        In training each has a stand-in (see `standin`), where each is read once it is left out.
        """
        return self._watch.spoiled

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """This rank's batches of `epoch` from `start_step` on; closing the iterator early is free of side effects."""
        pipeline, ahead = self._start(epoch, start_step)
        # On a GPU a batch belongs to torch's stream: torch's kernels wait for DALI's without the host's help, and the
        # memory of a batch that Python drops is used again only behind the kernels already queued to read it.
        streams = [torch.cuda.current_stream(self._device)] if self._device.type == "cuda" else []
        while True:
            try:
                images, *whole = pipeline.run(*streams)
            except StopIteration:
                return
            except RuntimeError:
                # One image that cannot be decoded fails its batch and ends the pipeline: the same step, without it.
                self._images.explain([image for fed in ahead for image in fed.images])
                if not self._watch.blame([position for fed in ahead for position in fed.positions_N.tolist()]):
                    raise
                pipeline, ahead = self._start(epoch, ahead[0].step)
                continue
            fed = ahead.popleft()
            if whole:
                self._images.keep(fed.positions_N, fed.images, whole[0])
            images_NHWC = images if isinstance(images, torch.Tensor) else torch.from_dlpack(images.as_tensor())
            labels_N, ids_N = self.samples.labels_N[fed.positions_N], self.samples.ids_N[fed.positions_N]
            self._on_batch()
            yield Batch(
                step=fed.step,
                images_NCHW=images_NHWC.permute(0, 3, 1, 2),  # the memory stays NHWC: torch's channels_last
                labels_N=torch.from_numpy(labels_N).to(self._device, non_blocking=True),
                ids_N=torch.from_numpy(ids_N),
            )

    def _start(self, epoch: int, step: int) -> tuple[graph.Pipeline | Reader, deque[_Fed]]:
        """A pipeline that reads from `step` on, and what it has been given and not yet returned."""
        # It is cheap to build (tens of milliseconds), and one that is not reused has nothing to reset.
        ahead: deque[_Fed] = deque()
        source = self._source(epoch, step, ahead)
        if self._device.type == "cpu":
            from pipelines.reader import Hands, Reader  # compiling takes a second, and a GPU needs nothing of it

            if self._hands is None:
                self._hands = Hands(self._threads, **self._warp_options)
            return Reader(source, self._hands, **self._batch_options), ahead
        return graph.build(source, **self._graph_options), ahead

    def _source(self, epoch: int, start_step: int, ahead: deque[_Fed]) -> Iterator[graph.GraphInput]:
        for step in range(start_step, self.steps):
            entries = self.plan.entries(epoch, step)
            planned_N, occurrences_N = (rank_slice(part, self.rank, self.world_size) for part in entries)
            if self._training:
                positions_N = self._watch.stand_ins(planned_N)
            else:
                readable_N = self._watch.readable(planned_N)
                planned_N, occurrences_N = planned_N[readable_N], occurrences_N[readable_N]
                positions_N = planned_N
            if len(positions_N) == 0:  # the tail of a validation set may be smaller than the world
                continue
            batch = self._graph_input(positions_N, self.draws(epoch, planned_N, occurrences_N))
            ahead.append(_Fed(step, positions_N, batch.images))
            yield batch

    def alone(self, samples: Samples) -> Loader:
        """A loader that reads `samples` by validation geometry, on one rank, in one batch."""
        centre = None if isinstance(self.augment, Augment) else self.augment
        return Loader(samples, global_batch=len(samples), augment=centre, **self._options, **self._statistics)

    def pictures(self, batch: Batch) -> np.ndarray:
        """The images of a batch as a person sees them, uint8 [N, H, W, 3]."""
        images_NHWC = batch.images_NCHW.permute(0, 2, 3, 1).float().cpu().numpy()
        return (255 * (images_NHWC * self._std_3 + self._mean_3)).round().clip(0, 255).astype(np.uint8)

    def _graph_input(self, positions_N: np.ndarray, draws: Draws) -> graph.GraphInput:
        heights_N, widths_N = self.samples.heights_N[positions_N], self.samples.widths_N[positions_N]
        matrix_N33 = compose(draws, heights_N, widths_N, self._points)
        shrunk_N2, matrix_N33 = prefilter(matrix_N33, heights_N, widths_N, self._points)
        # The filter that shrinks an image reads beyond the rows of the warp: where it is at work, all of them.
        rows_N2 = np.stack([np.zeros_like(heights_N), heights_N], axis=1)
        if self._reads_rows:
            rows_N2 = np.where(shrunk_N2[:, :1] > 0, rows_N2, rows(matrix_N33, heights_N, self._points))
        matrix_N33 = below(matrix_N33, rows_N2[:, 0])
        # normalised = (((x / 255 - 0.5) * contrast + 0.5 + brightness) - mean) / std = (x - shift) / scale
        contrast_N1, brightness_N1 = draws.contrast_N[:, None], draws.brightness_N[:, None]
        scale_N3 = 255.0 * self._std_3 / contrast_N1
        shift_N3 = 255.0 * (0.5 + (self._mean_3 - 0.5 - brightness_N1) / contrast_N1)
        images, paths = self._images.of(positions_N, rows_N2)
        return graph.GraphInput(
            images=images,
            paths=paths,
            shrunk_N2=shrunk_N2.astype(np.float32),
            matrix_N33=matrix_N33.astype(np.float32),
            shift_N3=shift_N3.astype(np.float32),
            scale_N3=scale_N3.astype(np.float32),
            rows_N2=rows_N2.astype(np.int32),
        )
