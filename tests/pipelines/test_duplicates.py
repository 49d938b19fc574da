"""Each pair is found once, by the slow way's verdict."""

import numpy as np
import pytest
from PIL import Image

from pipelines import duplicates
from pipelines.firewall import examine
from tests.conftest import picture
from tests.hostile import encoded, turned


def test_groups_of_identical_hashes():
    hashes_N16 = np.zeros((7, 16), np.uint8)
    hashes_N16[:, 15] = [3, 0, 3, 200, 0, 3, 1]  # the last byte tells
    groups = duplicates.identical(hashes_N16)
    assert [group.tolist() for group in groups] == [[0, 2, 5], [1, 4]]
    assert duplicates.identical(hashes_N16[[0, 1, 3]]) == []


def test_each_validation_image_that_training_holds_is_one_leak():
    groups = [np.array(group) for group in ([0, 2, 5, 8], [1, 4], [3, 6])]
    valid_N = np.array([True, False, False, True, False, True, True, False, False])
    assert duplicates.leaks(groups, valid_N).tolist() == [[2, 0], [2, 5]]
    assert duplicates.leaks([], valid_N).shape == (0, 2)


def slow(hashes_N, distance):
    n = len(hashes_N)
    return [
        [i, j]
        for i in range(n)
        for j in range(i + 1, n)
        if (int(hashes_N[i]) ^ int(hashes_N[j])).bit_count() <= distance
    ]


@pytest.mark.parametrize("distance", [0, 1, 4, 7])
def test_near_pairs_are_those_of_the_slow_way(distance, monkeypatch):
    monkeypatch.setattr(duplicates, "_BLOCK", 5)  # many blocks in a bucket
    rng = np.random.default_rng(distance)
    centres = rng.integers(0, 2**64, 12, dtype=np.uint64)
    flips = [sum(1 << int(bit) for bit in rng.choice(64, rng.integers(0, 6), replace=False)) for _ in range(150)]
    hashes_N = centres[rng.integers(0, 12, 150)] ^ np.array(flips, np.uint64)
    found = duplicates.near(hashes_N, distance).tolist()
    assert found == slow(hashes_N, distance)
    assert found


def test_no_hashes_and_one():
    for n in (0, 1):
        assert duplicates.near(np.zeros(n, np.uint64)).shape == (0, 2)


def test_pairs_are_listed_up_to_five():
    pairs_P2 = np.array([[0, 1]] * 5)
    assert duplicates.listed(pairs_P2[:1], ["a\n", "b"], "=") == "'a\\n' = 'b'"
    assert duplicates.listed(pairs_P2, ["a", "b"], "~").count("~") == 5
    assert duplicates.listed(np.array([[0, 1]] * 6), ["a", "b"], "~").endswith("'a' ~ 'b', …")


def test_copies_that_were_saved_shrunk_or_turned_are_alike_and_others_are_not(tmp_path):
    pytest.importorskip("imagehash", reason="the extra near-duplicates is not installed")
    rng = np.random.default_rng(3)
    originals = [picture(rng, 180, 240, label) for label in (0, 1, 2, 0)]
    deep = np.asarray(originals[3].convert("L")).astype(np.uint16) * 257
    files = {f"{i}.png": encoded(image, "PNG") for i, image in enumerate(originals)}
    files["0 again.jpg"] = encoded(originals[0], "JPEG", quality=60)
    files["1 small.jpg"] = encoded(originals[1].resize((120, 90), Image.Resampling.BICUBIC), "JPEG")
    exif = Image.Exif()
    exif[0x0112] = 6
    files["2 turned.jpg"] = encoded(originals[2].transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif)
    files["3 deep.png"] = encoded(Image.fromarray(deep), "PNG")
    files["noise.jpg"] = turned(1, "JPEG")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    paths = [str(tmp_path / name) for name in files]
    formats = [verdict.format for verdict in examine(paths)]
    (tmp_path / "noise.jpg").unlink()  # a file that has gone meanwhile is passed over
    steps = []
    hashes_M, rows_M = duplicates.perceptual(paths, formats, progress=lambda *step: steps.append(step))
    assert rows_M.tolist() == list(range(8))
    assert steps == [(9, 9)]
    assert rows_M[duplicates.near(hashes_M)].tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
