"""Foreign files whose sizes coincide: what a weight is follows from what reads it, never from how large it is.

A file is built node by node, so that each way to write a GPT-2 can be had, or traced by torch.onnx.
"""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from bench.models.external import Reference, open_external, read_external
from bench.models.sessions import open_as
from export.graph import GraphReader
from gpt.checkpoint import Checkpoint, seeded_checkpoint
from gpt.cli import UserError
from gpt.config import GPTConfig
from tvm_frontend.compile import compile_model
from tvm_frontend.frontends import run_file
from tvm_frontend.options import CompileOptions
from tvm_frontend.runtime.graph_session import GraphSession

SMALL = GPTConfig(block_size=20, vocab_size=50, n_layer=2, n_head=4, n_embd=32)
# block_size, vocab_size, n_embd. The last is GPT-2 medium's, whose block_size is its width, in small.
SIZES = [
    (32, 50, 32),
    (48, 61, 48),
    (40, 40, 24),
    (20, 32, 32),
    (32, 32, 32),
    (96, 50, 32),
    (128, 50, 32),
    (20, 96, 32),
    (20, 128, 32),
    (96, 128, 32),
    (4, 50, 32),
    (2, 4, 32),
    (64, 3141, 64),
]
IDS = ("plain", "cast", "reshaped", "clipped")
PLACES = ("gathered", "sliced", "sliced in 3 dimensions", "expanded")
HEADS = ("transposed", "folded", "gemm", "reshaped")


def of_size(block_size: int, vocab_size: int, n_embd: int, **others: object) -> Checkpoint:
    """Random weights of a shape, large enough that every part of the model moves the logits."""
    sizes = {"block_size": block_size, "vocab_size": vocab_size, "n_embd": n_embd}
    random = seeded_checkpoint(replace(SMALL, **sizes, **others))
    state = {name: 4 * tensor if tensor.dim() == 2 else tensor for name, tensor in random.state.items()}
    return replace(random, state=state)


