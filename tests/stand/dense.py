"""Small models with dense adapters, and the tokenizers to go with them: the truth for lane tests.

An adapter here is a full-size effective weight per layer, applied segment by segment with a plain
``F.linear``. It shares no code with the adapted layers, so what the lane does with rows, slots and
leases is judged apart from how the layers compute.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.pytorch_utils import Conv1D

from adapters.errors import SlotNotResident
from adapters.segments import Segments
from adapters.signature import describe
from server.generation.lane import GenerateLane
from server.messages import GenerateRequest, GenerateResult, SamplingOptions
from server.options import EngineOptions

VOCABULARY = 320
ALPHABET_TEXT = ["to be or not to be that is the question", "héllo wörld €uro 日本語 😀"] * 20


def config(name: str, **changes: Any) -> Any:
    small = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    if name == "opt":
        made = OPTConfig(
            hidden_size=32,
            word_embed_proj_dim=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=64,
            max_position_embeddings=128,
            **small,
        )
    elif name == "gpt2":
        made = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **small)
    else:
        kind = {"llama": LlamaConfig, "qwen2": Qwen2Config}[name]
        made = kind(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            **small,
        )
    for key, value in changes.items():
        setattr(made, key, value)
    return made


def base(name: str, seed: int = 0, **changes: Any) -> Any:
    """A random causal language model in fp32 whose next tokens differ visibly between prompts."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        config(name, **changes), attn_implementation="sdpa", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.25)
    model.generation_config.eos_token_id = 1
    model.generation_config.pad_token_id = 2
    return model


def linears(model: nn.Module) -> dict[str, Any]:
    return {p: m for p, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}


