"""Files as others' training loops write them, made here by their recipes: what is read of them, and what is refused."""

import math
import os
import pickle
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from gpt.checkpoint import Checkpoint, load_checkpoint, load_training, save_checkpoint, seeded_checkpoint
from gpt.cli import UserError
from gpt.config import GPTConfig
from gpt.foreign import Hints
from gpt.foreign.llmc import HEADER_BYTES, MAGIC
from gpt.foreign.unpickle import StandIn, load_plain, load_torch
from gpt.generate import generate
from gpt.pretrained import load_pretrained
from gpt.tokenizer import CharTokenizer

CONFIG = GPTConfig(block_size=16, vocab_size=65, n_layer=2, n_head=3, n_embd=24)
ARGUMENTS = {"n_layer": 2, "n_head": 3, "n_embd": 24, "block_size": 16, "vocab_size": 65}
CHARACTERS = "".join(chr(index) for index in range(32, 97))


def weights(bias: bool = True, tied: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """A state dict that is large enough for each activation to show in the logits."""
    config = GPTConfig(**ARGUMENTS, bias=bias, tied_head=tied)
    return {name: 4 * tensor for name, tensor in seeded_checkpoint(config, seed).state.items()}


def logits_by_hand(state: dict[str, Tensor], ids: Tensor, n_head: int, activation: Any) -> Tensor:
    """GPT-2's forward pass in float64, by functions alone: the second opinion on what a file's model computes."""
    state = {name: tensor.double() for name, tensor in state.items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state.get(f"{name}.bias"), 1e-5)

    B, T = ids.shape
    x = state["transformer.wte.weight"][ids] + state["transformer.wpe.weight"][:T]
    for layer in (f"transformer.h.{i}" for i in range(2)):
        parts = linear(norm(x, f"{layer}.ln_1"), f"{layer}.attn.c_attn").chunk(3, -1)
        q, k, v = (part.view(B, T, n_head, -1).transpose(1, 2) for part in parts)
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, -1)
        x = x + linear(y, f"{layer}.attn.c_proj")
        x = x + linear(activation(linear(norm(x, f"{layer}.ln_2"), f"{layer}.mlp.c_fc")), f"{layer}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ state["lm_head.weight"].T


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def check_logits(checkpoint: Checkpoint, state: dict[str, Tensor], activation: Any) -> None:
    ids = torch.randint(65, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = checkpoint.build().double()(ids)
    torch.testing.assert_close(found, logits_by_hand(state, ids, 3, activation), atol=1e-12, rtol=0)


def nanogpt(state: dict[str, Tensor], **changes: Any) -> dict[str, Any]:
    """What nanoGPT's train.py saves."""
    content = {
        "model": state,
        "optimizer": {"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "model_args": ARGUMENTS | {"bias": "transformer.ln_f.bias" in state, "dropout": 0.2},
        "iter_num": 7,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "shakespeare_char", "n_head": 3, "out_dir": "out"},
    }
    return content | changes


def save_meta(path: Path, characters: str = CHARACTERS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    itos = dict(enumerate(characters))
    content = {"vocab_size": len(itos), "itos": itos, "stoi": {character: index for index, character in itos.items()}}
    path.write_bytes(pickle.dumps(content))


class Intruder:
    """An object that makes a folder when it is unpickled as its class says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


def config_object(module: str = "__main__", **attributes: Any) -> Any:
    """An object of a class GPTConfig that was defined in somebody's script, which is not here when it is read."""
    kind = type("GPTConfig", (), {"__module__": module})
    script = types.ModuleType(module)
    script.GPTConfig = kind  # type: ignore[attr-defined]
    found = kind()
    vars(found).update(attributes)
    return found


@pytest.fixture
def save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Save an object by torch in a folder, where the modules of its classes are known only while it is saved."""

    def write(content: Any, name: str = "ckpt.pt", **how: Any) -> Path:
        path = tmp_path / "out" / name
        path.parent.mkdir(exist_ok=True)
        with monkeypatch.context() as patch:
            for each in content.values() if isinstance(content, dict) else [content]:
                if type(each).__name__ == "GPTConfig":
                    script = types.ModuleType(type(each).__module__)
                    script.GPTConfig = type(each)  # type: ignore[attr-defined]
                    patch.setitem(__import__("sys").modules, script.__name__, script)
            torch.save(content, path, **how)
        return path

    return write


# nanoGPT's


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_nanogpts_file_has_the_exact_gelu(save, bias, prefix):
    state = weights(bias)
    found = load_checkpoint(save(nanogpt({prefix + name: tensor for name, tensor in state.items()})))
    assert found.config == GPTConfig(**ARGUMENTS, bias=bias, activation="gelu", dropout=0.2)
    assert (found.kind, found.step, found.tokenizer["kind"]) == ("nanoGPT's", 7, "none")
    check_logits(found, state, F.gelu)


def test_nanogpts_masks_are_left_out(save):
    state = weights()
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(2)}
    torch.testing.assert_close(load_checkpoint(save(nanogpt(state | masks))).state, state, atol=0, rtol=0)


@pytest.mark.parametrize("place", ["out/meta.pkl", "data/shakespeare_char/meta.pkl"])
def test_nanogpts_characters_are_those_of_its_meta(save, tmp_path, place):
    save_meta(tmp_path / place)
    found = load_checkpoint(save(nanogpt(weights())))
    assert found.tokenizer == CharTokenizer(CHARACTERS).to_json()


def test_characters_of_other_data_are_not_taken(save, tmp_path):
    save_meta(tmp_path / "out/meta.pkl", "abc")
    assert load_checkpoint(save(nanogpt(weights()))).tokenizer["kind"] == "none"


@pytest.mark.parametrize(("vocab_size", "kind"), [(50257, "gpt2"), (50304, "gpt2"), (50000, "none")])
def test_without_a_meta_nanogpts_tokens_are_gpt2s(save, vocab_size, kind):
    state = weights()
    state["transformer.wte.weight"] = state["lm_head.weight"] = torch.zeros(vocab_size, 24)
    content = nanogpt(state, model_args=ARGUMENTS | {"vocab_size": vocab_size, "bias": True, "dropout": 0.0})
    assert load_checkpoint(save(content)).tokenizer["kind"] == kind


def test_greedy_text_is_nanogpts_also_beyond_block_size(save):
    """200 tokens with the context cropped to the last block_size of them, as nanoGPT's own `generate` does."""
    state = weights()
    found = load_checkpoint(save(nanogpt(state)))
    ids = torch.tensor([[5, 9, 2]])
    for _ in range(200):
        logits = logits_by_hand(state, ids[:, -16:], 3, F.gelu)
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    for cache in (True, False):
        assert list(generate(found.build("sdpa"), [5, 9, 2], 200, temperature=0, cache=cache)) == ids[0, 3:].tolist()


def test_an_older_nanogpts_activation_can_be_said(save):
    state = weights()
    path = save(nanogpt(state))
    check_logits(load_checkpoint(path, Hints(activation="gelu_tanh")), state, tanh_gelu)


def test_settings_that_nanogpt_does_not_have_are_asked_about(save):
    path = save(nanogpt(weights(), model_args=ARGUMENTS | {"swiglu": True}))
    with pytest.raises(UserError, match=r"does not say its activation; .* --heads 3 --activation gelu_tanh -o"):
        load_checkpoint(path)


def test_settings_that_the_tensors_contradict_are_refused(save):
    path = save(nanogpt(weights(), model_args=ARGUMENTS | {"n_layer": 3}))
    with pytest.raises(UserError, match="says n_layer=3, but its tensors have 2"):
        load_checkpoint(path)


def test_nanogpts_training_cannot_be_gone_on_with(save):
    with pytest.raises(UserError, match=r"begin from its weights with: python -m gpt.train --init-from .*ckpt.pt"):
        load_training(save(nanogpt(weights())))


# build-nanogpt's, and a class that a file names


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("module", ["__main__", "train_gpt2"])
def test_build_nanogpts_config_object_is_read_as_plain_values(save, zipped, module):
    state = weights()
    content = {"model": state, "config": config_object(module, **ARGUMENTS), "step": 5, "val_loss": 3.2}
    found = load_checkpoint(save(content, _use_new_zipfile_serialization=zipped))
    assert (found.config, found.kind, found.step) == (CONFIG, "build-nanogpt's", 5)
    check_logits(found, state, tanh_gelu)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["config", "optimizer", "model"])
def test_a_file_that_would_run_something_is_refused_by_name(save, tmp_path, zipped, place):
    intruder = Intruder(tmp_path / "made")
    content = nanogpt(weights()) | {place: {"w": intruder} if place != "config" else intruder}
    path = save(content, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        UserError, match=r"could run code when loaded \((posix|os)\.mkdir\); save the model's state_dict"
    ):
        load_checkpoint(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("function", [eval, getattr, os.system], ids=["eval", "getattr", "system"])
def test_a_function_that_a_file_calls_is_never_called(tmp_path, function):
    class Caller:
        def __reduce__(self) -> tuple:
            code = f"__import__('os').mkdir({str(tmp_path / 'made')!r})"
            return function, (code, "real") if function is getattr else (code,)

    torch.save({"model": Caller()}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=f"could run code when loaded .*{function.__name__}"):
        load_checkpoint(tmp_path / "ckpt.pt")
    assert not (tmp_path / "made").exists()


def test_a_class_of_a_file_becomes_a_stand_in(save):
    path = save({"config": config_object("model", n_head=3, nested=[1, {"a": torch.ones(2)}])})
    found = load_torch(path.read_bytes())["config"]
    assert isinstance(found, StandIn)
    assert (type(found).path, found.n_head, found.nested[0]) == ("model.GPTConfig", 3, 1)


def test_numbers_of_numpy_and_paths_beside_the_weights_do_no_harm(save):
    content = nanogpt(weights(), best_val_loss=np.float64(1.5), path=Path("/a/b"), seen=np.arange(3))
    assert load_checkpoint(save(content)).kind == "nanoGPT's"


def test_a_whole_pickled_module_is_named(save):
    with pytest.raises(UserError, match=r"holds an object of the class torch\.nn\.modules\.linear\.Linear"):
        load_checkpoint(save(torch.nn.Linear(2, 3)))


# meta.pkl


def test_a_meta_that_would_run_something_is_refused_by_name(save, tmp_path):
    path = save(nanogpt(weights()))
    (path.parent / "meta.pkl").write_bytes(pickle.dumps({"itos": Intruder(tmp_path / "made")}))
    with pytest.raises(UserError, match=r"meta.pkl: not nanoGPT's meta.pkl.*it names (posix|os)\.mkdir"):
        load_checkpoint(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not nanoGPT's meta.pkl"),
        (b"\x80\x04garbage", "not nanoGPT's meta.pkl"),
        (pickle.dumps([1]), "not nanoGPT's meta.pkl"),
        (pickle.dumps({"itos": {0: "a", 2: "b"}}), "not nanoGPT's meta.pkl"),
        (pickle.dumps({"itos": {0: "a", 1: "the"}}), "has the token 'the'"),
        (pickle.dumps({"itos": {0: "a", 1: "a"}}), "characters='aa'"),
        (pickle.dumps({"itos": {0: 5}}), "has the token '5'"),
    ],
)
def test_a_meta_that_makes_no_sense_is_refused(save, content, words):
    path = save(nanogpt(weights()))
    (path.parent / "meta.pkl").write_bytes(content)
    with pytest.raises(UserError, match=f"meta.pkl: {words}"):
        load_checkpoint(path)


def test_only_plain_values_are_unpickled():
    assert load_plain(pickle.dumps({"a": [1, 2.5, None, ("b", {3})]})) == {"a": [1, 2.5, None, ("b", {3})]}
    with pytest.raises(pickle.UnpicklingError, match=r"it names collections\.OrderedDict"):
        load_plain(pickle.dumps(OrderedDict()))


# State dicts


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "module.",
        "_forward_module.",
        "model.",
        "module._orig_mod.",
        "_forward_module.model._orig_mod.",
        "_fsdp_wrapped_module.",
    ],
)
def test_a_bare_state_dict_asks_for_what_it_does_not_say(save, prefix):
    state = weights()
    path = save({prefix + name: tensor for name, tensor in state.items()})
    with pytest.raises(UserError, match=r"does not say its heads and activation; .*python -m gpt.pretrained .*ckpt.pt "
                                        r"--heads N --activation gelu_tanh -o artifacts/ckpt.pt"):  # fmt: skip
        load_checkpoint(path)
    check_logits(load_checkpoint(path, Hints(3, "relu")), state, F.relu)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "module"])