class Builder:
    """Writes a GPT's forward pass as an ONNX graph, with Softmax for its attention."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.config = checkpoint.config
        self.weights = {name: tensor.numpy() for name, tensor in checkpoint.state.items()}
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.numbers = itertools.count()

    def constant(self, value: object, name: str | None = None) -> str:
        name = name or f"constant.{next(self.numbers)}"
        self.constants[name] = np.asarray(value)
        return name

    def weight(self, name: str) -> str:
        return self.constant(self.weights[name], name)

    def op(self, operator: str, *inputs: str, **attributes: object) -> str:
        output = f"value.{next(self.numbers)}"
        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def whole(self, *numbers: int) -> str:
        return self.constant(np.array(numbers, np.int64))

    def embedded(self, ids: str, place: str) -> str:
        """Rows of the table of tokens, plus those of the table of positions."""
        index = "input_ids"
        if ids == "cast":
            index = self.op("Cast", self.op("Cast", index, to=TensorProto.INT32), to=TensorProto.INT64)
        elif ids == "reshaped":
            index = self.op("Reshape", self.op("Reshape", index, self.whole(-1)), self.op("Shape", index))
        elif ids == "clipped":
            least, most = self.constant(np.int64(0)), self.constant(np.int64(self.config.vocab_size - 1))
            index = self.op("Clip", index, least, most)
        tokens = self.op("Gather", self.weight("transformer.wte.weight"), index)  # [B, T, C]
        T = self.op("Shape", "input_ids", start=1, end=2)
        table = self.weight("transformer.wpe.weight")
        if place == "sliced":
            rows = self.op("Slice", table, self.whole(0), T, self.whole(0))
        elif place == "sliced in 3 dimensions":
            whole = self.constant(self.weights["transformer.wpe.weight"][None], "positions")
            rows = self.op("Slice", whole, self.whole(0), T, self.whole(1))
        else:
            count = self.op("Squeeze", T)
            index = self.op("Range", self.constant(np.int64(0)), count, self.constant(np.int64(1)))
            if place == "expanded":
                index = self.op("Expand", index, self.op("Shape", "input_ids"))
            rows = self.op("Gather", table, index)
        # Addition has no order, and positions come first here: the first table is not that of the tokens.
        return self.op("Add", rows, tokens)

    def linear(self, x: str, name: str) -> str:
        y = self.op("MatMul", x, self.constant(self.weights[f"{name}.weight"].T.copy(), f"{name}.weight"))
        return self.op("Add", y, self.weight(f"{name}.bias")) if f"{name}.bias" in self.weights else y

    def norm(self, x: str, name: str) -> str:
        parts = [self.weight(f"{name}.{part}") for part in ("weight", "bias") if f"{name}.{part}" in self.weights]
        return self.op("LayerNormalization", x, *parts, epsilon=1e-5)

    def attention(self, x: str, name: str) -> str:
        nh, hs = self.config.n_head, self.config.head_size
        T = self.op("Shape", "input_ids", start=1, end=2)
        parts = self.nodes_of_split(self.linear(x, f"{name}.c_attn"))
        q, k, v = (self.op("Reshape", part, self.whole(0, 0, nh, hs)) for part in parts)
        q, v = (self.op("Transpose", part, perm=[0, 2, 1, 3]) for part in (q, v))
        scores = self.op("MatMul", q, self.op("Transpose", k, perm=[0, 2, 3, 1]))  # [B, nh, T, T]
        scores = self.op("Mul", scores, self.constant(np.float32(hs**-0.5)))
        hidden = self.op("Expand", self.constant(np.float32(-1e9)), self.op("Concat", T, T, axis=0))
        hidden = self.op("Trilu", hidden, self.constant(np.int64(1)), upper=1)
        mixed = self.op("MatMul", self.op("Softmax", self.op("Add", scores, hidden), axis=-1), v)
        mixed = self.op("Reshape", self.op("Transpose", mixed, perm=[0, 2, 1, 3]), self.whole(0, 0, nh * hs))
        return self.linear(mixed, f"{name}.c_proj")

    def nodes_of_split(self, x: str) -> list[str]:
        outputs = [f"value.{next(self.numbers)}" for _ in range(3)]
        self.nodes.append(helper.make_node("Split", [x], outputs, axis=-1, num_outputs=3))
        return outputs

    def head(self, x: str, how: str) -> str:
        tied = self.config.tied_head
        name = "transformer.wte.weight" if tied else "lm_head.weight"
        if how == "folded":  # a copy, as an exporter makes it that transposes constants itself
            return self.op("MatMul", x, self.constant(self.weights[name].T.copy(), "head"))
        table = self.weight(name)
        if how == "transposed":
            return self.op("MatMul", x, self.op("Transpose", table, perm=[1, 0]))
        if how == "reshaped":
            table = self.op("Reshape", self.op("Identity", table), self.whole(*self.weights[name].shape))
            return self.op("MatMul", x, self.op("Transpose", self.op("Cast", table, to=TensorProto.FLOAT)))
        flat = self.op("Gemm", self.op("Reshape", x, self.whole(-1, self.config.n_embd)), table, transB=1)
        return self.op("Reshape", flat, self.op("Concat", self.op("Shape", "input_ids"), self.whole(-1), axis=0))

    def model(self, ids: str, place: str, head: str) -> onnx.ModelProto:
        x = self.embedded(ids, place)
        for layer in range(self.config.n_layer):
            name = f"transformer.h.{layer}"
            x = self.op("Add", x, self.attention(self.norm(x, f"{name}.ln_1"), f"{name}.attn"))
            inner = self.linear(self.norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")
            inner = self.op("Gelu", inner, approximate="tanh")
            x = self.op("Add", x, self.linear(inner, f"{name}.mlp.c_proj"))
        x = self.norm(x, "transformer.ln_f")
        logits = self.head(x, head)
        # A second output behind the head: another product with a matrix of weights, and a Softmax.
        value = self.op("Softmax", self.op("MatMul", logits, self.constant(np.ones((self.config.vocab_size, 7), "f"))))
        self.nodes += [
            helper.make_node("Identity", [each], [name]) for each, name in ((logits, "logits"), (value, "v"))
        ]
        graph = helper.make_graph(
            self.nodes,
            "gpt",
            [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["B", "T"])],
            [
                helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", "T", self.config.vocab_size]),
                helper.make_tensor_value_info("v", TensorProto.FLOAT, ["B", "T", 7]),
            ],
            [numpy_helper.from_array(value, name) for name, value in self.constants.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def check(source: Path, checkpoint: Checkpoint, folder: Path, opt_levels: tuple[int, ...] = ()) -> None:
    """The file gives the checkpoint's logits in bench's reference, in ONNX Runtime and compiled at some levels."""
    artifacts, _ = open_external(source, folder)
    signature = read_external(source).signature
    config = checkpoint.config
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, min(13, config.block_size)))
    with torch.inference_mode():
        expected = checkpoint.build().double()(torch.from_numpy(ids)).numpy()
    reference = Reference()
    reference.load(artifacts, read_external(source).shape, 1, "")
    scale = np.abs(expected).max()
    assert np.abs(reference.logits(ids) - expected).max() < 1e-6 * scale
    assert np.abs(run_file(source, {signature.ids: ids})[signature.logits] - expected).max() < 1e-5 * scale
    for level in opt_levels:
        compiled = compile_model(source, folder / f"O{level}", CompileOptions(opt_level=level))
        assert np.abs(open_as(GraphSession, compiled, 1).prefill(ids) - expected).max() < 1e-5 * scale, level


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own head"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_shape_is_read_whatever_sizes_are_equal(sizes: tuple[int, int, int], tied: bool) -> None:
    checkpoint = of_size(*sizes, tied_head=tied)
    for ids, place, head in zip(IDS, PLACES, HEADS, strict=True):
        proto = Builder(checkpoint).model(ids, place, head)
        expected = replace(checkpoint.config, tied_head=tied and head != "folded")
        assert GraphReader(proto).config() == expected, (ids, place, head)


@pytest.mark.parametrize("sizes", [(32, 50, 32), (32, 32, 32), (96, 128, 32)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("ids", "place", "head"), [*zip(IDS, PLACES, HEADS, strict=True)])
def test_the_logits_are_the_models(
    sizes: tuple[int, int, int], bias: bool, ids: str, place: str, head: str, tmp_path: Path
) -> None:
    checkpoint = of_size(*sizes, bias=bias)
    onnx.save(Builder(checkpoint).model(ids, place, head), tmp_path / "theirs.onnx")
    assert GraphReader(onnx.load(tmp_path / "theirs.onnx")).config().bias == bias
    check(tmp_path / "theirs.onnx", checkpoint, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "how", "opt_levels"),
    [
        ((32, 50, 32), ("plain", "gathered", "folded"), (3,)),
        ((32, 32, 32), ("reshaped", "sliced", "transposed"), (0, 3)),
        ((96, 128, 32), ("cast", "expanded", "gemm"), (3,)),
    ],
    ids=str,
)
def test_what_is_compiled_gives_them_too(
    sizes: tuple[int, int, int], how: tuple[str, str, str], opt_levels: tuple[int, ...], tmp_path: Path
) -> None:
    checkpoint = of_size(*sizes)
    onnx.save(Builder(checkpoint).model(*how), tmp_path / "theirs.onnx")
    check(tmp_path / "theirs.onnx", checkpoint, tmp_path, opt_levels)


@pytest.mark.parametrize(
    ("sizes", "dynamo"),
    [
        *(((32, 50, 32), False), ((32, 32, 32), False), ((64, 3141, 64), False)),
        pytest.param((32, 32, 32), True, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_what_torch_traces_is_read(sizes: tuple[int, int, int], dynamo: bool, tmp_path: Path) -> None:
    checkpoint, path = of_size(*sizes), tmp_path / "theirs.onnx"
    names = {"input_names": ["tokens"], "output_names": ["scores"]}
    axes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    older = {name: {0: "B", 1: "T"} for (name,) in names.values()}
    dynamic = {"dynamic_shapes": {"ids": axes}} if dynamo else {"dynamic_axes": older}
    model, ids = checkpoint.build("sdpa"), torch.zeros(2, 8, dtype=torch.int64)
    torch.onnx.export(model, (ids,), path, opset_version=18, dynamo=dynamo, verbose=False, **names, **dynamic)
    assert replace(GraphReader(onnx.load(path)).config(), tied_head=True) == checkpoint.config
    check(path, checkpoint, tmp_path)


def with_head(dims: tuple[int, int]) -> onnx.ModelProto:
    """A file of a square head whose last product is with another matrix."""
    builder = Builder(of_size(32, 50, 32))
    proto = builder.model("plain", "gathered", "folded")
    (head,) = (tensor for tensor in proto.graph.initializer if tensor.name == "head")
    head.CopyFrom(numpy_helper.from_array(np.zeros(dims, np.float32), "head"))
    return proto


@pytest.mark.parametrize("dims", [(50, 32), (32, 32), (32, 51)])
def test_a_head_that_does_not_fit_the_tokens_is_refused(dims: tuple[int, int]) -> None:
    says = rf"its last matrix product is with \[{dims[0]}, {dims[1]}\], not with a head of as many columns"
    with pytest.raises(UserError, match=says):
        GraphReader(with_head(dims)).config()


def test_positions_that_depend_on_the_ids_are_refused() -> None:
    """Rows of both tables are chosen by what the ids are, so that neither is of positions."""
    proto = Builder(of_size(32, 32, 32)).model("plain", "gathered", "transposed")
    (gather,) = (node for node in proto.graph.node if node.input[:1] == ["transformer.wpe.weight"])
    gather.input[1] = "input_ids"
    with pytest.raises(UserError, match=r"gathers from tables \[32, 32\], \[32, 32\], where a GPT-2 has two of one"):
        GraphReader(proto).config()
