"""What the engine needs to know to start: frozen, picklable, made once from the settings.

The settings read the environment, the command line and hira.toml; the engine reads only this, so it
can be built in a test or a notebook without any of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from adapters.modulation.strategy import Strategy
from adapters.registry.remote_place import RemotePlace

Quantization = Literal["nf4", "fp4", "int8", "none"]
DType = Literal["auto", "bf16", "fp16", "fp32"]
Device = Literal["auto", "cpu", "cuda"]
DecodeSteps = Literal["dynamic", "static", "ahead"]
EncodeBatches = Literal["dynamic", "static"]
TokenizerSource = Literal["file", "class"]

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Everything that shapes one engine on one device."""

    base: str  # a folder or a hub id
    store_dir: Path  # adapters by version, as adapters.registry.store lays them out
    cache_dir: Path  # times of strategies and other files that can be made again
    remote_store: RemotePlace | None = None  # then store_dir keeps those that are used
    revision: str | None = None
    quantization: Quantization = "nf4"
    double_quant: bool = True
    quantize_embeddings: bool = False  # the token embedding too, as quantization says
    tokenizer: TokenizerSource = "file"  # where tokenizer.json and the named class differ
    dtype: DType = "auto"
    device: Device = "auto"
    threads: int | None = None  # None: one per physical core that the process may use

    modulation: Strategy = "auto"
    slots: int = 256  # adapters on the device at once
    device_bytes: int = 1024 * MIB  # their factors in the compute dtype
    host_bytes: int = 2048 * MIB  # factors kept in memory off the device
    folded_bytes: int = 256 * MIB  # cached folded weights
    packed_bytes: int = 16384 * MIB  # on disk: adapters as they lie in memory; 0: none
    head_bytes: int = 256 * MIB  # task heads in float32

    max_batch_tokens: int = 8192  # padded tokens in one forward of the encode lane
    max_batch_rows: int = 64
    max_sequences: int = 64  # sequences decoding together
    prefill_tokens: int | None = None  # tokens of one generate step; None: by the device
    token_ms: float | None = None  # from token to token beside busier adapters; None: any time
    kv_bytes: int = 256 * MIB
    grammar_bytes: int = 64 * MIB  # grammars kept compiled
    max_input_tokens: int | None = None  # None: the context of the base
    max_image_pixels: int = 1 << 24  # of an image as it arrives
    max_request_pixels: int = 1 << 26  # of all images of one request
    allow_prefix_sharing: bool = False
    decode_steps: DecodeSteps = "dynamic"
    encode_batches: EncodeBatches = "dynamic"
    deterministic: bool = False  # answers do not depend on their batch in a single bit

    quarantine_failures: int = 5  # of one adapter, in a row
    quarantine_s: float = 60.0  # the first time


def runs_apart(options: EngineOptions, device: str) -> bool:
    """Whether each sequence and each text has a forward of its own, so that no other can change it.

    That is how ``deterministic`` is kept on a GPU, where the libraries' sums over a row, too, go by
    how many rows there are. On a CPU fewer things do, and those are kept apart one by one.

    Args:
        options: Of the engine.
        device: Its type.
    """
    return options.deterministic and device != "cpu"
