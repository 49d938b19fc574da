"""Where processes listen."""

import os
import socket
import struct
from pathlib import Path


def listening(pids):
    """The addresses and TCP ports that these processes listen on, as text."""
    inodes = set()
    for pid in pids:
        try:
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                found = os.readlink(descriptor)
                if found.startswith("socket:["):
                    inodes.add(found[8:-1])
        except OSError:
            continue
    places = set()
    for family, table in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and words[9] in inodes:
                address, port = words[1].split(":")
                packed = b"".join(struct.pack("=I", int(address[i : i + 8], 16)) for i in range(0, len(address), 8))
                places.add((socket.inet_ntop(family, packed), int(port, 16)))
    return places
