import io
import json
import math
import os
import pickle
import pkgutil
import sys
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from gpt.checkpoint import (
    Checkpoint,
    load_checkpoint,
    load_training,
    save_checkpoint,
    seeded_checkpoint,
    state_of,
)
from gpt.cli import UserError
from gpt.config import GPTConfig
from gpt.files import sha256_file
from gpt.model import GPT
from gpt.tokenizer import GPT2Tokenizer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ckpt.pt"


@pytest.fixture
def saved(path: Path, config: GPTConfig) -> Path:
    save_checkpoint(path, seeded_checkpoint(config))
    return path


def resave(path: Path, **changes: object) -> None:
    """Change entries of a checkpoint behind its back."""
    torch.save(torch.load(path, weights_only=True) | changes, path)


class Intruder:
    """An object that would make a folder when unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


def test_round_trip(path, config):
    model = GPT(config)
    characters = {"kind": "characters", "characters": "abcdefghijk"}
    losses = {"step": [0, 7], "train": [2.4, 1.0], "val": [2.4, 1.5]}
    sha256 = save_checkpoint(path, Checkpoint(config, state_of(model), 7, characters, losses))
    found = load_checkpoint(path)
    assert (found.config, found.step, found.tokenizer, found.losses) == (config, 7, characters, losses)
    assert found.sha256 == sha256 == sha256_file(path)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(found.build()(ids), model.eval()(ids))


def test_the_same_checkpoint_is_the_same_file(tmp_path, config):
    one, two = (save_checkpoint(tmp_path / name, seeded_checkpoint(config)) for name in ("a.pt", "b.pt"))
    assert one == two


def test_build_gives_a_tied_model_in_eval_mode(config):
    model = seeded_checkpoint(config).build("sdpa")
    assert not model.training
    assert model.lm_head.weight is model.transformer.wte.weight


def test_training_a_built_model_leaves_the_checkpoint_alone(config):
    checkpoint = seeded_checkpoint(config)
    before = checkpoint.state["transformer.wte.weight"].clone()
    with torch.no_grad():
        checkpoint.build().transformer.wte.weight.zero_()
    assert torch.equal(checkpoint.state["transformer.wte.weight"], before)


def test_a_tied_weight_is_stored_once(saved, config):
    numbers = GPT(config).parameter_count()
    with zipfile.ZipFile(saved) as archive:
        stored = sum(entry.file_size for entry in archive.infolist() if "/data/" in entry.filename)
    assert stored == 4 * numbers


def test_a_missing_file(path):
    with pytest.raises(UserError, match=r"ckpt.pt: cannot be read \(No such file.*python -m gpt.train"):
        load_checkpoint(path)


def test_a_folder(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
def test_a_truncated_file(saved, share):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match="truncated"):
        load_checkpoint(saved)


def test_a_flipped_bit_in_a_weight(saved, config):
    content = bytearray(saved.read_bytes())
    content[len(content) // 2] ^= 1
    saved.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(saved)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK", b"\x80\x02}q\x00.", bytes(1000)])
def test_a_foreign_file(path, content):
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a checkpoint"):
        load_checkpoint(path)


def test_a_foreign_zip_file(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(UserError, match="not a checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize("content", [{"model": {}}, [1, 2], {"kind": "other"}])
def test_another_projects_checkpoint(path, content):
    torch.save(content, path)
    with pytest.raises(UserError, match="not a checkpoint: holds"):
        load_checkpoint(path)


@pytest.mark.parametrize("save", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))])
def test_a_file_that_would_run_code_does_not(saved, tmp_path, save):
    content = torch.load(saved, weights_only=True) | {"losses": Intruder(tmp_path / "intruded")}
    save(content, saved)
    with pytest.raises(UserError, match=r"refused, because it .* could run code|not a checkpoint"):
        load_checkpoint(saved)
    assert not (tmp_path / "intruded").exists()


def test_another_version_of_the_format(saved):
    resave(saved, version=2)
    with pytest.raises(UserError, match="version 2 of the checkpoint format, this code reads 1"):
        load_checkpoint(saved)


def test_a_state_of_another_shape(saved, config):
    resave(saved, config=asdict(replace(config, n_embd=32)))
    with pytest.raises(UserError, match=r"does not fit its own config: lm_head.weight is float32 \[11, 16\], not .*32"):
        load_checkpoint(saved)


def test_a_state_with_a_tensor_missing(saved, config):
    state = seeded_checkpoint(config).state
    del state["transformer.ln_f.weight"]
    resave(saved, state=state)
    with pytest.raises(UserError, match=r"transformer.ln_f.weight is absent, not float32 \[16\]"):
        load_checkpoint(saved)


def test_a_state_with_a_tensor_too_many(saved, config):
    resave(saved, state=seeded_checkpoint(config).state | {"extra": torch.zeros(2)})
    with pytest.raises(UserError, match="extra is float32"):
        load_checkpoint(saved)


def test_a_state_of_another_dtype(saved, config):
    resave(saved, state={name: tensor.half() for name, tensor in seeded_checkpoint(config).state.items()})
    with pytest.raises(UserError, match="is float16"):
        load_checkpoint(saved)


def test_a_head_that_is_not_tied(saved, config):
    state = seeded_checkpoint(config).state
    resave(saved, state=state | {"lm_head.weight": state["lm_head.weight"] + 1})
    with pytest.raises(UserError, match=r"lm_head.weight differs from"):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    "changes",
    [
        {"state": [1]},
        {"state": {"a": 1}},
        {"config": {"n_layer": 0}},
        {"config": {"depth": 3}},
        {"config": None},
        {"tokenizer": {"kind": "bpe"}},
        {"tokenizer": {"kind": "characters", "characters": "abcdefghijkl"}},
    ],
)
def test_entries_that_make_no_sense(saved, changes):
    resave(saved, **changes)
    with pytest.raises(UserError, match=r"ckpt.pt: (is damaged|does not fit)"):
        load_checkpoint(saved)


def test_an_unwritable_place(config):
    with pytest.raises(UserError, match=r"cannot write /dev/null/ckpt.pt"):
        save_checkpoint("/dev/null/ckpt.pt", seeded_checkpoint(config))


def test_seeded_depends_on_the_seed_alone(config):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = seeded_checkpoint(config, seed=3).state
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second, other = (seeded_checkpoint(config, seed=seed).state for seed in (3, 4))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_seeded_moves_every_gain_and_bias(config):
    checkpoint = seeded_checkpoint(config)
    assert checkpoint.tokenizer == {"kind": "none"}
    ids = torch.arange(8)[None]
    wanted = checkpoint.build()(ids)
    for name in checkpoint.state:
        model = checkpoint.build()
        with torch.no_grad():
            parameter = model.get_parameter(name)
            parameter.copy_(torch.ones_like(parameter) if name.endswith("weight") and parameter.dim() == 1 else 0)
        assert not torch.allclose(model(ids), wanted, atol=1e-5), name


def test_the_tokenizer_is_plain_json(trained):
    assert json.loads(json.dumps(trained.tokenizer)) == trained.tokenizer


def test_weights_only_content(saved):
    assert "state" in torch.load(io.BytesIO(saved.read_bytes()), weights_only=True)


def test_the_state_of_training_rides_along_and_inference_leaves_it_out(path, config):
    wanted = seeded_checkpoint(config)
    training = {"position": 7, "rng": [{"cpu": torch.get_rng_state()}]}
    save_checkpoint(path, wanted, training)
    checkpoint, found = load_training(path)
    assert found["position"] == 7
    assert torch.equal(found["rng"][0]["cpu"], training["rng"][0]["cpu"])
    assert load_checkpoint(path).sha256 == checkpoint.sha256
    assert all(torch.equal(tensor, load_checkpoint(path).state[name]) for name, tensor in wanted.state.items())


def test_a_model_alone_is_nothing_to_go_on_with(saved):
    with pytest.raises(UserError, match=r"ckpt.pt: holds a model, but no training to go on with"):
        load_training(saved)


def test_gpt2s_tokenizer_fits_its_own_vocabulary_alone(path, config):
    save_checkpoint(path, replace(seeded_checkpoint(config), tokenizer=GPT2Tokenizer().to_json()))
    with pytest.raises(UserError, match="its tokenizer has 50257 ids, but vocab_size=11"):
        load_checkpoint(path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_neither_saved_nor_read(config, tmp_path, value):
    good, path = seeded_checkpoint(config), tmp_path / "ckpt.pt"
    save_checkpoint(path, good)
    weight = "transformer.ln_f.weight"
    broken = replace(good, step=7, state=good.state | {weight: torch.full_like(good.state[weight], value)})
    with pytest.raises(
        UserError, match=rf"{weight} holds NaN or infinity at step 7: training diverged, nothing is sav"
    ):
        save_checkpoint(path, broken)
    assert load_checkpoint(path).step == 0
    torch.save(torch.load(path) | {"state": broken.state}, path)
    with pytest.raises(UserError, match=rf"{weight} holds NaN or infinity: training diverged; use an earlier checkpoi"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "arguments",
    [
        "gpt.generate ckpt.pt --temperature 0",
        "gpt.inspect ckpt.pt",
        "gpt.train tiny --init-from ckpt.pt --max-steps 1 --overwrite --device cpu -o other.pt",
        "gpt.train tiny --resume --device cpu -o own.pt",
        "export.onnx ckpt.pt -o model.onnx",
        "export.huggingface ckpt.pt -o folder",
        "export.ctranslate2 ckpt.pt -o folder",
        "tvm_frontend.compile ckpt.pt --frontend torch -o compiled",
        "bench",
        "bench.generate --engine eager",
    ],
)
def test_every_reader_names_nan_as_that(config, tmp_path, monkeypatch, arguments):
    if "ctranslate2" in arguments:
        pytest.importorskip("ctranslate2")
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    good, weight = seeded_checkpoint(config), "transformer.h.1.ln_2.bias"
    content = {"kind": "gpt-frontend checkpoint", "version": 1, "config": asdict(config), "step": 0, "losses": {}}
    state = good.state | {weight: torch.full_like(good.state[weight], math.nan)}
    content |= {"state": state, "tokenizer": good.tokenizer, "training": {}}
    for place in ("ckpt.pt", "artifacts/ckpt.pt", "own-run/step-00000001.pt"):
        Path(place).parent.mkdir(exist_ok=True)
        torch.save(content, place)
    module, *rest = arguments.split()
    monkeypatch.setattr(sys, "argv", [module, *rest])
    main = pkgutil.resolve_name(f"{module}.__main__:main" if module == "bench" else f"{module}:main")
    with pytest.raises(UserError, match=f"{weight} holds NaN or infinity: training diverged"):
        main()
    assert {path.name for path in tmp_path.iterdir()} == {"ckpt.pt", "artifacts", "own-run"}