def test_lightnings_hyper_parameters_say_the_heads(save, key):
    state = weights()
    beside = {"hyper_parameters": {"lr": 1e-3, "config": {"n_head": 3, "activation": "gelu"}}, "global_step": 9}
    found = load_checkpoint(save({key: {f"model.{name}": tensor for name, tensor in state.items()}} | beside))
    assert (found.config.n_head, found.config.activation, found.step) == (3, "gelu", 9)
    check_logits(found, state, F.gelu)


def test_wrappers_within_a_model_are_taken_off(save):
    state = weights()
    wrapped = {name.replace(".h.0.", ".h.0._checkpoint_wrapped_module."): tensor for name, tensor in state.items()}
    torch.testing.assert_close(load_checkpoint(save(wrapped), Hints(3, "gelu")).state, state, atol=0, rtol=0)


def test_safetensors_are_read(tmp_path):
    state = weights()
    without_head = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    save_file(without_head, tmp_path / "model.safetensors")
    found = load_checkpoint(tmp_path / "model.safetensors", Hints(3, "gelu"))
    torch.testing.assert_close(found.state, state, atol=0, rtol=0)
    assert found.config.tied_head


def test_mingpts_file_has_a_head_of_its_own_and_masks(save):
    state = weights(tied=False)
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(2)}
    path = save(state | masks)
    with pytest.raises(UserError, match=r"does not say its heads; .* --heads N --activation gelu_tanh"):
        load_checkpoint(path)
    found = load_checkpoint(path, Hints(heads=3))
    assert (found.kind, found.config.tied_head) == ("minGPT's", False)
    check_logits(found, state, tanh_gelu)


