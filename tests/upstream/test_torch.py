"""Faults of PyTorch that this project works around; see test_tvm.py for how to read them."""

import io

import onnx
import pytest
import torch


def written_opset(asked: int) -> int:
    program = torch.onnx.export(torch.nn.ReLU(), (torch.zeros(2, 3),), opset_version=asked, dynamo=True, verbose=False)
    file = io.BytesIO()
    program.save(file)
    return onnx.load_from_string(file.getvalue()).opset_import[0].version


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.xfail(
    strict=True, raises=AssertionError, reason="export.trace compares the file's opset with the one asked for"
)
def test_the_exporter_writes_the_opset_that_it_was_asked_for():
    assert written_opset(13) == 13
