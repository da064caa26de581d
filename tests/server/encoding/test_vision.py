"""Image classification on a vision transformer: the engine against float64, and what is refused."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapters.errors import AdapterError
from adapters.intake.checkpoint import load_adapter
from server.base.load import BaseModelError, load_base
from server.base.plan import plan_base
from server.base.skeletons import Skeletons
from server.engine.engine import Engine, EngineFailure
from server.inputs.images import ImageProcessorError, Images
from server.inputs.text_errors import InvalidInput
from server.messages import EncodeRequest, EncodeResult, Failure, TokenizedInput
from tests.stand import tiny_bases
from tests.stand.pictures import LABELS, TASK, bomb, expected, logits_of, pictures, prepared
from tests.stand.tiny_bases import Reference, assert_close, image, image_file

pytest.importorskip("PIL", reason="Pillow is an extra of the project (vision)")

PROBLEMS = {"flags": "multi_label_classification", "age": "regression"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bases.base_folder(tmp_path_factory.mktemp("vision"), "vit")


@pytest.fixture(scope="module")
def folders(base: Path) -> dict[str, Path]:
    root = base.parent
    return {
        name: tiny_bases.adapter(
            root / name,
            base,
            TASK,
            method="lora" if name == "flags" else "hira",
            labels=labels,
            problem_type=PROBLEMS.get(name),
            seed=seed,
        )
        for seed, (name, labels) in enumerate(LABELS.items())
    }


@pytest.fixture(scope="module")
def engine(base: Path, folders: dict[str, Path]) -> Iterator[Engine]:
    made = Engine.build(tiny_bases.options(base, base.parent / "store"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def versions(base: Path, folders: dict[str, Path]) -> dict[str, str]:
    store = base.parent / "store"
    return {name: tiny_bases.stored(store, folder) for name, folder in folders.items()}


def test_a_mixed_batch_equals_each_row_alone_and_dense_float64(
    engine: Engine, folders: dict[str, Path], versions: dict[str, str]
) -> None:
    files = [image_file(one) for one in pictures()]
    alone = {
        name: [engine.encode([one], task=TASK, version=version).outputs[0] for one in files]
        for name, version in versions.items()
    }
    for name, version in versions.items():
        encoded = engine.inputs.tokenize(files, TASK)  # type: ignore[arg-type]
        engine.submit(EncodeRequest(name, TASK, name, version, encoded))
    events: Any = engine.step()
    step = engine.last_step
    assert step is not None
    assert (step.rows, step.adapters) == (len(files) * len(versions), len(versions))
    mixed = {event.id: event.outputs for event in events}
    for name, folder in folders.items():
        reference = Reference(folder.parent / "vit", folder, TASK)
        for index, picture in enumerate(pictures()):
            wanted = expected(name, logits_of(reference, picture))
            assert_close(mixed[name][index], wanted)
            assert_close(mixed[name][index], alone[name][index])


def test_the_adapters_change_the_patches_and_the_layers(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        whole = Reference(folder.parent / "vit", folder, TASK)
        bare = Reference(folder.parent / "vit", None, "")
        for path in ("embeddings.patch_embeddings.projection", "layers.0.mlp.fc1"):
            adapted = whole.model.vit.get_submodule(path).weight
            assert (adapted - bare.model.get_submodule(path).weight).norm() > 0.1


def test_vectors_of_images_are_the_class_token_of_the_base(engine: Engine, base: Path) -> None:
    bare = Reference(base, None, "").model
    picture = pictures()[1]
    with torch.no_grad():
        hidden = bare(pixel_values=prepared(picture)[None]).last_hidden_state[0]
    for pooling, vector in (("cls", hidden[0]), ("mean", hidden.mean(0))):
        found = engine.encode(
            [image_file(picture)], task="feature-extraction", pooling=pooling, normalize=False
        ).outputs[0]
        assert found == pytest.approx(vector.tolist(), abs=2e-5)
    default = engine.encode([image_file(picture)], task="feature-extraction").outputs[0]
    assert default == pytest.approx((hidden[0] / hidden[0].norm()).tolist(), abs=2e-5)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_linear_layers_are_quantized_and_the_patches_are_not(
    base: Path, folders: dict[str, Path], versions: dict[str, str], quantization: str
) -> None:
    options = tiny_bases.options(base, base.parent / "store", quantization=quantization)
    loaded = load_base(options)
    assert loaded.adapted.signature.layers["vit.embeddings.patch_embeddings.projection"]
    weight = loaded.backbone.embeddings.patch_embeddings.projection.weight
    assert weight.dtype == torch.float32
    assert loaded.backbone.layers[0].mlp.fc1.quantized.kind == quantization
    engine = Engine.build(options)
    found = engine.encode([image_file(pictures()[0])], task=TASK, version=versions["pets"])
    wanted = expected("pets", logits_of(Reference(base, folders["pets"], TASK), pictures()[0]))
    assert_close(
        sorted(found.outputs[0], key=lambda one: one["label"]),
        sorted(wanted, key=lambda one: one["label"]),
        0.25,  # what quantization itself may cost; exactness is judged elsewhere
    )
    engine.close()


def test_the_processor_prepares_as_pillow_and_numpy_do(engine: Engine) -> None:
    images = engine.inputs
    assert isinstance(images, Images)
    for picture in pictures():
        (item,) = images.tokenize([image_file(picture)], "image-classification")
        found = torch.frombuffer(bytearray(item.pixels), dtype=torch.float32).view(item.shape)
        torch.testing.assert_close(found.double(), prepared(picture), atol=1e-6, rtol=0)
        assert item.tokens == 17


def test_files_base64_and_data_urls_are_the_same_image(engine: Engine) -> None:
    images: Any = engine.inputs
    raw = image_file(pictures()[1])
    text = base64.b64encode(raw).decode()
    lines = "\n".join(text[at : at + 76] for at in range(0, len(text), 76))
    forms = [raw, text, lines, f"data:image/png;base64,{text}"]
    first, *rest = images.tokenize(forms, TASK)
    assert all(one == first for one in rest)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "BMP"])
def test_other_formats_are_read(engine: Engine, kind: str) -> None:
    images: Any = engine.inputs
    (item,) = images.tokenize([image_file(image(40, 30), kind)], TASK)
    (plain,) = images.tokenize([image_file(image(40, 30))], TASK)
    one, other = (np.frombuffer(each.pixels, dtype=np.float32) for each in (item, plain))
    assert np.abs(one - other).mean() < 0.2


def test_a_photograph_is_turned_upright(engine: Engine) -> None:
    from PIL import Image

    images: Any = engine.inputs
    picture = image(40, 30)
    marked = Image.Exif()
    marked[0x0112] = 6  # taken with the camera on its side
    turned = image_file(picture, "JPEG", exif=marked, quality=100, subsampling=0)
    upright = image_file(picture.rotate(-90, expand=True), "JPEG", quality=100, subsampling=0)
    one, other = (
        np.frombuffer(images.tokenize([file], TASK)[0].pixels, dtype=np.float32)
        for file in (turned, upright)
    )
    assert np.abs(one - other).mean() < 0.02


@pytest.mark.parametrize(
    ("sent", "code", "found"),
    [
        (b"plainly not an image", "invalid_request", "20 bytes"),
        ("A wonderful film.", "invalid_request", "not base64"),
        ("https://example.com/cat.png", "invalid_request", "nothing is fetched"),
        (("a", "pair"), "invalid_request", "pair"),
        ("aGVsbG8=", "invalid_request", "5 bytes"),
        (b"", "invalid_request", "0 bytes"),
        (image_file(image(16, 16))[:90], "invalid_request", "damaged PNG"),
        (image_file(image(400, 2)), "invalid_request", "400 x 2"),
        (image_file(image(300, 200)), "input_too_long", "300 x 200"),
        (bomb(), "input_too_long", ""),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "invalid_request", "bytes"),
    ],
)
def test_what_is_no_usable_image_is_refused_by_name(
    base: Path, sent: Any, code: str, found: str
) -> None:
    plan = plan_base(tiny_bases.options(base, base.parent / "store"))
    images = Images.load(base, plan.config, max_pixels=50_000, max_request_pixels=1 << 20)
    with pytest.raises(InvalidInput) as caught:
        images.tokenize([image_file(image(16, 16)), sent], "image-classification")
    assert caught.value.code == code
    assert "Input 1" in caught.value.message
    assert found in str(caught.value.found)
    assert caught.value.expected


def test_texts_on_a_base_of_images_and_images_on_a_base_of_texts_fail(
    engine: Engine, versions: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match="not an image"):
        engine.encode(["A wonderful film."], task=TASK, version=versions["pets"])
    for task in ("text-classification", "fill-mask", "token-classification"):
        kind: Any = task
        request = EncodeRequest("r", kind, "pets", versions["pets"], (TokenizedInput((2, 3)),))
        with pytest.raises(EngineFailure) as caught:
            engine.run(request)
        assert caught.value.failure.code == "task_mismatch"
    request = EncodeRequest("r", TASK, "pets", versions["pets"], (TokenizedInput((2, 3)),))
    with pytest.raises(EngineFailure) as caught:
        engine.run(request)
    assert caught.value.failure.code == "invalid_input"
    text_base = tiny_bases.base_folder(tmp_path, "bert")
    texts = Engine.build(tiny_bases.options(text_base, tmp_path / "store"))
    images: Any = engine.inputs
    pixels = images.tokenize([image_file(image(16, 16))], TASK)
    features: Any = "feature-extraction"
    for task, code in ((TASK, "task_mismatch"), (features, "invalid_input")):
        with pytest.raises(EngineFailure) as caught:
            texts.run(EncodeRequest("r", task, None, None, pixels))
        assert caught.value.failure.code == code
    texts.close()


def test_other_pixels_than_the_base_takes_are_refused(
    engine: Engine, versions: dict[str, str]
) -> None:
    from dataclasses import replace

    images: Any = engine.inputs
    (item,) = images.tokenize([image_file(image(16, 16))], TASK)
    for wrong in (replace(item, shape=(3, 8, 32)), replace(item, shape=(3, 32, 8))):
        engine.submit(EncodeRequest("r", TASK, "pets", versions["pets"], (wrong,)))
        (event,) = engine.step()
        assert isinstance(event, Failure)
        assert event.code == "invalid_input"
    engine.submit(EncodeRequest("r", TASK, "pets", versions["pets"], (item,)))
    (done,) = engine.step()
    assert isinstance(done, EncodeResult)


def refused(base: Path, tmp_path: Path, error: Any = ImageProcessorError, **processor: Any) -> Any:
    """The error of a copy of the base with another processor beside it."""
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    path = copy / "preprocessor_config.json"
    known = json.loads(path.read_text())
    path.write_text(json.dumps(known | processor))
    if not processor:
        path.unlink()
    with pytest.raises(error) as caught:
        Engine.build(tiny_bases.options(copy, tmp_path / "store"))
    assert caught.value.code == "base_unusable"
    return caught.value


@pytest.mark.parametrize(
    ("processor", "found"),
    [
        ({}, "no preprocessor_config.json"),
        ({"size": 32}, "(1, 3, 32, 32)"),
        ({"do_resize": False}, "and"),
        ({"image_processor_type": "NobodysImageProcessor"}, "Error"),
    ],
)
def test_a_processor_that_does_not_fit_the_base_is_refused_at_the_start(
    base: Path, tmp_path: Path, processor: dict[str, Any], found: str
) -> None:
    assert found in refused(base, tmp_path, **processor).found


def test_families_that_are_no_row_of_patches_are_refused(tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    ResNetModel(config).save_pretrained(tmp_path / "base")
    with pytest.raises(BaseModelError, match="resnet"):
        load_base(tiny_bases.options(tmp_path / "base", tmp_path))


@pytest.mark.parametrize("family", ["deit", "dinov2"])
def test_other_vision_transformers_classify_as_their_own_class_does(
    tmp_path: Path, family: str
) -> None:
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, image_size=16, patch_size=4, mlp_ratio=2,
    )  # fmt: skip
    root = tmp_path / family
    AutoModel.from_config(config).save_pretrained(root)
    processor = {"image_processor_type": "ViTImageProcessor", "size": 16}
    (root / "preprocessor_config.json").write_text(json.dumps(processor))
    targets = ["projection", "fc1", "query" if family == "dinov2" else "q_proj"]
    folder = tiny_bases.adapter(
        tmp_path / "adapter", root, TASK, labels=LABELS["pets"], targets=targets
    )
    engine = Engine.build(tiny_bases.options(root, tmp_path / "store"))
    version = tiny_bases.stored(tmp_path / "store", folder)
    reference = Reference(root, folder, TASK)
    for picture in pictures()[:2]:
        found = engine.encode([image_file(picture)], task=TASK, version=version).outputs[0]
        assert_close(found, expected("pets", logits_of(reference, picture)))
    engine.close()


def test_an_adapter_for_texts_does_not_fit_a_base_of_images(base: Path, tmp_path: Path) -> None:
    text_base = tiny_bases.base_folder(tmp_path, "bert")
    folder = tiny_bases.adapter(tmp_path / "a", text_base, "text-classification")
    loaded = load_base(tiny_bases.options(base, tmp_path))
    with pytest.raises(AdapterError) as caught:
        load_adapter(folder, loaded.adapted.signature)
    assert caught.value.code == "base_mismatch"


def test_a_task_of_texts_on_a_base_of_images_has_no_head(
    base: Path, folders: dict[str, Path]
) -> None:
    from dataclasses import replace

    loaded = load_base(tiny_bases.options(base, base.parent))
    weights = load_adapter(folders["pets"], loaded.adapted.signature)
    assert weights.task == TASK
    skeletons = Skeletons(loaded.config, 0, has_pooler=True)
    skeletons.check(weights)
    with pytest.raises(AdapterError, match="no head for token-classification"):
        skeletons.check(replace(weights, task="token-classification"))
