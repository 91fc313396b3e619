"""The package's face, its error tree and the micro-benchmark."""

from __future__ import annotations

import pytest

import model_shards
from model_shards import errors, micro_benchmark


def test_the_face_is_pinned():
    assert model_shards.__all__ == [
        "BLOCK_TOKENS",
        "WINDOW_ROWS_MAX",
        "Adapter",
        "AdapterConfig",
        "AdapterIndex",
        "BatchLimits",
        "Batcher",
        "CheckpointError",
        "CheckpointIndex",
        "ConfigError",
        "ContextOverflow",
        "Draft",
        "Engine",
        "Grammar",
        "GrammarError",
        "Grammars",
        "Guesser",
        "IncrementalDecoder",
        "LocalFault",
        "ModelConfig",
        "ModelError",
        "NoRoom",
        "Pace",
        "ParkingLot",
        "PromptLookup",
        "RemoteFault",
        "ResourceLimit",
        "Resume",
        "Room",
        "Run",
        "Sampling",
        "SamplingError",
        "Span",
        "Speculation",
        "StateError",
        "Step",
        "StepError",
        "StepResult",
        "StopMatcher",
        "TensorInfo",
        "Tokenizer",
        "TokenizerError",
        "Verdict",
        "WeightCache",
        "Window",
        "bench_decode",
        "bench_speculation",
        "check_form",
        "header_range",
        "is_adapter",
        "load_span",
        "micro_benchmark",
        "random_checkpoint",
        "shape_of",
        "supported_families",
        "tensor_from_bytes",
        "tensor_to_bytes",
    ]
    assert all(hasattr(model_shards, name) for name in model_shards.__all__)


@pytest.mark.parametrize("root", [errors.RemoteFault, errors.ResourceLimit, errors.LocalFault])
def test_every_error_hangs_on_one_of_three_roots(root):
    assert issubclass(root, errors.ModelError)
    found = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    roots = (errors.RemoteFault, errors.ResourceLimit, errors.LocalFault)
    assert all(
        kind is errors.ModelError or sum(issubclass(kind, one) for one in roots) == 1 for kind in found
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_micro_benchmark_measures_something_plausible(dtype):
    found = micro_benchmark("cpu", dtype, budget_s=0.02)
    assert set(found) == {"flops_per_s", "read_bytes_per_s"}
    assert 1e6 < found["flops_per_s"] < 1e18
    assert 1e6 < found["read_bytes_per_s"] < 1e14
