"""How many workers a run may have, and that its steps do not depend on it."""

import pytest

from pipelines.errors import UserError
from trainer import TrainConfig
from trainer.crew import Crew
from trainer.micro import micro_batches, share


@pytest.mark.parametrize("words", [0, 1, 8, "2:8", "1:2"])
def test_it_is_written_as_it_is_read(words):
    crew = Crew.of(words)
    assert str(crew) == str(words)
    assert Crew.of(str(crew)) == crew
    assert crew.elastic == (":" in str(words))


def test_sizes_are_of_processes():
    assert [list(Crew.of(words).sizes) for words in (0, 3, "2:4")] == [[1], [3], [2, 3, 4]]


@pytest.mark.parametrize("words", ["8:2", "0:2", "-1", "two", "2:", ":2", "2:3:4", "1.5"])
def test_what_is_no_crew_is_refused(words):
    with pytest.raises(ValueError, match="neither"):
        Crew.of(words)
    with pytest.raises(UserError, match=f"--workers is {words}; it must be a number, or LEAST:MOST as in 2:8"):
        TrainConfig(workers=words)


def test_a_configuration_keeps_one_spelling():
    assert TrainConfig(workers="2:2").workers == TrainConfig(workers="2").workers == 2
    again = TrainConfig.from_dict(TrainConfig(workers="2:8").as_dict())
    assert (again.workers, again.crew) == ("2:8", Crew(2, 8))


@pytest.mark.parametrize("crew", [Crew(1, 2), Crew(2, 8), Crew(1, 7), Crew(3, 5)])
@pytest.mark.parametrize("batch", [16, 17, 64, 100, 257])
def test_a_worker_computes_no_more_at_once_however_few_are_left(batch, crew):
    if batch // crew.most < 2:
        pytest.skip("refused before")
    most = share(batch, crew)
    # What fits always is what the largest crew computes, or little more where an image would be left alone.
    assert -(-batch // crew.most) <= most <= -(-batch // crew.most) + 2
    for size in crew.sizes:
        parts = micro_batches(batch, size, most)
        for part in (batch // size, -(-batch // size)):
            assert 2 <= part // parts <= -(-part // parts) <= most


def test_it_accumulates_only_where_the_crew_may_shrink():
    settings = {"batch": 64}
    assert TrainConfig(workers=4, **settings).at_once is None
    assert TrainConfig(workers="2:8", **settings).at_once == 8
    assert TrainConfig(workers="2:8", micro_batch=4, **settings).at_once == 4
    assert TrainConfig(workers="2:8", sync_bn=True, **settings).at_once is None
