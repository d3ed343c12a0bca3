"""The tiny models: complete, repeatable, written once, and never over somebody's files."""

from pathlib import Path

import pytest

from sglang_mm_conn.demo import tiny_models


@pytest.fixture(scope="module", params=tiny_models.KINDS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, tiny_models.write(request.param, tmp_path_factory.mktemp("models") / request.param)


def test_transformers_reads_it(written: tuple[str, Path]) -> None:
    transformers = pytest.importorskip("transformers")
    kind, directory = written
    config = transformers.AutoConfig.from_pretrained(directory)
    assert config.model_type == kind
    assert config.architectures == [f"{tiny_models.KINDS[kind].classes}ForConditionalGeneration"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    ids = tokenizer.encode("<|vision_start|>ab")
    assert ids[0] == tiny_models.TOKEN_ID["<|vision_start|>"]
    assert tokenizer.decode(ids[1:]) == "ab"


def test_same_seed_same_weights(written: tuple[str, Path], tmp_path: Path) -> None:
    kind, directory = written
    again = tiny_models.write(kind, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (directory / "model.safetensors").read_bytes()


def test_a_finished_one_is_left_as_it_is(written: tuple[str, Path]) -> None:
    kind, directory = written
    before = (directory / "config.json").stat().st_mtime_ns
    tiny_models.write(kind, directory)
    assert (directory / "config.json").stat().st_mtime_ns == before


def test_an_older_version_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tiny_models.write("qwen2_5_vl", tmp_path / "model")
    (directory / "leftover").touch()
    monkeypatch.setattr(tiny_models, "VERSION", tiny_models.VERSION + 1)
    tiny_models.write("qwen2_5_vl", directory)
    assert not (directory / "leftover").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "no draft stays behind"


def test_other_peoples_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match="left alone"):
        tiny_models.write("qwen2_5_vl", tmp_path)
    assert (tmp_path / "notes").read_text() == "mine"


def test_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not 'qwen9'"):
        tiny_models.write("qwen9", tmp_path / "model")


@pytest.mark.parametrize("kind", tiny_models.SEEING)
def test_a_wider_one_has_embeddings_as_wide_as_its_language_model(kind: str, tmp_path: Path) -> None:
    import json

    directory = tiny_models.write(kind, tmp_path / "model", shape=tiny_models.Shape(hidden=256, layers=1))
    config = json.loads((directory / "config.json").read_text())
    vision = config["vision_config"]
    assert config["text_config"]["hidden_size"] == 256
    assert vision.get("out_hidden_size", vision["hidden_size"]) == 256
    assert tiny_models.write(kind, directory) == directory
    assert json.loads((directory / "config.json").read_text())["text_config"]["hidden_size"] == tiny_models.HIDDEN
