from typing import NoReturn

import numpy as np
import pytest
import torch

from gpt.cli import UserError
from gpt.device import devices_here, explain_memory, find_device

NO_GPU = not torch.cuda.is_available()


def raise_memory_error() -> NoReturn:
    raise MemoryError


def test_auto_is_the_first_that_is_here():
    assert find_device("auto").type == devices_here()[0]


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_a_gpu_comes_before_the_cpu(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert find_device("auto") == torch.device(expected)


def test_a_name_overrides():
    assert find_device("cpu") == torch.device("cpu")


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU here")
def test_an_absent_device_names_what_is_here():
    with pytest.raises(UserError, match=r"--device cuda: torch sees none here; it sees .*cpu"):
        find_device("cuda")


def test_a_gpu_too_many_says_how_many_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match=r"--device cuda:2: torch sees 2 CUDA GPUs"):
        find_device("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "meta", "cpu:x", ""])
def test_an_unknown_name_lists_the_known(name):
    with pytest.raises(UserError, match=r"must be auto, cuda, mps, cpu"):
        find_device(name)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: torch.empty(10**15), "4000000000000000 bytes were asked for at once; buy more"),
        (lambda: np.empty(10**15), r"7\.11 PiB were asked for at once; buy more"),
        (lambda: torch.empty(2**40, 2**40), "more than any machine has was asked for at once; buy more"),
        (lambda: np.empty((2**40, 2**40)), "more than any machine has was asked for at once; buy more"),
        (raise_memory_error, "more than is free was asked for at once; buy more"),
    ],
)
def test_an_allocation_that_fails_is_one_line(ask, words):
    with pytest.raises(UserError, match=f"not enough memory: {words}"), explain_memory("buy more"):
        ask()


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), ValueError("no"), UserError("unable to allocate 3 B")]
)
def test_other_errors_stay_as_they_are(error):
    with pytest.raises(type(error)) as caught, explain_memory("buy more"):
        raise error
    assert caught.value is error
