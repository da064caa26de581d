"""The tokenizer that lies beside a base, as its file says it is.

transformers builds the class that the configuration names, with a normalizer and a pre-tokenizer of
that class's own, and takes little more than the vocabulary from ``tokenizer.json``. Where the two
differ every text would have other ids than the base was taught, so both are compared here, once, at
the start. Texts are the business of ``server.inputs.text``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from adapters.errors import ExplainedError
from server.options import TokenizerSource

FILE: Final = "tokenizer.json"
# Numbers, case, spaces, scripts, contractions, signs: where tokenizers of one vocabulary differ.
PROBES: Final = (
    "2024 and 1,234.50",
    "Case CASE case iPhone",
    "a  b\tc\n\n  d ",
    " before",
    "naïve CAFÉ Ελληνικά Русский",
    "日本語 한국어 العربية हिन्दी ไทย",
    "don't it's we'LL",
    "x=y_z(1);  // 😀",
)
WORDS_TRIED: Final = 64  # of the vocabulary, to see whether it is of any use
NAMED: Final = tuple(f"{one}_token" for one in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# Of a tokenizer's model, beside its vocabulary: what decides how words are split.
MODEL_OPTIONS: Final = (
    "unk_token",
    "unk_id",
    "byte_fallback",
    "fuse_unk",
    "ignore_merges",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "max_input_chars_per_word",
)


class TokenizerError(ExplainedError):
    """The base's folder has no tokenizer that this server can use."""

    code = "base_unusable"


@dataclass(frozen=True, slots=True)
class LoadedTokenizer:
    """A fast tokenizer of transformers, and one line for the operator where two were to be had."""

    tokenizer: Any
    note: str | None = None


def load_tokenizer(folder: Path, source: TokenizerSource = "file") -> LoadedTokenizer:
    """Load the tokenizer of a base.

    Args:
        folder: The base's folder.
        source: Which is served where ``tokenizer.json`` and the class that the configuration names
            differ.

    Raises:
        TokenizerError: No tokenizer, only a slow one, or one that makes no tokens of any text.
    """
    from transformers import AutoTokenizer

    named = _from(AutoTokenizer, folder)
    if not named.is_fast:
        raise TokenizerError(
            "The base's tokenizer has no fast version.",
            found=type(named).__name__,
            expected=f"a {FILE}",
            fix="Convert it with AutoTokenizer(...).save_pretrained and serve that folder.",
        )
    found = _compared(named, folder, source)
    if not _is_of_use(found.tokenizer):
        raise TokenizerError(
            "The base's tokenizer makes no tokens of any text.",
            found=f"{type(found.tokenizer).__name__} with {len(found.tokenizer)} tokens"
            + ("" if (folder / FILE).is_file() else f", and no {FILE}"),
            expected="a vocabulary that fits the tokenizer",
            fix=f"Put the base's {FILE} into its folder"
            + (", and serve it with --tokenizer file." if source == "class" else "."),
        )
    return found


def _from(factory: Any, folder: Path) -> Any:
    try:
        return factory.from_pretrained(
            str(folder), use_fast=True, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # the Rust side raises bare ones
        raise TokenizerError(
            "The base's tokenizer could not be loaded.",
            found=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}",
            expected="tokenizer.json and tokenizer_config.json beside the base's config.json",
            fix="Save the tokenizer with tokenizer.save_pretrained(<base folder>).",
        ) from error


def _compared(named: Any, folder: Path, source: TokenizerSource) -> LoadedTokenizer:
    """The tokenizer of the class that was named, or of the file, if they differ."""
    from transformers import PreTrainedTokenizerFast

    if type(named) is PreTrainedTokenizerFast or not (folder / FILE).is_file():
        return LoadedTokenizer(named)
    own = _from(PreTrainedTokenizerFast, folder)
    differing = _differences(named, own)
    if not differing:
        return LoadedTokenizer(named)
    name = type(named).__name__
    served, other = (FILE, "class") if source == "file" else (name, "file")
    note = (
        f"tokenizer: {FILE} and {name}, the class that the base's configuration calls for, differ "
        f"({', '.join(differing)}); {served} is served, --tokenizer {other} serves the other"
    )
    if source == "class":
        return LoadedTokenizer(named, note)
    # What the class knows and no file says: which of its tokens are the mask, the padding, ...
    known = own.get_vocab()
    for attribute in NAMED:
        value = getattr(named, attribute)
        if getattr(own, attribute) is None and value is not None and str(value) in known:
            setattr(own, attribute, value)
    own.model_input_names = list(named.model_input_names)
    return LoadedTokenizer(own, note)


def _differences(named: Any, own: Any) -> list[str]:
    """What two tokenizers differ in, in an operator's words."""
    one, other = named.backend_tokenizer, own.backend_tokenizer
    found = []
    if type(one.model) is not type(other.model):
        found.append(f"model {type(other.model).__name__}, not {type(one.model).__name__}")
    elif any(
        _option(one.model, option) != _option(other.model, option) for option in MODEL_OPTIONS
    ):
        found.append("options of the model")
    if one.get_vocab(with_added_tokens=False) != other.get_vocab(with_added_tokens=False):
        found.append("vocabulary")
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if _state(getattr(one, part)) != _state(getattr(other, part)):
            found.append(part.replace("_", "-"))
    changed = [text for text in PROBES if _ids(named, text) != _ids(own, text)]
    if changed:
        found.append(f"ids of {changed[0]!r}" + (" and more" if len(changed) > 1 else ""))
    return found


def _option(model: Any, name: str) -> Any:
    value = getattr(model, name, None)
    return None if value == "" else value  # two ways of saying that there is none


def _state(part: Any) -> Any:
    return None if part is None else part.__getstate__()


def _ids(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    ids: list[int] = tokenizer(
        text, add_special_tokens=special, truncation=False, verbose=False
    )["input_ids"]  # fmt: skip
    return ids


def _is_of_use(tokenizer: Any) -> bool:
    """Whether any word of the vocabulary is still a word when it comes as a text."""
    special = {str(one) for one in tokenizer.backend_tokenizer.get_added_tokens_decoder().values()}
    special |= {one.content for one in tokenizer.added_tokens_decoder.values()}
    words = sorted(set(tokenizer.get_vocab()) - special - set(tokenizer.all_special_tokens))
    texts = [
        tokenizer.convert_tokens_to_string([word])
        for word in words[:: max(1, len(words) // WORDS_TRIED)]
    ]
    unknown = {tokenizer.unk_token_id}
    return any(set(_ids(tokenizer, text, special=False)) - unknown for text in texts)
