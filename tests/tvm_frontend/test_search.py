import pytest

from gpt.cli import UserError
from gpt.config import GPTConfig
from tvm_frontend import search
from tvm_frontend.frontends import read_source
from tvm_frontend.pipeline import fix_shape, graph_phases
from tvm_frontend.search import Search
from tvm_frontend.target import resolve_target

SMALL = GPTConfig(block_size=9, vocab_size=37, n_layer=1, n_head=2, n_embd=16)


@pytest.mark.slow
def test_no_result_of_another_kernel_depends_on_a_layout_that_a_search_may_change(export):
    graph = fix_shape(read_source("onnx", export(SMALL)[1].path).import_graph(), (1, 4))
    phases = dict(graph_phases(resolve_target(), 0, search=Search((1, 4), 1)))
    legalized = phases["legalize"](phases["fold_weights"](graph)).module.script()
    assert "batch_matmul" in legalized
    assert "layout_free_buffers" in legalized
    assert "layout_free_placeholders" not in legalized


def test_what_is_missing_is_named(monkeypatch):
    find_spec = search.find_spec
    monkeypatch.setattr(search, "find_spec", lambda name: None if name == "xgboost" else find_spec(name))
    with pytest.raises(UserError, match="pip install xgboost-cpu"):
        Search((1, 4), 1)


def test_a_search_that_has_no_folder_is_refused_before_any_work(export):
    phases = dict(graph_phases(resolve_target(), 0, search=Search((1, 4), 1)))
    with pytest.raises(UserError, match="has none: give one to keep_in"):
        phases["search"](read_source("onnx", export(SMALL)[1].path).import_graph())
