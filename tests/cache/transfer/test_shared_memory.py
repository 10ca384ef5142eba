"""Containers get 64 MB of /dev/shm unless they ask for more. The slab must not depend on it."""

from __future__ import annotations

import subprocess
import sys

SLAB = """
from lmc.cache.transfer.pinned import Slab

class Driver:  # stands for the device's: with one, the slab is memory that a fork shares
    def register(self, address, size): pass
    def unregister(self, address): pass

for registrar in (None, Driver()):
    slab = Slab(64, 1 << 20, registrar=registrar)
    assert slab.wait(timeout=60) and not slab.problem, slab.problem
    for slot in range(64):
        slab.view(slot)[:] = bytes([slot]) * (1 << 20)
    slab.close()
print("held", open("/proc/mounts").read().count(" /dev/shm tmpfs rw,relatime,size=1024k"))
"""


def test_a_slab_larger_than_dev_shm_can_be_written() -> None:
    """With a /dev/shm of 1 MiB, where this machine lets one be mounted; else with the one that there is."""
    small = 'mount -t tmpfs -o size=1m tmpfs /dev/shm; exec "$@"'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", small, "sh", sys.executable, "-c", SLAB]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unshare:" in result.stderr:
        result = subprocess.run([sys.executable, "-c", SLAB], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("held")
