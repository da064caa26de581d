"""What an adapter can be for."""

from __future__ import annotations

from typing import Final, Literal

Task = Literal[
    "text-classification",
    "token-classification",
    "fill-mask",
    "text-generation",
    "feature-extraction",
    "question-answering",
    "image-classification",
]
# Tasks whose head the adapter must bring.
HEADED: Final = frozenset(
    {"text-classification", "token-classification", "question-answering", "image-classification"}
)
# Families whose backbone is a row of patches for each image, whatever its size: those served.
IMAGE_MODELS: Final = frozenset({"vit", "deit", "dinov2"})
