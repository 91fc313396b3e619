"""`shoal bench decode`: how fast this machine reads prompts and writes tokens, beside what its memory can do."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from shoal import terminal
from shoal.errors import ShoalError

MIB = 1 << 20


def decode(options: argparse.Namespace) -> int:
    """Print tokens a second, bytes read a second and the memory that was needed."""
    # Torch takes seconds to load: other commands must not wait for it.
    import torch

    from model_shards import ModelError, bench_decode, bench_speculation, random_checkpoint

    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as scratch:
        directory = options.model
        try:
            if options.config is not None:
                directory = Path(scratch)
                random_checkpoint(options.config, directory)
            how = {
                "dtype": options.dtype,
                "quant": options.quant,
                "device": options.device,
                "prompt_tokens": options.prompt_tokens,
                "new_tokens": options.new_tokens,
            }
            if options.speculate is None:
                found = bench_decode(directory, batch=options.batch, **how)
            else:
                found = bench_speculation(directory, options.speculate, draft=options.draft, **how)
        except (ModelError, OSError) as problem:
            raise ShoalError(str(problem)) from None
    found["peak_rss_mb"] = _peak_rss_bytes() / MIB
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    terminal.table(("figure", "seen"), [(k, f"{v:,.6g}") for k, v in found.items()], right=("seen",))
    return 0


def _peak_rss_bytes() -> float:
    if sys.platform == "win32":
        import psutil

        return float(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)
