"""Everything a run is told, in one frozen object; the command line is generated from it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from pipelines.errors import UserError, first_line
from pipelines.geometry import Augment
from trainer.crew import Crew
from trainer.micro import share
from trainer.schedule import rates_in_words, read_rates
from trainer.sizes import read_sizes, size_of_each_epoch

SIZES = (32, 1024)

OnNan = Literal["stop", "skip", "rewind"]
Compression = Literal["none", "bf16", "fp16"]
Goal = Literal["train", "lr-find"]


class Default(int):
    """A number that nobody gave: `--sizes` replaces it, and contradicts one that was given."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What to train, on what, and how. Every field is a flag of the same name."""

    data: str = "breeds"
    """Folder of images; or `breeds`, the embedded set; or `pets`, the Oxford-IIIT pets (800 MB download)."""
    label_regex: str | None = None
    """Labels from file names: the first group of this regular expression, as in '(.+)_\\d+\\.jpg$'."""
    label_csv: Path | None = None
    """Labels from a CSV file with the columns path,label[,split]; paths are relative to the data folder."""
    valid_fraction: float = 0.2
    """Share of the images held out where the data brings no split of its own."""
    split_seed: int = 42
    """Seed of that split."""

    subset: float = 1.0
    """Share of each class to use, for a quick try; of training and validation alike."""
    sampling: Literal["each", "balanced"] = "each"
    """`each`: an epoch sees each image once. `balanced`: each class equally often, in as many images."""
    repeats: int = 1
    """Repeated augmentation: how often a batch holds each of its images, augmented anew. An epoch then sees as many
    times fewer images. Divides --batch."""
    augment: Augment = field(default_factory=Augment)
    """What training does to an image. Defaults: those of fastai's `aug_transforms`, with presizing."""
    crop_pct: float = 1.0
    """Validation reads the centred square whose side is this share of the shorter side."""
    quality: Literal["normal", "high"] = "normal"
    """`high` reads each pixel at 2 x 2 points: sharper and cleaner, and a slower warp."""
    cache: Literal["off", "decoded"] = "off"
    """`decoded` keeps each image's pixels on the local disk ($ONEWARP_CACHE) while a first epoch decodes them."""
    cache_limit: float | None = None
    """Most GB that the cache takes on each machine. Default: half of what is free on that disk."""
    cache_keep: bool = False
    """Keep the cache for the next run on the same images."""

    model: str = "tf_efficientnet_lite0"
    """Body: the name of any classifier of torchvision or timm, convolutions, transformers and mixers alike, with timm's
    tag of the weights if need be, as vit_tiny_patch16_224.augreg_in21k. One made for a fixed size is made for --size.
    The default needs no download."""
    pretrained: bool = True
    """Start from the body's published weights."""
    weights: Path | None = None
    """Start from this file instead (.safetensors, .pth): a state dict of the body, or the model of an earlier run,
    whose head is left out where the classes are others."""
    head: Literal["fastai", "plain"] = "fastai"
    """`fastai`: concat pooling, batch-norm, dropout, two linear layers. `plain`: average pooling, one linear layer."""

    layer_groups: tuple[str, ...] = ()
    """Layer groups by name, from the input to the head: a regular expression of parameter names for each. Default: by
    the body's stages."""

    size: int = Default(160)
    """Training and validation images are squares of this many pixels."""
    sizes: str | None = None
    """Progressive resizing, as in 128:3,160:3,224:2. SIZE:EPOCHS with the whole model, one after the other in a single
    cycle; instead of --epochs (their sum) and --size (the last). What comes before, frozen epochs and range test, has
    the first size. Every epoch is judged at the last, so that they can be compared."""
    batch: int | Literal["auto"] = 64
    """Images in a step, over all workers. `auto`: as many as the memory holds, with at least 20 steps an epoch and at
    most 1,024 images a worker; two steps are tried at three sizes first. A resumed run keeps its number."""
    micro_batch: int | None = None
    """Most images that a worker computes at once: its part of a batch is split, and gradients are summed. Less memory
    for the same step; batch-norm sees the parts. Default: the whole part, or with --workers LEAST:MOST the part of a
    worker where there are the most (but for --sync-bn, which sees the whole batch)."""
    schedule: Literal["fine-tune", "one-cycle", "flat-cos", "warmup-linear"] = "fine-tune"
    """`fine-tune`: the head alone, then everything with rates that rise towards the head, each by one cycle. The others
    train everything at one rate from the first epoch on, as suits training from scratch."""
    epochs: int = Default(3)
    """Epochs with the whole model, after those with the head alone. There is no early stopping: the rate comes down
    only at the end of the whole cycle, and weights from its middle have not been annealed. Where fewer epochs would
    have been better, the run says so at its end, and how many to train again with."""
    freeze_epochs: int = 1
    """Epochs of `fine-tune` with the head alone, first."""
    freeze_to: int = 0
    """With the other schedules: the first layer group that learns, negative from the end: -1 is the head alone.
    (fastai's `freeze_to`.)"""
    train_bn: bool = True
    """Let the batch-norms of a frozen body go on learning."""
    sync_bn: bool = False
    """Batch-norm over the images of all workers together. Default: each worker has the statistics of its own images."""
    lr: float | str | None = None
    """Peak learning rate of the head. With a schedule that freezes nothing it is that of all layer groups, or LOW:HIGH
    gives them rates in equal ratios from the input to the head, and :HIGH a tenth to all but the head (fastai's
    `slice`, which Python may pass as well). Default: found by a range test over all workers."""
    lr_choice: Literal["balanced", "valley", "steep", "minimum", "slide"] = "balanced"
    """Which suggestion of the range test training takes: one of fastai's four, or `balanced`, the geometric mean of the
    cautious `valley` and the bold `minimum` (a tenth of it)."""
    lr_find_steps: int = 50
    """Most steps of the range test, 20 to 100; it ends when the loss explodes."""
    optimizer: Literal["adamw", "sgd", "lamb"] = "adamw"
    """`sgd` has momentum; `lamb` is for large batches."""
    clip_norm: float | None = None
    """Most length (L2 norm) of the whole gradient; a longer one is shortened to it. Each step's length is then in the
    journal. Default: 1 for `lamb`, else none."""
    layer_decay: float | None = None
    """Rate of each stage of the body over that of the next, for fine-tuning; 0.65 to 0.8 are usual. Default: three
    layer groups, the last at 100 times the rate of the first."""
    loss: Literal["cross-entropy", "focal", "one-vs-rest"] = "cross-entropy"
    """`focal` makes easy images count for little; `one-vs-rest` judges each class by itself: all may decline."""
    label_smoothing: float = 0.0
    """Share of each target that is spread over all classes."""
    focal_gamma: float = 2.0
    """How little, for `focal`; 0 is cross-entropy."""
    class_weights: Literal["none", "inverse", "effective"] = "none"
    """Weigh rare classes more: `inverse` to their number of images, or `effective`, which is milder."""
    mixup: float = 0.0
    """Mix pairs of images; alpha of the shares' Beta distribution, 0.1 to 0.4 are usual, 0 is off."""
    cutmix: float = 0.0
    """Put a box of one image into another; alpha, 1 is usual, 0 is off. With mixup, each pair draws one of the two."""
    ema: float | None = None
    """Judge and keep an average of the weights over updates; its decay, as 0.999. Default: the last weights."""
    weight_decay: float = 0.01
    """Decoupled weight decay; norms and biases have none."""
    seed: int = 0
    """Seed of order, augmentation, initial head and dropout."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """`auto`: bf16 on GPUs that have it, fp16 with loss scaling on older ones, fp32 on CPUs. `tf32`: float32 whose
    products are rounded, on GPUs from Ampere on; `fp32` never is."""
    compile: bool = False
    """Compile the network with torch.compile: minutes at the start, for faster steps. Needs a C++ compiler."""
    channels_last: bool = True
    """Keep images and filters in memory channel by channel within a pixel, as most convolutions are fastest."""
    grad_compression: Compression = "none"
    """Send gradients between workers as `bf16` or `fp16`, half the bytes, for slow networks."""

    checkpoint_every: int = 100
    """Steps from one checkpoint to the next; another is written after each epoch."""
    checkpoint_minutes: float | None = None
    """Minutes from one checkpoint to the next, where that is sooner. Default: steps alone count."""
    restarts: int = 3
    """How often in an epoch workers are started again, from the last checkpoint, when one of them dies or fails."""
    grace: float = 30.0
    """Seconds that workers have to write a checkpoint when Ctrl-C or SIGTERM ends the run."""
    stall: float = 60.0
    """Seconds without a batch after which workers end themselves, to be started again."""
    on_nan: OnNan = "stop"
    """Where the loss is no number, or explodes. `skip`: the batch leaves no trace (in fp16 an explosion stops the run).
    `rewind`: the run goes back to its last checkpoint, and passes the batch over."""
    resume: bool = False
    """The run of this --name is there, and goes on. (It does so without this, too.)"""
    restart: bool = False
    """Begin the run of this --name anew; what it has left is kept under another name."""
    workers: int | str | None = None
    """Processes. LEAST:MOST, as in 2:8, are as many as there is room for: the run goes on with fewer when some are
    lost, and with more when there is room again; its batches stay the same. Default: one for each GPU; without GPUs 2,
    or 1 on one core. 0 runs in this process, without Ray."""
    address: str | None = None
    """Ray cluster to run on: `auto`, HOST:PORT or ray://HOST:PORT. Its machines see the data and the --runs folder
    under the same paths. Default: the one that $RAY_ADDRESS names, as under `ray job submit`; else this machine."""
    threads: int | None = None
    """CPU threads a worker decodes with (on the CPU also computes with). Default: its share of the machine's cores."""
    wandb: Literal["auto", "off", "offline", "online"] = "auto"
    """Weights & Biases. `auto`: online where you have logged in, else offline, into the run's folder."""
    runs: Path = Path("runs")
    """Folder that holds the runs' folders."""
    name: str | None = None
    """Name of the run and its folder; a run that stopped goes on when it is named again. Default: the data's name, date
    and time."""

    def __post_init__(self) -> None:
        # From Python a path may come as a string, and the data folder as a path.
        object.__setattr__(self, "data", str(self.data))
        for name in ("label_csv", "weights", "runs"):
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, Path(value))

        if isinstance(self.lr, slice):
            object.__setattr__(self, "lr", rates_in_words(self.lr))

        def check(good: bool, flag: str, value: object, must: str) -> None:
            if not good:
                raise UserError(f"--{flag} is {value}; it must be {must}.")

        stretches = () if self.sizes is None else read_sizes(self.sizes)
        for flag, value in (("size", self.size), *(("sizes", size) for size, _ in stretches)):
            check(SIZES[0] <= value <= SIZES[1], flag, value, f"between {SIZES[0]} and {SIZES[1]} pixels")
        if stretches:
            for flag, value in (("size", stretches[-1][0]), ("epochs", sum(epochs for _, epochs in stretches))):
                given = getattr(self, flag)
                instead = f"left out with --sizes {self.sizes}, which makes it {value}"
                check(isinstance(given, Default) or given == value, flag, given, instead)
                object.__setattr__(self, flag, value)
        check(0 < self.subset <= 1, "subset", self.subset, "above 0, and at most 1")
        check(self.repeats >= 1, "repeats", self.repeats, "1 or more")
        check(
            self.repeats < 1 or self.batch == "auto" or self.batch % self.repeats == 0,
            "repeats",
            self.repeats,
            f"a divisor of the batch, {self.batch}",
        )
        check(
            self.repeats == 1 or not (self.mixup or self.cutmix),
            "repeats",
            self.repeats,
            "1 with --mixup or --cutmix, which would mix an image with itself",
        )
        check(0.01 <= self.crop_pct <= 1, "crop-pct", self.crop_pct, "between 0.01 and 1")
        check(self.cache_limit is None or self.cache_limit > 0, "cache-limit", self.cache_limit, "more than 0 GB")
        for flag, value in (("cache-limit", self.cache_limit), ("cache-keep", self.cache_keep or None)):
            check(value is None or self.cache != "off", flag, value, "left out where --cache is off")
        check(
            self.batch == "auto" or self.batch >= 2,
            "batch",
            self.batch,
            "at least 2: batch-norm has no variance of one image",
        )
        check(
            self.micro_batch is None or self.micro_batch >= 2,
            "micro-batch",
            self.micro_batch,
            "at least 2: batch-norm has no variance of one image",
        )
        check(self.clip_norm is None or 0 < self.clip_norm < inf, "clip-norm", self.clip_norm, "greater than 0")
        check(self.epochs >= 0, "epochs", self.epochs, "0 or more")
        check(self.freeze_epochs >= 0, "freeze-epochs", self.freeze_epochs, "0 or more")
        if self.schedule == "fine-tune":
            itself = "left out with --schedule fine-tune, which freezes and unfreezes by itself"
            check(self.freeze_to == 0, "freeze-to", self.freeze_to, itself)
            check(self.epochs + self.freeze_epochs > 0, "epochs", 0, "more than 0 where --freeze-epochs is 0")
        else:
            check(self.epochs > 0, "epochs", 0, f"more than 0 with --schedule {self.schedule}")
            left_out = f"left out with --schedule {self.schedule}: nothing is frozen"
            check(self.freeze_epochs in (0, 1), "freeze-epochs", self.freeze_epochs, left_out)
        check(
            0 < self.valid_fraction < 1,
            "valid-fraction",
            self.valid_fraction,
            "between 0 and 1, both excluded",
        )
        if self.lr is not None:
            lr = read_rates(self.lr)
            number = not isinstance(lr, slice)
            its_own = "which sets the rate of each layer group from that of the head"
            choose = f"one number with --schedule fine-tune, {its_own}. For rates of your own choose one-cycle"
            check(number or self.schedule != "fine-tune", "lr", self.lr, choose)
            check(number or self.layer_decay is None, "lr", self.lr, f"one number with --layer-decay, {its_own}")
            check(self.lr_choice == "balanced", "lr-choice", self.lr_choice, "left out where --lr is given")
            # One spelling for each, so that the same run is known again.
            object.__setattr__(self, "lr", lr if number else rates_in_words(lr))
        check(20 <= self.lr_find_steps <= 100, "lr-find-steps", self.lr_find_steps, "between 20 and 100")
        check(
            self.layer_decay is None or 0 < self.layer_decay <= 1, "layer-decay", self.layer_decay, "above 0, at most 1"
        )
        check(0 <= self.label_smoothing < 1, "label-smoothing", self.label_smoothing, "0 or more, below 1")
        check(self.focal_gamma >= 0, "focal-gamma", self.focal_gamma, "0 or more")
        check(
            self.loss == "focal" or self.focal_gamma == 2,
            "focal-gamma",
            self.focal_gamma,
            "left out without --loss focal",
        )
        check(self.mixup >= 0, "mixup", self.mixup, "0 or more")
        check(self.cutmix >= 0, "cutmix", self.cutmix, "0 or more")
        check(self.ema is None or 0 < self.ema < 1, "ema", self.ema, "between 0 and 1, both excluded")
        check(self.restarts >= 0, "restarts", self.restarts, "0 or more")
        check(self.grace > 0, "grace", self.grace, "more than 0 seconds")
        check(self.stall >= 5, "stall", self.stall, "5 seconds or more")
        check(not (self.resume and self.restart), "resume", True, "left out with --restart")
        for flag in ("resume", "restart"):
            check(self.name is not None or not getattr(self, flag), flag, True, "given with the run's --name")
        check(self.weight_decay >= 0, "weight-decay", self.weight_decay, "0 or more")
        check(self.checkpoint_every >= 1, "checkpoint-every", self.checkpoint_every, "1 step or more")
        minutes = self.checkpoint_minutes
        check(minutes is None or minutes > 0, "checkpoint-minutes", minutes, "more than 0")
        if self.workers is not None:
            try:
                crew = Crew.of(self.workers)
            except ValueError:
                crew = None
            check(crew is not None, "workers", self.workers, "a number, or LEAST:MOST as in 2:8, the least 1 or more")
            assert crew is not None
            object.__setattr__(self, "workers", str(crew) if crew.elastic else crew.most)
        check(self.address is None or self.workers != 0, "address", self.address, "left out with --workers 0")
        check(self.threads is None or self.threads >= 1, "threads", self.threads, "1 or more")
        check(0 <= self.seed < 2**63, "seed", self.seed, "0 or more, below 2**63")
        check(0 <= self.split_seed < 2**63, "split-seed", self.split_seed, "0 or more, below 2**63")
        check(
            self.label_regex is None or self.label_csv is None,
            "label-regex",
            self.label_regex,
            "left out where --label-csv is given: labels come from one place",
        )
        check(
            self.name is None or (self.name not in ("", ".", "..") and "/" not in self.name and "\0" not in self.name),
            "name",
            repr(self.name),
            "a plain folder name, without '/'",
        )

    @property
    def global_batch(self) -> int:
        """`batch` as the number that `auto` has become before workers start."""
        assert isinstance(self.batch, int)
        return self.batch

    @property
    def crew(self) -> Crew:
        """How many workers; none where nobody has said it yet."""
        return Crew.of(self.workers or 0)

    @property
    def at_once(self) -> int | None:
        """Most images that a worker computes at once; `None`: its whole part of a batch, whatever that is."""
        if self.micro_batch is not None or self.sync_bn or not self.crew.elastic:
            return self.micro_batch
        return share(self.global_batch, self.crew)

    @property
    def size_of_epochs(self) -> tuple[int, ...]:
        """Height and width of the training images in each epoch of the run, pixels."""
        stretches = read_sizes(self.sizes) if self.sizes else ((self.size, self.epochs),)
        return size_of_each_epoch(stretches, self.freeze_epochs if self.schedule == "fine-tune" else 0)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            key: str(value) if isinstance(value, Path) else value for key, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of `as_dict`; an unknown key is an error, never ignored."""
        _refuse_unknown(values, cls)
        if isinstance(values.get("augment"), dict):
            _refuse_unknown(values["augment"], Augment)
        try:
            return TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            first = error.errors()[0]
            names = {field.name for known in (cls, Augment) for field in dataclasses.fields(known)}
            setting = ".".join(part for part in map(str, first["loc"]) if part in names)  # and not the types of a union
            raise UserError(f"The setting {setting!r} is {first['input']!r}: {first['msg']}.") from None

    @classmethod
    def read(cls, path: Path) -> TrainConfig:
        """Read a configuration written as JSON."""
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError:
            raise UserError(f"There is no configuration at {path}.") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is no configuration in JSON: {first_line(error)}.") from None
        if not isinstance(values, dict):
            raise UserError(f"{path} holds a {type(values).__name__}; a configuration is a JSON object.")
        return cls.from_dict(values)


def _refuse_unknown(values: dict[str, Any], cls: Any) -> None:
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise UserError(f"Unknown setting {unknown[0]!r}; the settings are: {', '.join(sorted(known))}.")


def flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Nested settings by the names of their flags: `augment.flip`."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= {f"{name}.{key}": below for key, below in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def flags(settings: dict[str, Any], without: Collection[str] = ()) -> list[str]:
    """The command line's words for what differs from the defaults in `settings`, as of `as_dict` or of a journal."""
    defaults, words = flat(TrainConfig().as_dict()), []
    without = {*without, *(("size", "epochs") if settings.get("sizes") else ())}  # which --sizes says
    for name, value in flat(settings).items():
        value = tuple(value) if isinstance(value, list) else value
        if name in without or name not in defaults or value == defaults[name] or value is None:
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *(value if isinstance(value, tuple) else [str(value)])]
    return words