def hira_factors(model: nn.Module, seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A [r, in] and B [out, r] for every linear layer, the output layer included."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for path, module in linears(model).items():
        rows, columns = module.weight.shape
        if isinstance(module, Conv1D):
            rows, columns = columns, rows
        b = torch.randn(rows, 4, generator=generator) * 0.4
        factors[path] = (torch.randn(4, columns, generator=generator), b)
    return factors


def hira_weights(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """W ⊙ (1 + B A) for every linear layer, in the layout of its weight."""
    layers = linears(model)
    weights = {}
    for path, (a, b) in hira_factors(model, seed).items():
        product = b @ a
        product = product.T if isinstance(layers[path], Conv1D) else product
        weights[path] = (layers[path].weight * (1 + product)).detach()
    return weights


def effective(model: Any, weights: Mapping[str, torch.Tensor]) -> Any:
    """A copy of the model with the weights put in: what ``generate`` is asked about."""
    made = copy.deepcopy(model)
    for path, weight in weights.items():
        layer = made.get_submodule(path)
        layer.weight = nn.Parameter(weight.clone(), requires_grad=False)  # unties an output layer
    return made


class DenseAdapted:
    """Stands for an AdaptedModel: slot → the effective weights of its layers."""

    def __init__(self, model: Any, slots: dict[int, Mapping[str, torch.Tensor]]) -> None:
        self.original = copy.deepcopy(model)
        self.model = model
        self.slots = slots
        self.signature = describe(model, "test")
        self.plans: list[Segments] = []
        self.before_batch: Callable[[Segments], None] = lambda plan: None
        self._active: tuple[Segments, Segments | None] | None = None
        for path, module in linears(model).items():
            module.forward = self._forward(path, module, module.forward)

    def _forward(self, path: str, module: Any, plain: Any) -> Any:
        def forward(x: torch.Tensor) -> torch.Tensor:
            if self._active is None:
                out: torch.Tensor = plain(x)
                return out
            segments, logits = self._active
            if path == "lm_head" and logits is not None:
                segments = logits
            rows = x.reshape(-1, x.shape[-1])
            segments.check_covers(len(rows))
            parts = []
            for part in segments.parts:
                weight = self.slots.get(part.slot, {}).get(path, module.weight)
                weight = weight.T if isinstance(module, Conv1D) else weight
                parts.append(F.linear(rows[part.start : part.stop], weight, module.bias))
            return torch.cat(parts).reshape(*x.shape[:-1], -1)

        return forward

    @contextmanager
    def batch(
        self, segments: Segments, sequences: Segments | None = None, logits: Segments | None = None
    ) -> Iterator[None]:
        self.plans.append(segments)
        self.before_batch(segments)
        self._active = (segments, logits)
        try:
            yield
        finally:
            self._active = None


class DenseResidency:
    """Stands for a Residency whose versions are at once, or on command, in their slots."""

    def __init__(self, slots: Mapping[str, int], *, slow: Collection[str] = ()) -> None:
        self.slots = dict(slots)
        self.states = dict.fromkeys(slots, "absent")
        self.slow = set(slow)
        self.leases: Counter[str] = Counter()
        self.errors: dict[str, Exception] = {}

    def prefetch(self, version: str) -> None:
        if self.states.get(version, "absent") == "absent":
            known = version in self.slots and version not in self.slow
            self.states[version] = "ready" if known else "loading"

    def state(self, version: str) -> str:
        return self.states.get(version, "absent")

    def error(self, version: str) -> Exception | None:
        return self.errors.get(version)

    def lease(self, versions: Collection[str]) -> dict[str, int]:
        for version in versions:
            if self.state(version) != "ready":
                raise SlotNotResident(f"{version} is not there")
        self.leases.update(versions)
        return {version: self.slots[version] for version in versions}

    def release(self, versions: Collection[str]) -> None:
        self.leases -= Counter(versions)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(ALPHABET_TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """Words with a leading ▁ and single bytes for the rest, as Llama's sentencepiece."""
    words = ["▁to", "▁be", "▁or", "▁not", "be", "▁", "to", "or", "a", "b"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    tokenizer = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def options(**changes: Any) -> EngineOptions:
    settings: dict[str, Any] = {"kv_bytes": 1 << 20, "max_sequences": 16, "prefill_tokens": 64}
    here = Path()
    return EngineOptions(base="test", store_dir=here, cache_dir=here, **(settings | changes))


class Stage:
    """A lane over a small model with the base and adapters "a", "b", "c" in slots 1, 2, 3."""

    def __init__(self, name: str = "llama", *, slow: Collection[str] = (), **changes: Any) -> None:
        model = base(name)
        names = ("a", "b", "c")
        weights = {i + 1: hira_weights(model, i + 1) for i in range(len(names))}
        self.adapted = DenseAdapted(model, dict(weights))
        self.residency = DenseResidency({v: i + 1 for i, v in enumerate(names)}, slow=slow)
        self.tokenizer = byte_tokenizer()
        made: Any = GenerateLane
        self.lane: GenerateLane = made(
            self.adapted, self.tokenizer, self.residency, options(**changes)
        )
        self._count = 0

    def reference(self, version: str | None, prompt: list[int], new: int, **more: Any) -> list[int]:
        """New tokens of transformers' ``generate`` on the dense effective weights."""
        slot = 0 if version is None else self.residency.slots[version]
        model = effective(self.adapted.original, self.adapted.slots.get(slot, {}))
        with torch.no_grad():
            out = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=new,
                **{"do_sample": False, **more},
            )
        tokens: list[int] = out[0, len(prompt) :].tolist()
        return tokens

    def request(self, version: str | None, prompt: list[int], **more: Any) -> GenerateRequest:
        self._count += 1
        fields = {
            name: more.pop(name)
            for name in ("id", "stream", "deadline", "submitted")
            if name in more
        }
        more.setdefault("max_new_tokens", 12)
        return GenerateRequest(
            id=fields.pop("id", f"r{self._count}"),
            adapter=version,
            version=version,
            token_ids=tuple(prompt),
            sampling=SamplingOptions(**more),
            **fields,
        )

    def submit(self, version: str | None, prompt: list[int], **more: Any) -> str:
        request = self.request(version, prompt, **more)
        self.lane.submit(request)
        return request.id

    def drain(self, limit: int = 2000) -> list[Any]:
        events: list[Any] = []
        for _ in range(limit):
            if not self.lane.has_work():
                return events
            events += self.lane.step()
        raise AssertionError("the lane did not come to an end")

    def answer(self, version: str | None, prompt: list[int], **more: Any) -> Any:
        """The terminal event of one request, run alone."""
        wanted = self.submit(version, prompt, **more)
        return next(e for e in terminals(self.drain()) if e.id == wanted)


def terminals(events: list[Any]) -> list[Any]:
    return [e for e in events if isinstance(e, GenerateResult) or hasattr(e, "code")]


def ids_of(result: Any) -> list[int]:
    assert isinstance(result, GenerateResult), result
    return [token.id for token in result.tokens]


def prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [
        torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths
    ]
