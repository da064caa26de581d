"""Files by which sentence-transformers says how a model pools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MODELS = "sentence_transformers.models."

FLAGS = ("cls_token", "mean_tokens", "lasttoken", "max_tokens", "mean_sqrt_len_tokens")


def modules(*kinds: str, prefix: str = MODELS) -> list[dict[str, Any]]:
    return [
        {"idx": n, "name": str(n), "path": f"{n}_{kind}" if n else "", "type": prefix + kind}
        for n, kind in enumerate(("Transformer", *kinds))
    ]


def flags(*chosen: str) -> dict[str, Any]:
    return {"word_embedding_dimension": 64} | {
        f"pooling_mode_{name}": name in chosen for name in (*FLAGS, "weightedmean_tokens")
    }


def declare(
    folder: Path,
    pooling: Any,
    *kinds: str,
    listed: Any = None,
    **others: Any,
) -> Path:
    """Write a declaration into a folder, nested as the library saves it."""
    kinds = kinds or ("Pooling",)
    (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
    (folder / "modules.json").write_text(json.dumps(modules(*kinds) if listed is None else listed))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    for name, content in others.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder
