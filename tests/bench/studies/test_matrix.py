"""Tests the matrix of other people's files: what is made, how a cell is judged, how a run goes on, and the page."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from bench.studies import matrix, support
from bench.studies.foreign import LONGEST, OWN_LAYOUTS, make_model
from bench.studies.foreign_feeds import feed, padded
from bench.studies.foreign_files import make
from bench.studies.foreign_recipes import VARIANTS, Recipe, recipes
from bench.studies.matrix import Result, cells_to_try, code_hash, read_results, run_cells
from bench.studies.matrix_cell import (
    CRASHED,
    REFUSED,
    RIGHT,
    UNJUDGED,
    WRONG,
    Outcome,
    Reference,
    cases_of,
    difference,
    tolerance_of,
    try_file,
    try_import,
    variant_of,
)
from bench.studies.matrix_page import foreign_part, general
from bench.studies.support import write_support
from gpt.cli import UserError

INPUTS = [
    ("input_ids", "tensor(int64)", ["B", "T"]),
    ("attention_mask", "tensor(int64)", ["B", "P + T"]),
    ("position_ids", "tensor(int64)", ["B", "T"]),
    ("past_key_values.0.key", "tensor(float16)", ["B", 2, "P", 4]),
]


def test_each_file_has_a_name_of_its_own_that_says_its_variant() -> None:
    found = recipes()
    assert len({recipe.name for recipe in found}) == len(found) > 450
    assert {recipe.variant for recipe in found} == set(VARIANTS)
    assert all(variant_of(Path(recipe.name)) == recipe.variant for recipe in found)


@pytest.mark.parametrize("name", OWN_LAYOUTS)
def test_every_weight_of_a_model_moves_its_logits(name: str) -> None:
    model, ids = make_model(name), torch.arange(LONGEST)[None]
    with torch.no_grad():
        before = model(ids)
        for label, parameter in model.named_parameters():
            kept = parameter.clone()
            parameter *= 1.05
            assert (model(ids) - before).abs().max() > 1e-4 * before.abs().max(), label
            parameter.copy_(kept)


def test_what_is_fed_follows_the_past_and_the_padding() -> None:
    given = feed(INPUTS, np.random.default_rng(0), 2, 3, 2)
    assert [(array.shape, str(array.dtype)) for array in given.values()] == [
        ((2, 2), "int64"),
        ((2, 5), "int64"),
        ((2, 2), "int64"),
        ((2, 2, 3, 4), "float16"),
    ]
    assert given["position_ids"].tolist() == [[3, 4], [3, 4]]
    behind, before = padded(given, [0, -1]), padded(given, [0, 2])
    assert behind["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert before["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert before["position_ids"].tolist() == [[3, 4], [1, 2]]
    assert given["attention_mask"].all()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with minGPT as torch.onnx writes it, and with a file that no tool can read."""
    folder = tmp_path_factory.mktemp("matrix")
    refused: dict[str, str] = {}
    make(folder, Recipe("mingpt", "torchscript", 14), refused)
    assert refused == {}
    return folder


def test_what_an_exporter_refuses_is_kept_with_its_words(tmp_path: Path) -> None:
    refused: dict[str, str] = {}
    make(tmp_path, Recipe("nanogpt", "torchscript", 11), refused)
    make(tmp_path, Recipe("nanogpt", "torchscript", 11, "int8"), refused)
    words = refused["nanogpt-torchscript-11-plain.onnx"]
    assert "scaled_dot_product_attention" in words
    assert refused["nanogpt-torchscript-11-int8.onnx"] == f"there is no plain file: {words}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_file_is_compiled_and_compared_with_onnx_runtime(made: Path) -> None:
    outcome = try_file(made / "mingpt-torchscript-14-plain.onnx")
    assert (outcome.kind, outcome.words, outcome.left_out) == (RIGHT, "", [])
    assert set(outcome.errors) == {"1x1", "2x7", f"1x{LONGEST}"}
    assert 0 < outcome.error < tolerance_of("plain")
    assert 0 <= outcome.coverage <= 1


