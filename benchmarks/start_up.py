"""How long the light commands take, as whole processes: python -m benchmarks.start_up

Bar: `lmc --help` within 0.4 s (median).
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

RUNS = 15
BAR_SECONDS = 0.4


def main() -> None:
    missed = False
    for arguments in (["--help"], ["sim", "--help"], ["bench", "--help"], ["serve", "--help"]):
        seconds = []
        for _ in range(RUNS):
            started = time.perf_counter()
            subprocess.run([sys.executable, "-m", "lmc", *arguments], check=True, capture_output=True)
            seconds.append(time.perf_counter() - started)
        median = statistics.median(seconds)
        missed |= arguments == ["--help"] and median > BAR_SECONDS
        print(
            f"lmc {' '.join(arguments):<14} median {median:.3f} s, {min(seconds):.3f}-{max(seconds):.3f} s of {RUNS} runs"
        )
    sys.exit(missed)


if __name__ == "__main__":
    main()
