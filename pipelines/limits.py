"""What an image may be, to be trained on."""

MAX_PIXELS = 100_000_000  # by default
MIN_SIDE = 2  # pixels
MAX_ASPECT = 100  # the longer side over the shorter
MAX_BYTES = 2**30  # a file is held in memory, and DALI's samples end at twice that