def test_half_precision_becomes_float32(save):
    state = {name: tensor.bfloat16() for name, tensor in weights().items()}
    found = load_checkpoint(save(nanogpt(state)))
    assert {tensor.dtype for tensor in found.state.values()} == {torch.float32}


def test_biases_of_the_norms_alone_are_completed_by_zeros(save):
    state = weights()
    kept = {name: tensor for name, tensor in state.items() if not name.endswith(("attn.bias", "proj.bias", "fc.bias"))}
    found = load_checkpoint(save(nanogpt(kept)))
    assert found.config.bias
    check_logits(found, kept, F.gelu)


def test_a_layer_without_its_bias_is_damaged(save):
    state = weights()
    del state["transformer.h.1.ln_2.bias"]
    with pytest.raises(UserError, match=r"does not fit a GPT-2: transformer.h.1.ln_2.bias is absent, not \[24\]"):
        load_checkpoint(save(nanogpt(state)))


@pytest.mark.parametrize("heads", [5, 0, -3])
def test_heads_that_do_not_fit_are_refused(save, heads):
    with pytest.raises(UserError, match=r"ckpt.pt: n_(embd|head)=.* must be"):
        load_checkpoint(save(weights()), Hints(heads, "gelu"))


def test_an_activation_that_nobody_knows_is_refused():
    with pytest.raises(UserError, match="activation='swiglu': must be one of gelu_tanh, gelu, relu"):
        Hints(activation="swiglu")


