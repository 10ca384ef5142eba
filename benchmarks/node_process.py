"""An `lmc node` in a process of its own, for benchmarks that attach to one."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def node_process(num_bytes: int) -> Iterator[Path]:
    """The socket of a node with so much memory and no lower tier."""
    with tempfile.TemporaryDirectory() as folder:
        path, file = Path(folder) / "node.sock", Path(folder) / "node.yaml"
        file.write_text(f"host:\n  capacity: {num_bytes}\nmetrics:\n  enabled: false\n")
        command = [sys.executable, "-m", "lmc", "node", "--config", str(file), "--socket", str(path)]
        node = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        try:
            assert node.stdout is not None and node.stdout.readline()
            yield path
        finally:
            node.terminate()
            node.communicate()
