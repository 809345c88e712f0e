"""Lists the files of the matrix: which model by which exporter, for which opset, changed by which tool."""

from dataclasses import dataclass

from bench.studies.foreign import MODELS, OWN_LAYOUTS

PLAIN = "plain"
# The variants: those that are two tools' or two ways of the same stand together.
KINDS = (("simplified", "slimmed"), ("fp16", "fp16-inside"), ("int8",), ("qdq",), ("ort",), ("fused",))
VARIANTS = (PLAIN, *(variant for kind in KINDS for variant in kind), "int4")
PLAIN_ALONE = ("nanogpt-biases", "nanogpt-one-head", "mingpt-one-head")
# Exporters with the environment that they run in and the opsets that they are asked for.
TORCH, OPTIMUM, TOOLS = "torch", "optimum", "tools"
REFUSED, VERSIONS = "refused.json", "versions.json"  # the ends of the names of what stands beside the files
OPSETS_OF_OWN = {"dynamo": (18, 20, 23, 24), "torchscript": (11, 14, 17, 20)}
OPSETS_OF_THEIRS = {
    "dynamo": (18, 20, 23, 24),
    "dynamo-mask": (18, 23),
    "dynamo-past": (18, 23),
    "torchscript": (17,),
    "torchscript-mask": (11, 14, 20),
    "optimum": (14, 18),
    "optimum-past": (14, 17, 20),
}
IN_ALL_VARIANTS = (
    ("dynamo", 18),
    ("dynamo-mask", 23),
    ("torchscript", 17),
    ("torchscript-mask", 14),
    ("optimum", 18),
    ("optimum-past", 17),
)


@dataclass(frozen=True)
class Recipe:
    """Says how a file is made: of a model, by an exporter, for an opset, and in which variant."""

    model: str
    exporter: str
    opset: int
    variant: str = PLAIN

    @property
    def name(self) -> str:
        """The file's name."""
        return f"{self.model}-{self.exporter}-{self.opset}-{self.variant}.onnx"


def recipes() -> list[Recipe]:
    """List all files: each model by each exporter plain, and in the variants for one opset of each exporter.

    Two tools that do the same take turns from model to model; and so do the variants of the other opsets.
    """
    found: list[Recipe] = []
    for number, model in enumerate(MODELS):
        for exporter, opsets in (OPSETS_OF_OWN if model in OWN_LAYOUTS else OPSETS_OF_THEIRS).items():
            for turn, opset in enumerate(opsets):
                found.append(Recipe(model, exporter, opset))
                if model in PLAIN_ALONE:
                    continue
                if (exporter, opset) in IN_ALL_VARIANTS:
                    which = (number + len(exporter)) % 2
                    variants = [kinds[which % len(kinds)] for kinds in KINDS]
                    variants += ["int4"] if which else []
                else:
                    variants = [VARIANTS[1:][(number + 3 * turn + 5 * len(exporter)) % (len(VARIANTS) - 1)]]
                found += [Recipe(model, exporter, opset, variant) for variant in variants]
    return found
