"""GPT-2s that differ from the published ones are compiled right, whatever of them has a kernel of its own."""

from dataclasses import replace
from pathlib import Path

import pytest

from export.onnx import export_onnx
from gpt.checkpoint import save_checkpoint, seeded_checkpoint
from gpt.config import GPTConfig
from tvm_frontend.check import check_only
from tvm_frontend.compile import compile_model

SMALL = GPTConfig(block_size=24, vocab_size=37, n_layer=2, n_head=2, n_embd=32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "form"),
    [
        ({"activation": "quick_gelu", "n_inner": 56}, "forward"),
        ({"activation": "silu", "scale_attn_weights": False}, "cached"),
        ({"activation": "tanh", "layer_norm_epsilon": 0.01, "scale_attn_by_inverse_layer_idx": True}, "cached"),
    ],
    ids=str,
)
def test_a_gpt2_of_other_settings_is_exported_and_compiled_right(tmp_path: Path, settings: dict, form: str) -> None:
    """Each step proves its result against the one before; weights are so large that each setting moves the logits."""
    model = seeded_checkpoint(replace(SMALL, **settings))
    save_checkpoint(tmp_path / "ckpt.pt", replace(model, state={name: 4 * each for name, each in model.state.items()}))
    exported = export_onnx(tmp_path / "ckpt.pt", tmp_path / "model.onnx", form=form)
    compile_model(exported.path, tmp_path / "tvm")
    assert check_only(tmp_path / "tvm", exported.path).startswith("checked at ")  # else it raises
