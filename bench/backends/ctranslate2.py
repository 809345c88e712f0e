"""Runs CTranslate2 on the checkpoint as its own converter writes it, by way of a Hugging Face GPT-2 folder."""

import json
from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from bench.backends import Backend, Variant
from bench.correctness.rounding import Rounding, by_row
from bench.models.artifacts import CTRANSLATE2, Artifacts

FILES = dict.fromkeys(("prefill", "generate"), CTRANSLATE2)


class Engine(Backend[Artifacts]):
    """Runs its generator: a forward pass over a prompt, and its own generation loop over a KV cache.

    From Python that loop cannot be fed one token at a time, so the decode phase is absent and generate measures it.
    """

    requires: ClassVar[dict[str, str]] = {"ctranslate2": "ctranslate2", "transformers": "transformers"}
    summary = "CTranslate2, its own converter and its own loop over a KV cache; from Python it has no single step"
    variants: ClassVar[dict[str, Variant]] = {
        "": Variant(FILES),
        "bf16": Variant(FILES, "bf16"),
        "int8": Variant(
            FILES,
            "int8",
            about="weights and activations of products in 8 bits",
            rounding=Rounding(by_row, by_row, tables=by_row),
        ),
    }
    compute_types: ClassVar[dict[str, str]] = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}

    def _load(self, artifacts: Artifacts, threads: int) -> None:
        import ctranslate2

        from export.ctranslate2 import VOCABULARY, read_files

        folder = artifacts.folder / CTRANSLATE2
        files = read_files(folder)
        compute_type = self.compute_types[self.variant.precision]
        self._generator = ctranslate2.Generator(
            str(folder), files=files, device="cpu", compute_type=compute_type, inter_threads=1, intra_threads=threads
        )
        self._tokens: list[str] = json.loads(files[VOCABULARY])

    def _prefill(self, ids: np.ndarray) -> np.ndarray:
        from ctranslate2 import StorageView

        B, T = ids.shape
        dense = StorageView.from_array(np.ascontiguousarray(ids, np.int32))
        lengths = StorageView.from_array(np.full(B, T, np.int32))
        return np.asarray(self._generator.forward_batch(dense, lengths))

    def _generate(self, ids: np.ndarray, tokens: int) -> np.ndarray:
        prompts = [[self._tokens[index] for index in row] for row in ids]
        # The prompt is processed in one pass, and no end token stops the generation early.
        results = self._generator.generate_batch(
            prompts, min_length=tokens, max_length=tokens, end_token=[], include_prompt_in_result=False
        )
        return np.array([result.sequences_ids[0] for result in results])  # [B, tokens]

    def _stream(self, ids: np.ndarray, tokens: int) -> Iterator[np.ndarray]:
        prompts = [[self._tokens[index] for index in row] for row in ids]
        steps = self._generator.generate_tokens(prompts, min_length=tokens, max_length=tokens, end_token=[])
        for step in zip(*[iter(steps)] * len(ids), strict=True):  # one step of each sequence
            chosen = {each.batch_id: each.token_id for each in step}
            yield np.array([chosen[row] for row in range(len(ids))])

    def versions(self) -> dict[str, str]:
        import ctranslate2

        return {"ctranslate2": ctranslate2.__version__}
