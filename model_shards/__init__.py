"""A span of a model on this machine: config, checkpoint ranges, weights, KV cache, engine, sampler,
tokenizer.

Knows torch and file formats; knows no network, no mesh and no clock. See `engine.py` for what is guaranteed
of the numbers.
"""

from model_shards.adapters import AdapterConfig, AdapterIndex, is_adapter
from model_shards.batcher import Batcher, BatchLimits, Resume, Room, Run
from model_shards.bench import micro_benchmark
from model_shards.bench_decode import bench_decode, random_checkpoint
from model_shards.bench_speculate import bench_speculation
from model_shards.checkpoint import CheckpointIndex
from model_shards.config import ModelConfig, supported_families
from model_shards.draft import Draft
from model_shards.dtypes import tensor_from_bytes, tensor_to_bytes
from model_shards.engine import Engine
from model_shards.errors import (
    CheckpointError,
    ConfigError,
    ContextOverflow,
    GrammarError,
    LocalFault,
    ModelError,
    NoRoom,
    RemoteFault,
    ResourceLimit,
    SamplingError,
    StateError,
    StepError,
    TokenizerError,
)
from model_shards.grammar import Grammar, Grammars, check_form
from model_shards.kv import BLOCK_TOKENS
from model_shards.lowrank import Adapter
from model_shards.pages import ask_for_huge_pages
from model_shards.parking import ParkingLot
from model_shards.safetensors_header import TensorInfo, header_range
from model_shards.sampler import Sampling
from model_shards.span import Span, load_span, shape_of
from model_shards.speculate import Guesser, Pace, PromptLookup, Speculation
from model_shards.steps import Step, StepResult
from model_shards.tokens import IncrementalDecoder, StopMatcher, Tokenizer
from model_shards.weight_cache import WeightCache
from model_shards.windows import WINDOW_ROWS_MAX, Verdict, Window

ask_for_huge_pages()

__all__ = [
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
