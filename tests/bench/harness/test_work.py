"""The works fit the model, and real engines give the plain forward's logits over a cache."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from bench.backends import Candidate, find_candidates
from bench.correctness.agreement import Agreement
from bench.correctness.reference import ReferenceModel
from bench.harness.work import PHASES, Decode, Generate, Prefill, Work, phases_of
from bench.harness.worker import Worker
from bench.models.artifacts import Artifacts
from bench.models.build import SEEDED
from bench.roofline.bounds import Roofline
from gpt.config import GPTConfig

pytestmark = pytest.mark.slow

CONFIG = SEEDED["tiny"]
LIMITS = Roofline(2, 500e9, 200e9, 1, 40e9)
CACHING = [candidate for candidate in find_candidates() if "decode" in candidate.phases]


@pytest.fixture(scope="module")
def reference(tiny: Artifacts) -> Iterator[ReferenceModel]:
    """Start the reference model."""
    with ReferenceModel(tiny, CONFIG, threads=1) as found:
        yield found


@pytest.fixture(scope="module", params=CACHING, ids=lambda candidate: candidate.label)
def ask(request: pytest.FixtureRequest, tiny: Artifacts) -> Iterator[Callable]:
    """Start an engine that has a cache."""
    candidate: Candidate = request.param
    if candidate.absent:
        pytest.skip(candidate.absent)
    with Worker(candidate.factory, threads=1) as worker:
        worker.call("load", tiny, CONFIG, 1, candidate.variant)
        yield worker.call


def checked(work: Work, ask: Callable, reference: ReferenceModel) -> Agreement:
    return work.check(ask, reference, work.ids(CONFIG, seed=5), reference.allowed("fp32"))


# Two sequences in all of them: torch.compile takes seconds for each other number.
@pytest.mark.parametrize("work", [Decode(2, 1, 1), Decode(2, 1, 13), Decode(2, 1, 15)], ids=str)
def test_every_engine_decodes_what_the_plain_forward_gives(
    work: Work, ask: Callable, reference: ReferenceModel
) -> None:
    agreement = checked(work, ask, reference)
    assert agreement.agrees, agreement.reason
    assert 0 < agreement.share_of_allowed < 1


@pytest.mark.parametrize("work", [Generate(2, 8, 8), Generate(2, 16, 1)], ids=str)
def test_every_engine_generates_the_likeliest_tokens(work: Work, ask: Callable, reference: ReferenceModel) -> None:
    assert checked(work, ask, reference).agrees


@pytest.mark.slow
def test_a_decode_may_go_back(ask: Callable, reference: ReferenceModel) -> None:
    """A token at an earlier place overwrites what was behind it."""
    ids = Decode(2, 1, 10).ids(CONFIG, seed=5)  # [2, 16]
    other = (ids + 1) % CONFIG.vocab_size
    ask("fill", ids[:, :10])
    ask("decode", ids[:, 10:11], 10)
    ask("decode", ids[:, 11:12], 11)
    changed = np.concatenate([ids[:, :4], other[:, 4:6]], axis=1)
    steps = [ask("decode", changed[:, place : place + 1], place) for place in (4, 5)]
    expected = reference(changed)
    for place, logits in zip((4, 5), steps, strict=True):
        np.testing.assert_allclose(logits, expected[:, place], atol=reference.allowed("fp32").worst)


@pytest.mark.parametrize("wrong", [None, 0, 4, 9])
def test_a_wrong_answer_is_found_wherever_it_is(reference: ReferenceModel, wrong: int | None) -> None:
    """Ten answers: the prompt's, eight steps behind it, and the first step again."""
    work, answers = Decode(1, 1, 4), []

    def fake(method: str, ids: np.ndarray, context: int = 3) -> np.ndarray:
        logits = reference(work.ids(CONFIG, seed=5)[:, : context + 1])[:, -1].astype(np.float32)
        answers.append(method)
        return logits + (len(answers) - 1 == wrong)

    assert checked(work, fake, reference).agrees == (wrong is None)
    assert answers == ["fill", *["decode"] * 9]


def test_a_step_of_another_shape_is_named(reference: ReferenceModel) -> None:
    agreement = checked(Decode(1, 1, 4), lambda method, *_: np.zeros((1, 1, 31), np.float32), reference)
    assert agreement.reason == "step 0: shape [1, 1, 31] instead of [1, 31]"


def test_what_comes_before_the_clock_and_what_is_timed() -> None:
    decode, generate, prefill = Decode(1, 1, 4), Generate(1, 5, 3), Prefill(2, 3)
    ids = decode.ids(CONFIG, seed=0)
    (method, (prompt,)), (timed, (token, context)) = decode.before(ids), decode.call(ids)
    assert (method, prompt.shape, timed, token.shape, context) == ("fill", (1, 4), "decode", (1, 1), 4)
    assert (token == ids[:, 4:5]).all()
    method, (prompt, tokens) = generate.call(generate.ids(CONFIG, seed=0))
    assert (generate.before(ids), method, prompt.shape, tokens) == (None, "generate", (1, 3), 5)
    assert (prefill.before(ids), prefill.call(ids)[0]) == (None, "prefill")


@pytest.mark.parametrize("config", [CONFIG, GPTConfig(), GPTConfig(block_size=1), GPTConfig(block_size=2)], ids=str)
def test_all_work_fits_the_model_and_has_a_limit(config: GPTConfig) -> None:
    for phase in phases_of(config):
        works = [*PHASES[phase].checked(config), *PHASES[phase].timed(config)]
        assert len({work.name for work in works}) == len(set(works))
        for work in works:
            assert work.B >= 1
            assert work.T >= 1
            assert work.context + work.T <= config.block_size
            assert work.ids(config, seed=0).shape[1] <= config.block_size
            assert work.bound(LIMITS, config).seconds > 0


def test_contexts_are_those_that_fit() -> None:
    assert [work.context for work in Decode.timed(GPTConfig())] == [32, 128, 1023]
    assert [work.context for work in Decode.timed(SEEDED["demo"])] == [32, 63]
    assert Decode.timed(GPTConfig(block_size=1)) == ()


def test_a_bigram_has_prefill_alone() -> None:
    assert phases_of(SEEDED["bigram"]) == ("prefill",)
    assert phases_of(CONFIG) == tuple(PHASES)


def test_the_reference_answers_twice_from_memory(reference: ReferenceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.array([[1, 2, 3]])
    first = reference(ids)
    monkeypatch.setattr(reference, "_worker", None)
    assert reference(ids.copy()) is first
    assert first.dtype == np.float64
    with pytest.raises(AttributeError):
        reference(ids + 1)
