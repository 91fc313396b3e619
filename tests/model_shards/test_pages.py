"""Large tensors lie in huge pages where the system has them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SYSTEM = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ASKED = """
import model_shards, torch
held = torch.ones(64 << 20, dtype=torch.uint8)
lines = open("/proc/self/smaps_rollup").read().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("AnonHugePages")))
"""


@pytest.mark.skipif(
    not SYSTEM.exists() or "[madvise]" not in SYSTEM.read_text(),
    reason="this system does not give huge pages to those who ask, and only to them",
)
def test_weights_get_huge_pages():
    found = subprocess.run([sys.executable, "-c", ASKED], capture_output=True, text=True, check=True)
    assert int(found.stdout) * 1024 > 32 << 20