def test_a_compiled_model_of_other_weights_is_wrong(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made / "mingpt-torchscript-14-plain.onnx"

    class Off:
        def run(self, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {name: 1.001 * array for name, array in Reference(path)(given).items()}

    class Compiled:
        coverage = None

    monkeypatch.setattr("bench.studies.matrix_cell.compile_model", lambda *_: Compiled())
    monkeypatch.setattr("bench.studies.matrix_cell.open_session", lambda _: Off())
    outcome = try_file(path)
    assert (outcome.kind, outcome.words) == (WRONG, f"1x1, 2x7, 1x{LONGEST}")
    assert outcome.error == pytest.approx(1e-3, rel=1e-3)


def test_a_refusal_and_an_error_are_told_apart(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made / "mingpt-torchscript-14-plain.onnx"

    def refuse(*_: object) -> None:
        raise UserError(f"{path}: node 'x' is not supported")

    def fail(*_: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr("bench.studies.matrix_cell.compile_model", refuse)
    assert try_file(path) == Outcome(REFUSED, "node 'x' is not supported")
    monkeypatch.setattr("bench.studies.matrix_cell.compile_model", fail)
    failed = try_file(path)
    assert failed.kind == CRASHED
    assert failed.words.startswith("KeyError at test_matrix.py:")


def test_a_file_that_onnx_runtime_refuses_is_not_judged(made: Path, tmp_path: Path) -> None:
    proto = onnx.load(made / "mingpt-torchscript-14-plain.onnx")
    proto.graph.node[0].op_type = "Nothing"
    onnx.save(proto, tmp_path / "model.onnx")
    outcome = try_file(tmp_path / "model.onnx")
    assert outcome.kind == UNJUDGED
    assert "Nothing" in outcome.words
    assert try_import(tmp_path / "model.onnx").kind == REFUSED


def test_the_cases_of_a_file_with_a_past_go_on_from_it(foreign_file: Callable[..., Path], tmp_path: Path) -> None:
    class Few(Reference):  # a file of 16 positions and 37 tokens
        def __call__(self, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            ids = given["input_ids"]
            return super().__call__(given | {"input_ids": ids % 37}) if ids.shape[1] < LONGEST else {}

    names = [case.name for case in cases_of(Few(foreign_file(tmp_path / "model.onnx")))]
    assert names == [
        "1x1",
        "2x7",
        f"1x{LONGEST}",
        "2x7, padded behind",
        "2x7, padded before",
        "2x1 after 7",
        "2x4 after 7",
        "2x1 after 7, padded before",
    ]


def test_a_difference_is_infinite_where_one_alone_is_no_number() -> None:
    right = {"logits": np.array([[[1.0, 2.0], [np.nan, -np.inf]]])}
    assert difference(right, right, None) == 0
    assert difference({"logits": np.nan_to_num(right["logits"])}, right, None) == np.inf
    assert difference({"logits": right["logits"].astype(np.float32)}, right, None) == np.inf
    assert difference({"logits": right["logits"][:, :1]}, right, None) == np.inf
    other = {"logits": np.array([[[1.0, 2.5], [0.0, 0.0]]])}
    assert difference(other, right, np.array([[True, False]])) == pytest.approx(0.25)


def test_a_run_tries_what_changed_and_survives_a_worker(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell, results = Recipe("mingpt", "torchscript", 14), made / "died.jsonl"

    class Dies:
        def __init__(self, factory: str, threads: int) -> None:
            pass

        def call(self, method: str, path: str, deadline_s: float) -> dict:
            raise matrix.WorkerError("the process died of SIGSEGV")

        def close(self) -> None:
            pass

    assert cells_to_try(made, [cell], {}) == [cell]
    monkeypatch.setattr(matrix, "Worker", Dies)
    run_cells(made, [cell], results, workers=2)
    [result] = read_results(results).values()
    assert result.outcome == Outcome(CRASHED, "the process died of SIGSEGV")
    assert cells_to_try(made, [cell], {cell.name: result}) == []
    assert cells_to_try(made, [cell], {cell.name: replace(result, sha256="other")}) == [cell]
    assert cells_to_try(made, [cell], {cell.name: replace(result, code="other")}) == [cell]
    assert result.code == code_hash()


@pytest.mark.slow
def test_a_worker_answers_in_plain_values(made: Path) -> None:
    results = made / "imported.jsonl"
    run_cells(made, [Recipe("mingpt", "torchscript", 14)], results, import_only=True)
    assert json.loads(results.read_text())["outcome"]["kind"] == RIGHT


def test_the_page_counts_and_names_what_is_wrong_or_refused() -> None:
    def result(outcome: Outcome) -> Result:
        return Result("", "", "", outcome)

    refusal = "node 'a' (Cos): not supported"
    page = foreign_part(
        [
            (Recipe("a", "dynamo", 18), result(Outcome(RIGHT, errors={"1x1": 2e-7, "2x7": 3e-7}, coverage=1.0))),
            (Recipe("a", "dynamo", 18, "slimmed"), result(Outcome(WRONG, "1x1", {"1x1": 0.5}))),
            (Recipe("a", "dynamo", 20), result(Outcome(REFUSED, refusal))),
            (Recipe("a", "dynamo", 23), result(Outcome(UNJUDGED, "ONNX Runtime: no"))),
            (Recipe("b", "optimum", 18, "int8"), result(Outcome(RIGHT, errors={"1x1": 2e-3}))),
        ],
        {"x.onnx": "KeyError: 1", "y.onnx": "KeyError: 1"},
        "torch 0",
    )
    assert "4 files run in ONNX Runtime. **2 of them (50.0%) compile and agree, 1 give other numbers,\n1 are" in page
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:2] == "| "]
    assert ["a", "1/3 3e-7 1 WRONG", ""] in rows
    assert ["b", "", "1/1"] in rows
    assert ["a", "dynamo", "18", "3e-7, 100%", "WRONG 5e-1", *[""] * 6] in rows
    assert ["a", "dynamo", "20", "no (1)", *[""] * 7] in rows
    assert ["a", "dynamo", "23", "– (2)", *[""] * 7] in rows
    assert ["int8", "1/1", "2e-3"] in rows
    assert ["2", "x", "KeyError: 1"] in rows
    assert "1. a node (Cos): not supported\n2. ONNX Runtime: no" in page


def test_messages_that_differ_by_names_alone_are_one() -> None:
    assert general("/tmp/a/x.onnx failed at Name:'a/b' | 1") == "the file failed at a node \\| 1"


@pytest.mark.slow
def test_the_command_tries_what_is_there_and_writes_the_page(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page is of both parts: this file of others, and one export of the smallest model."""
    for which in ("torch", "optimum", "tools"):
        (made / f"{which}-refused.json").write_text(json.dumps({f"{which}.onnx": f"no by {which}"}))
        (made / f"{which}-versions.json").write_text(json.dumps({which: "1.0"}))
    monkeypatch.setattr(support, "MODELS", {"bigram": support.MODELS["bigram"]})
    monkeypatch.setattr(support, "all_files", lambda: [support.File("bigram", opset=18)])
    page = tmp_path / "page.md"
    write_support(page, made)
    text = page.read_text()
    assert "1 files run in ONNX Runtime. **1 of them (100.0%)" in text
    assert re.search(r"\| mingpt +\| torchscript +\| 14 +\| \de-7", text)
    assert re.search(r"\| forward +\| fp32 +\| dynamo 18 +\| bigram ", text)
    assert all(f"no by {which}" in text and f"{which} 1.0" in text for which in ("torch", "optimum", "tools"))
    assert cells_to_try(made, [Recipe("mingpt", "torchscript", 14)], read_results(made / "results.jsonl")) == []


def test_a_folder_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="make matrix makes them"):
        write_support(tmp_path / "page.md", tmp_path)
    assert not (tmp_path / "page.md").exists()
