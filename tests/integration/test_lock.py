"""Ray on one machine lets nobody in who has not its token: other users reach loopback, too."""

import os
import subprocess
import sys

START = """
import os
from cluster import engine
with engine.local(1):
    import ray
    print(ray.get_runtime_context().gcs_address, os.environ["RAY_AUTH_TOKEN"], flush=True)
    input()
"""
ENTER = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False); print('in', len(ray.nodes()))"


def test_nobody_gets_in_without_the_token(temporary):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    clean |= {"TMPDIR": str(temporary), "HOME": str(temporary), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    with subprocess.Popen(
        [sys.executable, "-c", START], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean
    ) as started:
        address, token = started.stdout.readline().split()
        given = {
            "none": {},
            "wrong": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
            "right": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token},
        }
        tries = {
            name: subprocess.Popen(
                [sys.executable, "-c", ENTER, address],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=clean | words,
            )
            for name, words in given.items()
        }
        told = {name: each.communicate(timeout=120) for name, each in tries.items()}
        started.communicate("\n")
    assert {name: "in 1" in output for name, (output, _) in told.items()} == {
        "none": False,
        "wrong": False,
        "right": True,
    }, told
    assert all("InvalidAuthToken" in told[name][1] for name in ("none", "wrong"))
    assert not (temporary / ".ray").exists()  # Ray would write a token that it makes itself to there
