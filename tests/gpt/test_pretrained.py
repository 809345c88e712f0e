import functools
import http.server
import json
import os
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt.checkpoint import load_checkpoint, save_checkpoint
from gpt.cli import UserError
from gpt.foreign import Hints
from gpt.foreign.huggingface import CONFIG, PICKLED, SHARDS, WEIGHTS
from gpt.pretrained import load_pretrained
from gpt.tokenizer import tokenizer_from_json

SMALL = {"n_positions": 32, "vocab_size": 61, "n_layer": 2, "n_head": 2, "n_embd": 16}


@pytest.fixture
def save(tmp_path):
    """Save a GPT-2 of transformers with random weights in a folder, and return both."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed; it is in the extra dev")

    def save_model(kind="GPT2LMHeadModel", **settings):
        torch.manual_seed(0)
        config = transformers.GPT2Config(**(SMALL | settings), bos_token_id=0, eos_token_id=0, pad_token_id=0)
        model = getattr(transformers, kind)(config).eval()
        with torch.no_grad():  # their biases begin at 0 and gains at 1, which would hide one left out
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / "model")
        return model, tmp_path / "model"

    return save_model


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"n_layer": 4, "n_head": 4, "n_embd": 64, "n_positions": 128, "vocab_size": 300},
        {"n_head": 1, "activation_function": "relu"},
        {"n_layer": 1, "activation_function": "gelu", "n_inner": 64},
        {"tie_word_embeddings": False},
        {"n_embd": 48, "n_head": 3, "vocab_size": 50257},
        {"n_inner": 40, "layer_norm_epsilon": 1e-6},
        {"activation_function": "gelu_fast", "scale_attn_by_inverse_layer_idx": True},
        {"activation_function": "gelu_python", "scale_attn_weights": False},
        {"activation_function": "quick_gelu", "scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
        {"activation_function": "silu", "layer_norm_epsilon": 0.1},
        {"activation_function": "swish"},
        {"activation_function": "gelu_accurate"},
        {"activation_function": "tanh", "n_inner": 1},
        {"reorder_and_upcast_attn": True},
    ],
)
def test_logits_are_those_of_transformers(save, settings):
    theirs, folder = save(**settings)
    ours = load_pretrained(str(folder)).build("sdpa")
    config = theirs.config
    ids = torch.randint(config.vocab_size, (2, config.n_positions), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "kind", ["GPT2ForSequenceClassification", "GPT2ForTokenClassification", "GPT2DoubleHeadsModel", "GPT2Model"]
)
def test_of_a_model_with_other_heads_the_language_model_is_read(save, kind):
    model, folder = save(kind)
    found = load_pretrained(str(folder)).state
    body = model if kind == "GPT2Model" else model.transformer
    torch.testing.assert_close(found["lm_head.weight"], body.wte.weight.detach(), atol=0, rtol=0)
    assert len(found) == 2 * 12 + 5


def test_pytorch_model_bin_alone_is_read_whole_or_split(save):
    _, folder = save()
    expected = load_pretrained(str(folder)).state
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(weights, folder / PICKLED)
    torch.testing.assert_close(load_pretrained(str(folder)).state, expected, atol=0, rtol=0)
    torch.testing.assert_close(load_checkpoint(folder / PICKLED).state, expected, atol=0, rtol=0)
    (folder / PICKLED).unlink()
    names = sorted(weights)
    table = {}
    for number, part in enumerate((names[:9], names[9:]), 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: weights[name] for name in part}, folder / file)
        table |= dict.fromkeys(part, file)
    (folder / SHARDS[1]).write_text(json.dumps({"weight_map": table}))
    torch.testing.assert_close(load_pretrained(str(folder)).state, expected, atol=0, rtol=0)


def test_a_single_file_has_the_config_beside_it(save):
    _, folder = save(activation_function="relu")
    found = load_checkpoint(folder / WEIGHTS)
    assert found.config == load_checkpoint(folder).config
    assert found.config.activation == "relu"
    (folder / CONFIG).unlink()
    with pytest.raises(UserError, match="does not say its heads and activation"):
        load_checkpoint(folder / WEIGHTS)
    torch.testing.assert_close(load_checkpoint(folder / WEIGHTS, Hints(2, "relu")).state, found.state, atol=0, rtol=0)


def test_a_pickled_file_that_would_run_something_is_refused(save, tmp_path):
    class Intruder:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    _, folder = save()
    (folder / WEIGHTS).unlink()
    torch.save({"transformer.wte.weight": Intruder()}, folder / PICKLED)
    with pytest.raises(UserError, match=r"pytorch_model.bin: refused, as it would run (posix|os)\.mkdir when loaded"):
        load_pretrained(str(folder))
    assert not (tmp_path / "made").exists()


def test_older_files_have_no_prefix_and_hold_masks(save):
    _, folder = save()
    expected = load_pretrained(str(folder)).state
    weights = {name.removeprefix("transformer."): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32).tril() for i in range(2)}
    save_file(weights | masks, folder / WEIGHTS)
    torch.testing.assert_close(load_pretrained(str(folder)).state, expected, atol=0, rtol=0)


def test_half_precision_becomes_float32(save):
    _, folder = save()
    weights = load_file(folder / WEIGHTS)
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}, folder / WEIGHTS)
    state = load_pretrained(str(folder)).state
    torch.testing.assert_close(state["transformer.wte.weight"], weights["transformer.wte.weight"], atol=0.01, rtol=0.01)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_a_split_model_is_read_whole(save):
    model, folder = save()
    expected = load_pretrained(str(folder)).state
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="8KB")
    assert (folder / SHARDS[0]).is_file()
    torch.testing.assert_close(load_pretrained(str(folder)).state, expected, atol=0, rtol=0)


# The tokenizer


def test_another_vocabulary_has_no_tokenizer(save):
    assert load_pretrained(str(save()[1])).tokenizer == {"kind": "none"}


@pytest.mark.parametrize(("vocab_size", "kind"), [(50257, "gpt2"), (50258, "gpt2"), (50304, "gpt2"), (50256, "none")])
def test_a_vocabulary_as_gpt2s_or_padded_has_gpt2s_tokenizer(save, vocab_size, kind):
    assert load_pretrained(str(save(vocab_size=vocab_size)[1])).tokenizer["kind"] == kind


def test_a_folders_own_tokenizer_is_kept_and_spells_as_transformers_does(save, tmp_path):
    transformers = pytest.importorskip("transformers")
    _, folder = save(vocab_size=280)
    tokenizer = tokenizers_of_bytes()
    tokenizer.train_from_iterator(["the cat sat on the mat ☃"] * 9, vocab_trainer(270))
    tokenizer.save(str(folder / "tokenizer.json"))
    found = load_pretrained(str(folder))
    save_checkpoint(tmp_path / "ckpt.pt", found)
    ours = tokenizer_from_json(load_checkpoint(tmp_path / "ckpt.pt").tokenizer)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    for text in ("the cat", " a ☃ of <|pad|>snow", ""):
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text)) == text
    assert ours.decode([279]) == "\ufffd"  # an id of the model that the tokenizer has not


def test_byte_pairs_of_a_slow_tokenizer_are_its_own(save):
    pytest.importorskip("tokenizers")
    _, folder = save()
    (folder / "merges.txt").write_text("#version: 0.2\na b\nab c\n")
    assert load_pretrained(str(folder)).tokenizer == {"kind": "none"}  # what they are called is not known
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4}))
    tokenizer = tokenizer_from_json(load_pretrained(str(folder)).tokenizer)
    assert tokenizer.encode("abcab") == [4, 3]
    assert tokenizer.decode([4, 3]) == "abcab"


def test_a_tokenizer_larger_than_the_vocabulary_is_of_another_model(save):
    _, folder = save()
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 61}}}))
    with pytest.raises(UserError, match="its tokenizer has 62 ids, but vocab_size=61"):
        load_pretrained(str(folder))


def tokenizers_of_bytes():
    tokenizers = pytest.importorskip("tokenizers")
    found = tokenizers.Tokenizer(tokenizers.models.BPE())
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = tokenizers.decoders.ByteLevel()
    return found


def vocab_trainer(size):
    import tokenizers

    return tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|pad|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )


# What is refused


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "llama"),
        ("layer_norm_epsilon", "1e-6"),
        ("scale_attn_weights", 0),
        ("add_cross_attention", True),
        ("activation_function", "mish"),
        ("n_inner", 0),
        ("n_head", 3),
    ],
)
def test_a_model_that_is_not_ours_is_refused(save, field, value):
    _, folder = save()
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {field: value}))
    with pytest.raises(UserError, match=f"config.json: .*{value!r}"):
        load_pretrained(str(folder))


def test_weights_that_do_not_fit_are_named(save):
    _, folder = save()
    weights = load_file(folder / WEIGHTS)
    del weights["transformer.h.1.ln_2.bias"]
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(UserError, match=r"transformer.h.1.ln_2.bias is absent, not \[16\]"):
        load_pretrained(str(folder))
    save_file(load_file(folder / WEIGHTS) | {"transformer.extra": torch.ones(1)}, folder / WEIGHTS)
    with pytest.raises(UserError, match=r"transformer.extra is \[1\], not absent"):
        load_pretrained(str(folder))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (lambda t: t.fill_(float("nan")), "transformer.ln_f.weight holds NaN or infinity; take other weights"),
        (lambda t: t.double() * 1e300, "transformer.ln_f.weight holds NaN or infinity"),  # in float32
        (lambda t: t.to(torch.int8), r"transformer.ln_f.weight holds whole numbers \(torch.int8\)"),
        (lambda t: t[None, None], r"transformer.ln_f.weight is \[1, 1, 16\], not \[16\]"),
    ],
)
def test_weights_that_are_no_numbers_are_named(save, changed, words):
    _, folder = save()
    weights = load_file(folder / WEIGHTS)
    save_file(weights | {"transformer.ln_f.weight": changed(weights["transformer.ln_f.weight"])}, folder / WEIGHTS)
    with pytest.raises(UserError, match=words):
        load_pretrained(str(folder))


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        (CONFIG, b"{", "config.json: cannot be read as JSON"),
        (CONFIG, b"[" * 100_000, "config.json: cannot be read as JSON"),
        (CONFIG, b"\xff", "config.json: cannot be read as JSON"),
        (CONFIG, b"[]", "config.json: is not a JSON object"),
        (CONFIG, b'{"n_layer": "12"}', "config.json: n_layer='12': must be a whole number"),
        (CONFIG, b'{"n_embd": 1e3}', "config.json: n_embd=1000.0: must be a whole number"),
        (CONFIG, b'{"n_layer": 1000000000}', r"does not fit its config.json: \d+ tensors for n_layer=1000000000"),
        (CONFIG, b'{"n_head": 1, "n_embd": 2147483647}', "does not fit its config.json: no model has such sizes"),
        (CONFIG, b'{"activation_function": ["relu"]}', r"config.json: activation_function=\['relu'\]: must be one of"),
        (CONFIG, b'{"tie_word_embeddings": 1}', "config.json: tie_word_embeddings=1: must be true or false"),
        (
            SHARDS[0],
            b'{"weight_map": {"a": "../model.safetensors"}}',
            "weight_map names '../model.safetensors', no file of",
        ),
        (SHARDS[0], b'{"weight_map": {"a": ".."}}', "weight_map names '..', no file of this folder"),
        (SHARDS[0], b'{"weight_map": {"a": 5}}', "weight_map names 5, no file of this folder"),
        (SHARDS[0], b'{"weight_map": ["a"]}', r"weight_map names \['a'\], no file of this folder"),
        (SHARDS[0], b"{}", "weight_map names None, no file of this folder"),
        ("tokenizer.json", b'{"model": {"merges": 5}}', "tokenizer.json: holds no vocabulary"),
        ("tokenizer.json", b'{"model": []}', "tokenizer.json: holds no vocabulary"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": 0}, "merges": [5, ["a", 6], "\\ud800"]}}', None),
        ("merges.txt", b"\xff\xfe", "merges.txt: cannot be read as UTF-8 text"),
    ],
)
def test_a_folders_files_that_make_no_sense_are_named(save, file, content, words):
    _, folder = save()
    if file == SHARDS[0]:
        (folder / WEIGHTS).unlink()
    (folder / file).write_bytes(content)
    if words is None:
        assert load_pretrained(str(folder)).tokenizer["kind"] == "huggingface"
        return
    with pytest.raises(UserError, match=words) as caught:
        load_pretrained(str(folder))
    assert "\n" not in str(caught.value)


def test_a_tied_head_is_not_blamed_for_an_absent_embedding(save):
    _, folder = save()
    weights = load_file(folder / WEIGHTS)
    embedding = weights.pop("transformer.wte.weight")
    save_file(weights | {"lm_head.weight": embedding}, folder / WEIGHTS)
    with pytest.raises(UserError, match=r"not a GPT-2: none of its 28 tensors is called wte\.weight"):
        load_pretrained(str(folder))


@pytest.mark.parametrize("content", [b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{", b"PK\x03\x04" * 10])
def test_damaged_weights_are_a_users_error(save, content):
    _, folder = save()
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_pretrained(str(folder))


def test_a_folder_without_safetensors_says_what_to_do(tmp_path):
    (tmp_path / CONFIG).write_text("{}")
    with pytest.raises(UserError, match=r"holds no model\.safetensors and no pytorch_model\.bin; save"):
        load_pretrained(str(tmp_path))


def test_an_unknown_name_lists_the_known():
    with pytest.raises(UserError, match="gpt3: no such file or folder, and not one of gpt2, gpt2-medium, "):
        load_pretrained("gpt3")


# The download


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server in the place of Hugging Face's, and the folder that it serves."""
    root = tmp_path / "hub"
    root.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=root)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        yield root
        server.shutdown()