def test_what_is_converted_is_a_checkpoint_of_ours(save, tmp_path):
    path = save(nanogpt(weights()))
    save_checkpoint(tmp_path / "ours.pt", load_pretrained(str(path)))
    ours = load_checkpoint(tmp_path / "ours.pt")
    assert (ours.kind, ours.step) == ("gpt-frontend's", 7)
    torch.testing.assert_close(ours.state, load_checkpoint(path).state, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            ["transformer.wte.weight", "transformer.h.0.attn.c_q.weight", "lm_head.weight"],
            "a nanochat model: rot",
        ),
        (
            ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"],
            "this is a Llama or its like",
        ),
        (["model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.bias"], "this is a Qwen2"),
        (["gpt_neox.layers.0.attention.query_key_value.weight"], "this is a GPT-NeoX"),
        (
            ["transformer.wte.weight", "transformer.h.0.attn.q_proj.weight", "transformer.h.0.mlp.fc_in.weight"],
            "a GPT-J",
        ),
        (
            ["transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.attn.attention.q_proj.weight"],
            "a GPT-Neo:",
        ),
        (["model.decoder.embed_positions.weight", "model.decoder.layers.0.self_attn.q_proj.weight"], "this is an OPT"),
        (["word_embeddings_layernorm.weight", "h.0.self_attention.query_key_value.weight"], "this is a BLOOM"),
        (["tok_emb.weight", "blocks.0.attn.key.weight"], "this is a minGPT of before 2022"),
        (
            ["a.weight", "b.weight"],
            "not a GPT-2: none of its 2 tensors is called wte.weight",
        ),
        (["transformer.wte.weight", "transformer.h.0.attn.c_attn.weight"], r"has no table of positions \(wpe.weight\)"),
    ],
)
def test_another_model_is_named(save, names, words):
    path = save({"model": {name: torch.zeros(4, 4) for name in names}, "step": 3})
    with pytest.raises(UserError, match=words) as caught:
        load_checkpoint(path)
    assert "gpt.train" not in str(caught.value)


