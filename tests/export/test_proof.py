"""A cached graph that computes something else is found, whatever it is that is wrong."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import export.proof
from export.proof import Proof, Run, chunks_of, compare, plan_runs, prove
from export.session import Session
from export.weights import model_of


def every(graph, operator):
    return [node for node in graph.node if node.op_type == operator]


def not_causal(graph):
    for node in every(graph, "Attention"):
        node.attribute[0].i = 0


def all_of_the_cache(graph):
    """As if every row of the cache counted: nonpad_kv_seqlen is left out."""
    for node in every(graph, "Attention"):
        del node.input[6]


def keys_for_values(graph):
    node = every(graph, "Attention")[1]
    node.input[2] = node.input[1]


def positions_from_zero(graph):
    (add,) = (node for node in every(graph, "Add") if "unsqueeze" in node.input)
    add.op_type = "Sub"


def cache_written_at_the_start(graph):
    graph.initializer.append(numpy_helper.from_array(np.array(0), "zero"))
    graph.node.insert(0, onnx.helper.make_node("Mul", ["pos", "zero"], ["start"]))
    for node in every(graph, "TensorScatter"):
        node.input[2] = "start"


def pos_out_one_more(graph):
    graph.initializer.append(numpy_helper.from_array(np.array(1), "one"))
    (add,) = (node for node in graph.node if "pos_out" in node.output)
    for node in graph.node:
        node.input[:] = ["end" if name == "pos_out" else name for name in node.input]
    add.output[0] = "end"
    graph.node.append(onnx.helper.make_node("Add", ["end", "one"], ["pos_out"]))


WRONG = [
    not_causal,
    all_of_the_cache,
    keys_for_values,
    positions_from_zero,
    cache_written_at_the_start,
    pos_out_one_more,
]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_cached_graph_that_is_wrong_is_found(cached, checkpoint, tmp_path, monkeypatch, wrong):
    proto = onnx.load(cached.path)
    wrong(proto.graph)
    path = tmp_path / "model-cache.onnx"
    onnx.save(proto, path)
    monkeypatch.setattr(export.proof, "load_exported", lambda _: replace(cached, path=path))
    with pytest.raises(RuntimeError, match=r"disagree|pos_out"):
        prove(checkpoint, path)


def test_chunks_end_where_the_sequence_does():
    assert chunks_of(64) == [20, 1, 1, 7, 1, 34]
    assert chunks_of(32) == [20, 1, 1, 7, 1, 2]
    assert chunks_of(8) == [1, 1, 1, 5]
    assert chunks_of(1) == [1]
    assert all(sum(chunks_of(length)) == length for length in range(1, 50))


def test_every_kind_of_run_is_planned(cached, past, exported):
    def kinds(found):
        return [run().what.split()[0] for run in plan_runs(Session(found))]

    assert kinds(exported) == ["prompt"] * 6
    assert kinds(past) == ["prompt"] * 6 + ["chunks"] * 2 + ["greedy"]
    assert kinds(cached) == ["prompt"] * 6 + ["chunks"] * 2 + ["lengths", "greedy"]


@pytest.fixture(scope="module")
def greedy(cached) -> Run:
    return plan_runs(Session(cached))[-1]()


def test_at_least_200_greedy_tokens_are_eagers(greedy, checkpoint):
    assert greedy.chosen * len(greedy.ids) >= 200
    ids = torch.from_numpy(greedy.ids[:, : -greedy.chosen])
    model = checkpoint.build()
    for _ in range(greedy.chosen):
        with torch.inference_mode():
            ids = torch.cat([ids, model(ids, last_only=True).argmax(-1)], dim=1)
    assert np.array_equal(ids.numpy(), greedy.ids)


def test_a_token_that_eager_would_not_choose_is_found(greedy, checkpoint):
    model = model_of(checkpoint, "explicit")
    assert compare(greedy, model, model, 1e-4).agrees
    ids = greedy.ids.copy()
    ids[0, -1] = (ids[0, -1] + 1) % 211
    found = compare(replace(greedy, ids=ids), model, model, 1e-4)
    assert (found.tokens_equal, found.agrees) == (found.tokens - 1, False)


def test_an_error_that_is_not_a_number_does_not_agree():
    proof = Proof("prompt", 1, 1, err_fp64=float("nan"), err_fp32=0.0, scale=1.0, top1_match=1.0, tolerance=1e-4)
    assert not proof.agrees
    assert replace(proof, err_fp64=0.0).agrees
