from importlib import import_module
from typing import get_args

import pytest

from gpt.cli import UserError
from tvm_frontend.arguments import FrontendArgument
from tvm_frontend.artifact import RELAY
from tvm_frontend.compile import compile_model
from tvm_frontend.frontends import FRONTENDS, read_source
from tvm_frontend.options import CompileOptions


@pytest.mark.parametrize("name", FRONTENDS)
def test_each_is_a_file_that_reads(name):
    assert callable(import_module(f"tvm_frontend.frontends.{name.replace('-', '_')}").read)


def test_the_command_line_offers_all_of_them_and_relay():
    assert get_args(FrontendArgument) == (*FRONTENDS, RELAY)


def test_another_is_refused(exported):
    with pytest.raises(UserError, match="frontend 'tflite': must be one of onnx, relax-onnx, torch"):
        compile_model(exported.path, options=CompileOptions(frontend="tflite"))


@pytest.mark.parametrize("name", ["onnx", "torch"])
def test_what_serves_every_shape_takes_none(exported, name):
    with pytest.raises(UserError, match=f"--batch and --tokens: not with --frontend {name}"):
        read_source(name, exported.path, (1, 4))
