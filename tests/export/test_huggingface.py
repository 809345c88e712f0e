"""A checkpoint as a Hugging Face folder: transformers gives equal logits, CTranslate2 converts it and says the same."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from export.ctranslate2 import VOCABULARY, convert_ctranslate2
from export.huggingface import FILES, export_huggingface, tokenizer_of
from gpt.checkpoint import Checkpoint, save_checkpoint, seeded_checkpoint
from gpt.cli import UserError
from gpt.config import GPTConfig
from gpt.pretrained import load_pretrained
from gpt.tokenizer import CharTokenizer, GPT2Tokenizer, HuggingFaceTokenizer

SMALL = {"block_size": 32, "vocab_size": 61, "n_layer": 2, "n_head": 2, "n_embd": 32}
CASES = [
    {},
    {"bias": False},
    {"activation": "gelu", "tied_head": False},
    {"activation": "relu", "n_layer": 3, "n_head": 1},
    {"activation": "quick_gelu", "n_inner": 40},
    {"activation": "silu", "bias": False},
]
NOT_CTRANSLATE2S = [
    {"activation": "tanh"},
    {"layer_norm_epsilon": 1e-3},
    {"scale_attn_weights": False},
    {"scale_attn_by_inverse_layer_idx": True},
]


def checkpoint_of(**settings: object) -> Checkpoint:
    """A model of random weights, large enough that every part of it moves the logits."""
    random = seeded_checkpoint(GPTConfig(**SMALL | settings))
    return replace(random, state={name: 4 * tensor for name, tensor in random.state.items()})


def folder_of(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "ckpt.pt", checkpoint)
    return export_huggingface(tmp_path / "ckpt.pt", tmp_path / "huggingface")


def random_ids(config: GPTConfig, B: int = 2) -> torch.Tensor:
    return torch.randint(config.vocab_size, (B, config.block_size), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("settings", [*CASES, *NOT_CTRANSLATE2S], ids=str)
def test_transformers_gives_equal_logits(settings: dict, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    checkpoint = checkpoint_of(**settings)
    folder = folder_of(checkpoint, tmp_path)
    theirs, found = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values())  # no key missing or left over
    ids = random_ids(checkpoint.config)
    with torch.inference_mode():
        expected = checkpoint.build()(ids)
        torch.testing.assert_close(theirs(ids).logits, expected, atol=2e-6 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_ctranslate2_converts_and_agrees(settings: dict, tmp_path: Path) -> None:
    ctranslate2 = pytest.importorskip("ctranslate2")
    pytest.importorskip("transformers")
    checkpoint = checkpoint_of(**settings)
    folder = folder_of(checkpoint, tmp_path)
    ctranslate2.converters.TransformersConverter(str(folder)).convert(str(tmp_path / "converted"))
    generator = ctranslate2.Generator(str(tmp_path / "converted"), device="cpu", intra_threads=1)
    model, ids = checkpoint.build(), random_ids(checkpoint.config)
    tokens = [[f"<{index}>" for index in row] for row in ids.tolist()]
    with torch.inference_mode():
        expected = model(ids).numpy()
        logits = np.array(generator.forward_batch(tokens))
        assert np.abs(logits - expected).max() < 5e-6 * np.abs(expected).max()
        greedy = ids[:1, :5]
        while greedy.shape[1] < checkpoint.config.block_size:
            greedy = torch.cat([greedy, model(greedy)[:, -1:].argmax(-1)], dim=1)
    settings = {"max_length": 27, "sampling_topk": 1, "end_token": [], "include_prompt_in_result": False}
    [found] = generator.generate_batch([tokens[0][:5]], **settings)
    assert found.sequences_ids[0] == greedy[0, 5:].tolist()


@pytest.mark.parametrize("settings", NOT_CTRANSLATE2S, ids=str)
def test_what_ctranslate2_would_compute_otherwise_is_refused(settings: dict, tmp_path: Path) -> None:
    pytest.importorskip("ctranslate2")
    pytest.importorskip("transformers")
    save_checkpoint(tmp_path / "ckpt.pt", checkpoint_of(**settings))
    [(name, value)] = settings.items()
    with pytest.raises(UserError, match=f"ckpt.pt: {name}={value!r}: CTranslate2's GPT-2 "):
        convert_ctranslate2(tmp_path / "ckpt.pt", tmp_path / "ctranslate2")
    assert not (tmp_path / "ctranslate2").exists()


def test_ctranslate2_speaks_of_ids_that_the_tokenizer_has_not(tmp_path: Path) -> None:
    pytest.importorskip("ctranslate2")
    pytest.importorskip("transformers")
    padded = replace(checkpoint_of(vocab_size=61), tokenizer=CharTokenizer("abc").to_json())
    save_checkpoint(tmp_path / "ckpt.pt", padded)
    vocabulary = json.loads((convert_ctranslate2(tmp_path / "ckpt.pt", tmp_path / "out") / VOCABULARY).read_text())
    assert vocabulary[:4] == ["a", "b", "c", "<3>"]
    assert len(set(vocabulary)) == 61


def test_a_tokenizer_of_hugging_faces_is_handed_on(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    characters = tokenizer_of(replace(checkpoint_of(vocab_size=3), tokenizer=CharTokenizer("abc").to_json()))
    own = HuggingFaceTokenizer.of(characters["tokenizer.json"], "tokenizer.json")
    folder = folder_of(replace(checkpoint_of(), tokenizer=own.to_json()), tmp_path)
    assert transformers.AutoTokenizer.from_pretrained(folder)("cab")["input_ids"] == own.encode("cab") == [2, 0, 1]
    assert load_pretrained(str(folder)).tokenizer == own.to_json()


def test_it_reads_back_as_the_same_checkpoint(tmp_path: Path) -> None:
    checkpoint = checkpoint_of()
    back = load_pretrained(str(folder_of(checkpoint, tmp_path)))
    assert back.config == checkpoint.config
    torch.testing.assert_close(back.state, checkpoint.state, atol=0, rtol=0)


def test_a_character_is_the_same_id_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    text = "\n !?aäß字🙂"
    ours = CharTokenizer.of_text(text)
    checkpoint = replace(checkpoint_of(vocab_size=ours.vocab_size), tokenizer=ours.to_json())
    theirs = transformers.AutoTokenizer.from_pretrained(folder_of(checkpoint, tmp_path))
    said = "a  \n\nß?🙂 !字"
    assert theirs(said)["input_ids"] == ours.encode(said)
    assert theirs.decode(ours.encode(said)) == said
    with pytest.raises(Exception, match=r"Missing \[UNK\] token"):
        theirs("b")


def test_gpt2s_tokens_are_the_same_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = GPT2Tokenizer()
    text = "Hello world's  café\n\n  日本語 🙂 <b>1234</b>\t" + Path(__file__).read_text()
    try:
        ids = ours.encode(text)
    except UserError as error:
        pytest.skip(str(error))
    checkpoint = replace(checkpoint_of(vocab_size=ours.vocab_size, n_layer=1), tokenizer=ours.to_json())
    folder = folder_of(checkpoint, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == text
    assert theirs.eos_token_id == json.loads((folder / "config.json").read_text())["eos_token_id"] == ours.end_of_text
    assert load_pretrained(str(folder)).tokenizer == ours.to_json()


def test_a_bigram_is_refused(tmp_path: Path) -> None:
    checkpoint = seeded_checkpoint(GPTConfig.bigram(vocab_size=5, block_size=4))
    with pytest.raises(UserError, match="is a bigram; only a gpt can be written as a GPT-2"):
        folder_of(checkpoint, tmp_path)
    assert not (tmp_path / "huggingface").exists()


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "huggingface").mkdir()
    (tmp_path / "huggingface" / "thesis.txt").write_text("dear")
    with pytest.raises(UserError, match="exists and is no GPT-2 folder of ours"):
        folder_of(checkpoint_of(), tmp_path)
    (tmp_path / "huggingface" / "thesis.txt").unlink()
    assert {file.name for file in folder_of(checkpoint_of(), tmp_path).iterdir()} == set(FILES)
    folder_of(checkpoint_of(), tmp_path)  # its own it replaces
