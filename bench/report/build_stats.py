"""What compilers made of the same file: how long it took them, and how large it is, from the compiled models."""

from collections.abc import Iterable

from bench.backends import Candidate
from bench.harness.work import Prefill, Work
from bench.models.artifacts import Artifacts

IMPORT = "import"  # the phase with which a file has become a compiler's own


def compiled_of(
    artifacts: Artifacts, candidates: Iterable[Candidate], works: Iterable[Work], precision: str
) -> list[dict]:
    """One row for each candidate that runs a compiled model of TVM's at a piece of prefill.

    group, label, phase, work as in `bench.harness.results`; import_s and build_s, without a search; library_bytes,
    weights_bytes; kernels, how many differ, and calls, how many a forward pass makes.
    """
    from tvm_frontend.artifact import WEIGHTS, is_ours, load_compiled

    found = []
    for work in works:
        for candidate in candidates:
            file = dict(candidate.files).get(Prefill.phase)
            if candidate.absent or file is None or work.phase != Prefill.phase:
                continue
            path = artifacts.folder / file / (f"{work.B}x{work.T}" if candidate.static else "")
            if not is_ours(path):  # another engine's folder, or none
                continue
            model = load_compiled(path)
            import_s, build_s = _split(model.phases_s)
            found.append(
                {
                    "group": precision,
                    "label": candidate.label,
                    "phase": work.phase,
                    "work": work.name,
                    "import_s": import_s,
                    "build_s": build_s,
                    "library_bytes": sum(library.stat().st_size for library in model.libraries),
                    "weights_bytes": (path / WEIGHTS).stat().st_size,
                    "kernels": len(model.kernels),
                    "calls": sum(model.kernels.values()),
                }
            )
    return found


def _split(phases_s: dict[str, float]) -> tuple[float, float]:
    """Seconds up to the import, and after it."""
    names = list(phases_s)
    before = names[: names.index(IMPORT) + 1]
    return sum(phases_s[name] for name in before), sum(
        seconds for name, seconds in phases_s.items() if name not in (*before, "search")
    )
