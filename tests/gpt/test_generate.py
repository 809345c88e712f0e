import pytest
import torch

from gpt.cache import KVCache
from gpt.checkpoint import save_checkpoint, seeded_checkpoint
from gpt.cli import UserError
from gpt.config import GPTConfig
from gpt.generate import BETWEEN_SAMPLES, Sampling, _stream_first, generate, generate_samples
from gpt.tokenizer import GPT2Tokenizer, tokenizer_from_json


@pytest.fixture
def model(config):
    return seeded_checkpoint(config).build("sdpa")


def test_greedy_takes_the_likeliest_of_the_last_block(model, config):
    ids = [1, 2, 3]
    for index in generate(model, [1, 2, 3], 20, temperature=0):
        seen = torch.tensor([ids[-config.block_size :]])
        assert index == int(model(seen)[0, -1].argmax())
        ids.append(index)
    assert len(ids) == 23


def test_the_same_seed_draws_the_same(model):
    one, two, other = (list(generate(model, [1], 12, seed=seed)) for seed in (5, 5, 6))
    assert one == two != other


def test_without_a_seed_it_differs(model):
    assert list(generate(model, [1], 30)) != list(generate(model, [1], 30))


def test_top_1_is_greedy(model):
    assert list(generate(model, [1], 12, top_k=1)) == list(generate(model, [1], 12, temperature=0))


def test_top_k_draws_among_k(model):
    likeliest = set(model(torch.tensor([[4]]))[0, -1].topk(3).indices.tolist())
    drawn = {next(generate(model, [4], 1, temperature=100.0, top_k=3, seed=seed)) for seed in range(60)}
    assert drawn == likeliest


def test_a_low_temperature_is_nearly_greedy(model):
    assert list(generate(model, [1], 12, temperature=1e-6)) == list(generate(model, [1], 12, temperature=0))


def test_top_p_draws_among_the_fewest_that_reach_it():
    logits = torch.tensor([0.5, 0.1, 0.3, 0.1]).log().expand(4000, 4)
    drawn = Sampling(top_p=0.75, seed=0).draw(logits, torch.Generator().manual_seed(0))
    shares = drawn.bincount(minlength=4) / len(drawn)
    torch.testing.assert_close(shares, torch.tensor([0.625, 0, 0.375, 0]), atol=0.03, rtol=0)


def test_a_tiny_top_p_is_greedy(model):
    assert list(generate(model, [1], 12, top_p=1e-9)) == list(generate(model, [1], 12, temperature=0))


def test_draws_have_the_chances_of_the_softmax():
    logits = torch.tensor([1.0, 2.0, 3.0])
    drawn = Sampling(temperature=0.5).draw(logits.expand(8000, 3), torch.Generator().manual_seed(0))
    shares = drawn.bincount(minlength=3) / len(drawn)
    torch.testing.assert_close(shares, torch.softmax(2 * logits, dim=0), atol=0.02, rtol=0)


@pytest.mark.parametrize("cache", [True, False])
def test_more_samples_than_any_memory_holds_are_one_line(model, cache):
    with pytest.raises(
        UserError, match=r"not enough memory: keys, values and logits take [\d,]+ bytes.*; lower --sampl"
    ):
        generate_samples(model, [1], 1, 2**31 - 1, Sampling(), cache=cache)
    with pytest.raises(UserError, match=r"samples=2147483648: must be at least 1 and below 2\*\*31"):
        generate_samples(model, [1], 1, 2**31, Sampling(), cache=cache)


def test_samples_differ_and_one_is_generate(model):
    steps = list(generate_samples(model, [1, 2], 12, 3, Sampling(seed=5)))
    first, second, third = ([*column] for column in zip(*steps, strict=True))
    assert len(first) == 12
    assert first != second != third
    one = [drawn for (drawn,) in generate_samples(model, [1, 2], 12, 1, Sampling(seed=5))]
    assert one == list(generate(model, [1, 2], 12, seed=5))


def test_a_cache_changes_no_token(config):
    model = seeded_checkpoint(config).build("sdpa")
    for prompt in ([1, 2, 3], [*range(11), *range(11)]):
        with_cache, without = (list(generate(model, prompt, 40, temperature=0, cache=cache)) for cache in (True, False))
        assert with_cache == without
        with_cache, without = (list(generate(model, prompt, 40, seed=3, cache=cache)) for cache in (True, False))
        assert with_cache == without


@torch.inference_mode()
def test_logits_with_a_cache_are_those_without():
    config = GPTConfig(block_size=256, vocab_size=65, n_layer=6, n_head=6, n_embd=96, bias=False)
    model = seeded_checkpoint(config).build("sdpa")
    ids = torch.randint(65, (1, 256), generator=torch.Generator().manual_seed(0))
    cache = KVCache(config, B=1)
    stepwise = torch.cat([model(ids[:, t : t + 1], cache=cache) for t in range(256)], dim=1)
    torch.testing.assert_close(stepwise, model(ids), atol=1e-5, rtol=0)


