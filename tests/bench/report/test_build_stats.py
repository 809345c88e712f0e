from pathlib import Path

from bench.backends import Candidate
from bench.harness.work import Prefill
from bench.models.artifacts import Artifacts
from bench.report.build_stats import compiled_of


def test_another_engines_folder_is_no_compiled_model(tmp_path: Path) -> None:
    """A folder of CTranslate2 also holds a model.json."""
    theirs = tmp_path / "ctranslate2"
    theirs.mkdir()
    (theirs / "model.json").write_text("{}")
    (theirs / "model.bin").write_bytes(b"")
    candidates = [Candidate("ctranslate2", "", "fp32", ((Prefill.phase, name),), "") for name in (theirs.name, "none")]
    assert compiled_of(Artifacts(tmp_path), candidates, [Prefill(1, 16)], "fp32") == []
