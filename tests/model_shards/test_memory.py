"""Loading holds the span and little more, whatever the size of the files it comes from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SLACK_BYTES = 24 << 20

PROGRAM = """
import sys
from pathlib import Path
import torch
from model_shards import CheckpointIndex, ModelConfig, load_span
torch.set_num_threads(1)

def peak():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

directory, quant = Path(sys.argv[1]), sys.argv[2]
config, index = ModelConfig.from_dir(directory), CheckpointIndex.open(directory)
load_span(directory, index, config, 0, 1, quant=quant)
before = peak()
span = load_span(directory, index, config, 1, 7, quant=quant)
print(peak() - before, span.weight_bytes, span.bytes_read)
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Eight layers of 9 MiB of zeros in a sparse file; nothing of it is on disk but the header."""
    from model_shards import ModelConfig
    from model_shards.families import span_tensors

    path = tmp_path_factory.mktemp("wide")
    values = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 8,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "intermediate_size": 2432,
        "vocab_size": 64,
        "max_position_embeddings": 64,
    }
    (path / "config.json").write_text(json.dumps(values))
    entries, end = {}, 0
    for spec in span_tensors(ModelConfig.from_dir(path), 0, 8):
        size = 2 * spec.shape[0] * (spec.shape[1] if len(spec.shape) == 2 else 1)
        entries[spec.name] = {"dtype": "BF16", "shape": list(spec.shape), "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries).encode()
    with (path / "model.safetensors").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + end)
    return path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
def test_the_peak_while_loading_is_the_span_and_little_more(directory, quant):
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(directory), quant],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    grown, held, read = map(int, run.stdout.split())
    assert read > 50 << 20
    assert held <= read
    assert grown < held + SLACK_BYTES