def test_fewer_heads_of_keys_are_named(save):
    state = weights()
    state["transformer.h.0.attn.c_attn.weight"] = torch.zeros(40, 24)
    with pytest.raises(UserError, match="fewer heads of keys than of queries"):
        load_checkpoint(save(nanogpt(state)))


def test_a_tensor_of_something_else_is_named(save):
    state = weights() | {"transformer.h.0.attn.rotary.inv_freq": torch.zeros(4)}
    with pytest.raises(UserError, match=r"transformer.h.0.attn.rotary.inv_freq is \[4\], not absent"):
        load_checkpoint(save(nanogpt(state)))


def test_two_models_in_a_file_are_told_apart_by_nobody(save):
    state = weights()
    both = {f"model.{name}": tensor for name, tensor in state.items()}
    both |= {f"ema.{name}": tensor for name, tensor in state.items()}
    with pytest.raises(UserError, match=r"holds several models, as of model\.transformer\.wte\.weight, ema\."):
        load_checkpoint(save({"state_dict": both}))


# llm.c's


def llmc_file(path: Path, state: dict[str, Tensor], version: int = 3, **header: int) -> Path:
    """Write a model as llm.c's train_gpt2.py does: the embedding padded, each kind of tensor with all layers in one."""
    dtype = {5: torch.bfloat16}.get(version, torch.float32)
    sizes = {"T": 16, "V": 65, "L": 2, "nh": 3, "C": 24, "Vp": 128} | header
    names = [f"{part}.{kind}" for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
             for kind in ("weight", "bias")]  # fmt: skip
    padded = F.pad(state["transformer.wte.weight"], (0, 0, 0, 128 - 65))
    tensors = [padded, state["transformer.wpe.weight"]]
    tensors += [state[f"transformer.h.{i}.{name}"] for name in names for i in range(2)]
    tensors += [state["transformer.ln_f.weight"], state["transformer.ln_f.bias"]]
    content = np.zeros(256, np.int32)
    content[:8] = [MAGIC, version, *sizes.values()]
    bits = torch.cat([tensor.flatten() for tensor in tensors]).to(dtype).view(torch.uint8)
    path.write_bytes(content.tobytes() + bits.numpy().tobytes())
    return path


def test_llmcs_model_is_read_without_its_padding(tmp_path):
    state = weights()
    found = load_checkpoint(llmc_file(tmp_path / "gpt2.bin", state))
    assert (found.config, found.kind) == (CONFIG, "llm.c's")
    check_logits(found, state, tanh_gelu)


def test_llmcs_bfloat16_is_read(tmp_path):
    state = {name: tensor.bfloat16().float() for name, tensor in weights().items()}
    check_logits(load_checkpoint(llmc_file(tmp_path / "gpt2.bin", state, 5)), state, tanh_gelu)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-2]), r"is truncated or damaged \([\d,]+ of [\d,]+ bytes\)"),
        (lambda path: path.write_bytes(path.read_bytes()[:HEADER_BYTES]), "is truncated or damaged"),
        (lambda path: llmc_file(path, weights(), 1), "version 1 of llm.c's model files; versions 3 and 5 can be read"),
        (lambda path: llmc_file(path, weights(), L=-1), "llm.c's header says"),
        (lambda path: llmc_file(path, weights(), nh=5), "n_embd=24: must be a multiple of n_head=5"),
    ],
)
def test_llmcs_files_that_make_no_sense_are_refused(tmp_path, change, words):
    path = llmc_file(tmp_path / "gpt2.bin", weights())
    change(path)
    with pytest.raises(UserError, match=words):
        load_checkpoint(path)
