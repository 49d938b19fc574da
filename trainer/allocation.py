"""How a worker on CPUs holds on to memory.

glibc takes large blocks from the kernel and gives them back at once, and the kernel clears each page again: the
activations of one step are a million page faults. Kept, they are there in the next step (EfficientNet-Lite0, 32 images
of 160 px on one core: 12% less time a step, as much memory). In pages of 2 MB, where the kernel gives them to who asks,
processors find them sooner: another 5%. Threads have one arena together, as those of their own hold no block above
64 MB.
"""

import os

_OLD = (2, 35)  # up to it glibc may refuse such a threshold, and then keeps a low one
_SETTINGS = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def environment() -> dict[str, str]:
    """What the C library of a process reads when it starts; what a user has set stays. Nothing for other libraries."""
    library, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    if library != "glibc" or tuple(map(int, version.split(".")[:2])) <= _OLD:
        return {}
    return {name: os.environ.get(name, value) for name, value in _SETTINGS.items()}
