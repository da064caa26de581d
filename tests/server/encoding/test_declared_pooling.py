"""Vectors as the base's or the adapter's own files declare them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from python_multipart.multipart import MultipartParser
from transformers import AutoModel

from adapters.intake.archive import WANTED
from server.cli.upload import SENT_FILES, files_of
from server.edge.endpoints.schemas import EmbedRequest
from server.edge.endpoints.uploads import _MultipartCallbacks
from server.engine.engine import Engine, EngineFailure
from server.messages import EncodeRequest, EncodeResult, TokenizedInput
from tests.stand import tiny_bases
from tests.stand.pooling_files import declare, flags, modules

IDS = [2, 5, 6, 7, 8, 3]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_bases.base_folder(tmp_path, "bert")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return tiny_bases.adapter(tmp_path / "adapter", base, "feature-extraction", method="lora")


@contextmanager
def serving(base: Path, store: Path) -> Iterator[Engine]:
    engine = Engine.build(tiny_bases.options(base, store))
    try:
        yield engine
    finally:
        engine.close()


def vector(engine: Engine, version: str | None = None, **options: Any) -> torch.Tensor:
    request = EncodeRequest(
        "r", "feature-extraction", version, version, (TokenizedInput(tuple(IDS)),), options=options
    )
    result = engine.run(request)
    assert isinstance(result, EncodeResult)
    return torch.tensor(result.outputs[0])


def states(base: Path, folder: Path | None = None) -> torch.Tensor:
    model: Any = AutoModel.from_pretrained(base, dtype=torch.float32)
    if folder is not None:
        model = PeftModel.from_pretrained(model, folder)
    with torch.no_grad():
        hidden: torch.Tensor = model.eval()(input_ids=torch.tensor([IDS])).last_hidden_state[0]
    return hidden


def close(got: Any, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, atol=2e-4, rtol=1e-3)


def unit(one: torch.Tensor) -> torch.Tensor:
    length: torch.Tensor = one / one.norm()
    return length


def test_the_bases_declaration_is_the_default_and_an_adapters_own_wins(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    declare(base, flags("cls_token"), "Pooling", "Normalize")
    store = tmp_path / "store"
    plain = tiny_bases.stored(store, adapter)
    mean = tiny_bases.stored(store, declare(adapter, {"pooling_mode": "mean"}))
    last = tiny_bases.stored(store, declare(adapter, flags("lasttoken"), "Pooling", "Normalize"))
    of_base, of_adapter = states(base), states(base, adapter)
    with serving(base, store) as engine:
        close(vector(engine), unit(of_base[0]))
        close(vector(engine, plain), unit(of_adapter[0]))
        close(vector(engine, mean), of_adapter.mean(0))
        close(vector(engine, last), unit(of_adapter[-1]))
        # What a request says goes before what files say.
        close(vector(engine, mean, pooling="cls", normalize=True), unit(of_adapter[0]))
        close(vector(engine, normalize=False), of_base[0])


def test_without_a_declaration_vectors_are_unit_means(tmp_path: Path, base: Path) -> None:
    with serving(base, tmp_path / "store") as engine:
        close(vector(engine), unit(states(base).mean(0)))


def test_a_base_with_another_pooling_refuses_only_the_vectors_made_so(
    tmp_path: Path, base: Path, adapter: Path, caplog: pytest.LogCaptureFixture
) -> None:
    declare(base, flags("mean_tokens"), listed=modules("Pooling", "Dense"))
    store = tmp_path / "store"
    plain = tiny_bases.stored(store, adapter)
    own = tiny_bases.stored(store, declare(adapter, flags("cls_token")))
    with serving(base, store) as engine:
        assert "Dense" in caplog.text
        close(vector(engine, own), states(base, adapter)[0])
        close(vector(engine, pooling="mean"), unit(states(base).mean(0)))
        for version in (None, *[plain] * 6):
            with pytest.raises(EngineFailure, match=r"unsupported_option.*Dense"):
                vector(engine, version)
        # It is the base's fault: the adapter is not held to have failed.
        assert not engine.snapshot().quarantined


def test_an_upload_keeps_what_lies_in_the_poolings_folder_apart(tmp_path: Path) -> None:
    parts = _MultipartCallbacks(tmp_path)
    parser = MultipartParser(b"x", parts.callbacks())  # type: ignore[arg-type]
    for name in ("config.json", "1_Pooling/config.json", "a\\2_Pooling\\config.json"):
        parser.write(
            b'--x\r\nContent-Disposition: form-data; name="files"; filename="'
            + name.encode()
            + b'"\r\n\r\n'
            + json.dumps(name).encode()
            + b"\r\n"
        )
    parser.write(b"--x--\r\n")
    parser.finalize()
    parts.close()
    assert {path.name: json.loads(path.read_text()) for path in parts.upload.files} == {
        "config.json": "config.json",
        "1_Pooling.json": "1_Pooling/config.json",
        "2_Pooling.json": "a\\2_Pooling\\config.json",
    }


def test_the_command_line_sends_every_file_of_an_adapter(adapter: Path) -> None:
    declare(adapter, flags("cls_token"))
    sent = files_of(adapter)
    assert sent["1_Pooling/config.json"] == adapter / "1_Pooling" / "config.json"
    assert set(SENT_FILES) == set(WANTED)


def test_a_request_without_a_word_on_length_leaves_it_to_the_declaration() -> None:
    assert EmbedRequest.model_validate({"inputs": "a"}).parameters.normalize is None
    body = {"inputs": "a", "parameters": {"normalize": False}}
    assert EmbedRequest.model_validate(body).parameters.normalize is False
