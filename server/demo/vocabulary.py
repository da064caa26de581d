"""Trains the demo's tokenizer and turns documents into the token streams that training reads."""

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PAD_TOKEN: Final = "<pad>"
BOS_TOKEN: Final = "<s>"
EOS_TOKEN: Final = "</s>"
# As a script of a play has it, which the base has read: it is taught no conversations.
CHAT_TEMPLATE: Final = (
    "{{ bos_token }}{% for message in messages %}{{ message.role | capitalize }}:\n"
    "{{ message.content | trim }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
VOCABULARY_TOKENS: Final = 6144
CONTEXT_TOKENS: Final = 512


def train_tokenizer(documents: Iterable[str]) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE: every string has an encoding, and decoding gives it back.

    An encoded text opens with `<s>`; `</s>` closes a document in training and is never added to a
    prompt. Ids 0, 1 and 2 are `<pad>`, `<s>` and `</s>`.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_TOKENS,
        special_tokens=[PAD_TOKEN, BOS_TOKEN, EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A",
        pair=f"{BOS_TOKEN} $A {BOS_TOKEN} $B",
        special_tokens=[(BOS_TOKEN, bpe.token_to_id(BOS_TOKEN))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD_TOKEN,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        model_max_length=CONTEXT_TOKENS,
        padding_side="right",
        truncation_side="right",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


class DocumentStream:
    """Documents as token ids, dealt out as packed windows.

    Each document is `<s> text </s>`. A pass over the documents is shuffled, joined and cut into
    windows of equal length, so no position is padding.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, documents: Sequence[str], seed: int
    ) -> None:
        encoded = tokenizer(list(documents), return_attention_mask=False, verbose=False)[
            "input_ids"
        ]
        self._documents = [
            np.array([*ids, tokenizer.eos_token_id], dtype=np.int64) for ids in encoded
        ]
        self._order = np.random.default_rng(seed)
        self._left = np.empty(0, dtype=np.int64)
        self.tokens = sum(len(document) for document in self._documents)

    def windows(self, rows: int, tokens: int) -> torch.Tensor:
        """Take the next `[rows, tokens + 1]` ids; inputs are `[:, :-1]` and targets `[:, 1:]`."""
        wanted = rows * (tokens + 1)
        while len(self._left) < wanted:
            order = self._order.permutation(len(self._documents))
            self._left = np.concatenate([self._left, *(self._documents[i] for i in order)])
        taken, self._left = self._left[:wanted], self._left[wanted:]
        return torch.from_numpy(taken.reshape(rows, tokens + 1))
