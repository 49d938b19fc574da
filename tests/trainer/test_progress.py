import io
import re

import pytest
from rich.console import Console

from trainer.progress import Progress, short_lr


def event(kind, time, **more):
    return {"event": kind, "time": time, **more}


RUN = event("run", 0.0, name="r", command="fine_tune", steps_per_epoch=10, resumed_from=None)
TABLE = "epoch  train_loss  valid_loss  error_rate    img/s     time"


def step(number, time):
    speed = {"images_per_second": 1234.4, "data_wait": 0.031}
    return event("step", time, step=number, epoch=0, loss=0.5, lr=[1e-5, 2.5e-3], **speed)


def epoch(number, time, valid_loss=0.5, seconds=83.0):
    losses = {"train_loss": 0.75, "valid_loss": valid_loss, "error_rate": 0.125}
    return event("epoch", time, epoch=number, images_per_second=1234.4, seconds=seconds, **losses)


def phase(name, epochs, steps, first_step, time):
    return event("phase", time, phase=name, epochs=epochs, steps=steps, lr=[1.0], first_step=first_step)


def journal():
    yield RUN
    yield phase("lr_find", 0, 100, 0, 0.0)
    for number in range(3):
        yield event("range_step", time=1.0 + number, step=number, lr=1e-6, loss=2.0, smoothed=2.1)
    yield event("range_result", time=4.0, suggestions={"steep": 1e-3, "valley": 2.5e-3}, chosen=2.5e-3)
    yield phase("frozen", 1, 10, 0, 5.0)
    yield from (step(number, 10.0 + 4 * number) for number in range(10))
    yield epoch(0, 50.0)
    yield event("checkpoint", time=50.0, step=9, path="c")
    yield event("warning", time=50.0, message="3 files [were]\nquarantined")
    yield phase("unfrozen", 2, 20, 10, 50.0)
    yield from (step(number, 60.0 + number) for number in range(10, 15))
    yield epoch(1, 9000.0, valid_loss=None, seconds=3700.0)
    yield event("finished", time=9000.0, error_rate=0.1, valid_loss=0.3, seconds=9000.0)


def show(events, **console):
    out = io.StringIO()
    with Progress(Console(file=out, width=80, _environ={"TERM": "xterm"}, **console)) as progress:
        for item in events:
            progress.on(item)
    return out.getvalue()


def bar(events):
    """The text of the bar after the last of `events`, as a terminal 80 columns wide would show it."""
    terminal = Console(file=io.StringIO(), width=80, force_terminal=True, _environ={"TERM": "xterm"})
    sheet = io.StringIO()
    with Progress(terminal) as progress:
        for item in events:
            progress.on(item)
        assert progress._live is not None
        Console(file=sheet, width=80, _environ={}).print(progress._live.renderable)
    return [re.sub("[━╸╺]+ *", "━  ", line).rstrip() for line in sheet.getvalue().splitlines()]


def test_without_a_terminal_every_line_is_plain():
    assert show(journal()).splitlines() == [
        "learning rate 2.5e-3 (valley)",
        # Fifteen seconds after the phase began, then every fifteen; four seconds for each step that is left.
        "frozen epoch 1/1 step 4/10, loss 0.5000, lr 2.5e-3, 1,234 img/s, data wait 3%, 00:24 left",
        "frozen epoch 1/1 step 8/10, loss 0.5000, lr 2.5e-3, 1,234 img/s, data wait 3%, 00:08 left",
        TABLE,
        "    0      0.7500      0.5000      0.1250    1,234    01:23",
        "warning: 3 files [were] quarantined",
        "unfrozen epoch 1/2 step 1/20, loss 0.5000, lr 2.5e-3, 1,234 img/s, data wait 3%",
        "    1      0.7500         nan      0.1250    1,234  1:01:40",
    ]


def test_on_a_terminal_rows_stay_and_the_bar_goes():
    out = show(journal(), force_terminal=True)
    assert out.count(TABLE) == 1
    assert "\x1b[33mwarning: 3 files [were] quarantined\x1b[0m" in out
    assert "    1      0.7500         nan      0.1250    1,234  1:01:40" in out
    assert " step 4/10" not in out
    assert out.index("\x1b[?25l") < out.rindex("\x1b[?25h")  # the cursor comes back


def test_the_bar_says_where_the_run_is():
    events = list(journal())
    until = {kind: [item["event"] for item in events].index(kind) for kind in ("range_result", "warning")}
    assert bar(events[: until["range_result"]]) == [
        "range test  ━  3/100  01:37 left",
        "  loss 2.0000 · lr 1.0e-6",
    ]
    assert bar(events[: until["warning"] - 2]) == [
        "frozen epoch 1/1  ━  10/10  00:00 left",
        "  validating · loss 0.5000 · lr 2.5e-3 · 1,234 img/s · data wait 3%",
    ]
    assert bar(events[: until["warning"] + 2])[1] == "  waiting for the first batch"
    assert bar(events[:-2]) == [
        "unfrozen epoch 1/2  ━  5/20  00:15 left",
        "  loss 0.5000 · lr 2.5e-3 · 1,234 img/s · data wait 3%",
    ]
    assert bar([*events[:-2], step(20, 80.0)])[0].startswith("unfrozen epoch 2/2")
    assert bar(events) == [""]


def test_where_the_size_changes_it_has_a_column_and_time_counts_pixels():
    start = {**RUN, "config": {"sizes": "64:1,128:1"}}
    growing = {**phase("unfrozen", 2, 20, 0, 0.0), "sizes": [64, 128]}
    lines = show([start, growing, {**epoch(0, 10.0), "size": 64}]).splitlines()
    assert lines == [
        "epoch  size  train_loss  valid_loss  error_rate    img/s     time",
        "    0    64      0.7500      0.5000      0.1250    1,234    01:23",
    ]
    # 6 steps of 64 pixels in 6 s; 3 more of them and 10 that have four times the pixels are left
    assert bar([start, growing, step(0, 10.0), step(6, 16.0)])[0].endswith("7/20  00:43 left")
    # 4 s for 3 steps small and 1/4 of a step large: each
    steps = [step(6, 10.0), step(9, 13.0), step(10, 17.0)]
    assert bar([start, growing, *steps])[0].endswith("11/20  00:36 left")


def test_a_resumed_run_measures_its_speed_anew():
    again = [RUN | {"resumed_from": 15, "time": 500.0}, phase("unfrozen", 2, 20, 10, 500.0)]
    lines = bar([*list(journal())[:-2], *again, step(15, 510.0), step(16, 512.0)])
    assert lines[0] == "unfrozen epoch 1/2  ━  7/20  00:26 left"
    assert "resumed from step 15" in show([*again])


def test_a_step_before_any_phase_and_an_unknown_event_are_passed_over():
    assert show([step(0, 100.0), event("tomorrow", time=0.0)]) == ""


def test_an_exception_gives_the_terminal_back():
    out = io.StringIO()
    progress = Progress(Console(file=out, force_terminal=True, _environ={"TERM": "xterm"}))
    with pytest.raises(KeyError), progress:
        progress.on({})
    assert "\x1b[?25h" in out.getvalue().rpartition("\x1b[?25l")[2]


@pytest.mark.parametrize(
    ("lr", "text"), [(0.0025, "2.5e-3"), (1.0, "1.0e0"), (3e-12, "3.0e-12"), (float("nan"), "nan")]
)
def test_short_lr(lr, text):
    assert short_lr(lr) == text