def test_a_cache_takes_its_memory_once_and_computes_each_token_once(model, monkeypatch):
    lengths, forward = [], model.forward

    def counted(ids, **rest):
        lengths.append((ids.shape[1], rest["cache"].keys.data_ptr()))
        return forward(ids, **rest)

    monkeypatch.setattr(model, "forward", counted)
    list(generate(model, [1, 2, 3], 13))
    assert [length for length, _ in lengths] == [3] + [1] * 12
    assert len({pointer for _, pointer in lengths}) == 1


def test_a_full_cache_is_a_users_error(model, config):
    cache = KVCache(config, B=1)
    model(torch.zeros(1, 16, dtype=torch.long), cache=cache)
    with pytest.raises(UserError, match=r"1 tokens after 16 in the cache.*block_size=16"):
        model(torch.zeros(1, 1, dtype=torch.long), cache=cache)


def test_leaves_the_callers_ids_alone(model):
    ids = [1, 2]
    list(generate(model, ids, 3))
    assert ids == [1, 2]


@pytest.mark.parametrize(
    ("ids", "settings", "message"),
    [
        ([], {}, "no token ids"),
        ([11], {}, "token id 11"),
        ([1], {"tokens": -1}, "tokens=-1"),
        ([1], {"temperature": -0.5}, "temperature=-0.5"),
        ([1], {"temperature": float("nan")}, "temperature=nan"),
        ([1], {"temperature": 0, "top_k": 3}, "temperature=0: takes the likeliest, so top_k and top_p change nothing"),
        ([1], {"temperature": 0, "top_p": 0.9}, "temperature=0: takes the likeliest"),
        ([1], {"top_k": 0}, "top_k=0"),
        ([1], {"top_p": 0.0}, r"top_p=0.0"),
        ([1], {"top_p": 1.5}, r"top_p=1.5"),
        ([1], {"seed": -1}, "seed=-1"),
        ([1], {"seed": 2**70}, "seed=1180591620717411303424"),
    ],
)
def test_bad_settings_are_named_before_the_first_token(model, ids, settings, message):
    with pytest.raises(UserError, match=message):
        generate(model, ids, **({"tokens": 3} | settings))


@pytest.mark.slow
def test_command_continues_the_prompt(run, tmp_path, trained):
    save_checkpoint(tmp_path / "ckpt.pt", trained)
    done = run("gpt.generate", "ckpt.pt", "--prompt", "the ", "--tokens", 50, "--temperature", 0)
    assert done.returncode == 0, done.stderr
    tokenizer = tokenizer_from_json(trained.tokenizer)
    added = generate(trained.build("sdpa"), tokenizer.encode("the "), 50, temperature=0)
    assert done.stdout == "the " + tokenizer.decode(added) + "\n"


def test_a_character_of_several_tokens_is_printed_whole(capsys):
    class Bytes(GPT2Tokenizer):
        def bytes_of(self, index):
            return bytes([index])

    _stream_first(iter([[byte] for byte in "a☃b".encode()] + [[0xE2]]), Bytes())
    assert capsys.readouterr().out == "a☃b\ufffd\n"


@pytest.mark.slow
def test_command_reads_a_prompt_file_and_prints_every_sample(run, tmp_path, trained):
    save_checkpoint(tmp_path / "ckpt.pt", trained)
    (tmp_path / "prompt.txt").write_text("the quick ")
    done = run("gpt.generate", "ckpt.pt", "--prompt-file", "prompt.txt", "--samples", 3, "--tokens", 9, "--seed", 1)
    assert done.returncode == 0, done.stderr
    texts = done.stdout.removesuffix("\n").split(f"\n{BETWEEN_SAMPLES}\n")
    assert [(len(text), text[:10]) for text in texts] == [(19, "the quick ")] * 3


@pytest.mark.slow
def test_command_without_a_cache_prints_the_same(run, tmp_path, trained):
    save_checkpoint(tmp_path / "ckpt.pt", trained)
    with_cache, without = (
        run("gpt.generate", "ckpt.pt", "--prompt", "the ", "--seed", 1, "--top-p", 0.9, *flag)
        for flag in ((), ("--no-cache",))
    )
    assert with_cache.returncode == 0, with_cache.stderr
    assert with_cache.stdout == without.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", "a", "--prompt-file", "x"), "two prompts"),
        (("--prompt-file", "absent.txt"), "--prompt-file absent.txt: cannot be read"),
        (("--device", "tpu"), "--device tpu: must be auto"),
        (("--samples", 0), "samples=0: must be at least 1"),
        (("--samples", 2**40), "samples=1099511627776: must be at least 1 and below 2**31"),
        (("--prompt", "the \udcff"), "--prompt: '\\udcff' at place 4 is half a surrogate pair"),
    ],
)
def test_command_with_a_bad_flag_is_exit_2(run, tmp_path, trained, arguments, message):
    save_checkpoint(tmp_path / "ckpt.pt", trained)
    done = run("gpt.generate", "ckpt.pt", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_command_with_a_bad_prompt_is_exit_2(run, tmp_path, trained):
    save_checkpoint(tmp_path / "ckpt.pt", trained)
    done = run("gpt.generate", "ckpt.pt", "--prompt", "the §")
    assert done.returncode == 2
    assert done.stderr.startswith("error: the character '§' (place 4)")
    assert done.stderr.count("\n") == 1