def test_a_name_is_downloaded_once(save, hub, tmp_path):
    model, folder = save()
    published = hub / "openai-community" / "gpt2" / "resolve" / "main"
    published.parent.mkdir(parents=True)
    folder.rename(published)
    checkpoint = load_pretrained("gpt2")
    torch.testing.assert_close(checkpoint.state["lm_head.weight"], model.lm_head.weight.detach())
    assert checkpoint.tokenizer["kind"] == "gpt2"
    (published / WEIGHTS).unlink()
    assert load_pretrained("gpt2").config == checkpoint.config
    assert checkpoint.kind == "transformers'"


def test_a_failed_download_says_what_to_do_and_leaves_nothing(hub, tmp_path):
    with pytest.raises(UserError, match=r"gpt2/resolve/main/config.json: cannot be downloaded \(.*give a folder"):
        load_pretrained("gpt2")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_without_a_network_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"cannot be downloaded \(.*Connection refused.*give a folder"):
        load_pretrained("gpt2-xl")


def test_half_a_file_is_not_kept(hub, monkeypatch, tmp_path):
    def half(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b"{")

    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "do_GET", half)
    with pytest.raises(UserError, match="1 of 1000 bytes came"):
        load_pretrained("gpt2")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


@pytest.mark.slow
def test_command_writes_a_checkpoint(save, run, tmp_path):
    _, folder = save()
    done = run("gpt.pretrained", folder, "-o", "ckpt.pt")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("wrote ckpt.pt: transformers' model, 2 layers, 2 heads, width 16, gelu_tanh, ")
    checkpoint = load_checkpoint(tmp_path / "ckpt.pt")
    torch.testing.assert_close(checkpoint.state, load_pretrained(str(folder)).state, atol=0, rtol=0)
