"""Build statistics of compiled models: import and build time, sizes, and numbers of kernels."""

from collections.abc import Iterable

from bench.backends import Candidate
from bench.harness.work import Prefill, Work
from bench.models.artifacts import Artifacts

IMPORT = "import"  # the compiler phase that ends with the graph in the compiler's own IR


def compiled_of(
    artifacts: Artifacts, candidates: Iterable[Candidate], works: Iterable[Work], precision: str
) -> list[dict]:
    """Collect one row for each candidate that runs a model compiled by TVM at a prefill shape.

    A row has group, label, phase and work as in `bench.harness.results`; import_s and build_s, which excludes a search;
    library_bytes and weights_bytes; kernels, the number of distinct ones, and calls, the launches of a forward pass.
    """
    from tvm_frontend.artifact import WEIGHTS, is_ours, load_compiled

    found = []
    for work in works:
        for candidate in candidates:
            file = dict(candidate.files).get(Prefill.phase)
            if candidate.absent or file is None or work.phase != Prefill.phase:
                continue
            path = artifacts.folder / file / (f"{work.B}x{work.T}" if candidate.static else "")
            if not is_ours(path):  # a folder of another engine, or absent
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
    """Split the seconds into those up to the import, and those after it without a search."""
    names = list(phases_s)
    before = names[: names.index(IMPORT) + 1]
    return sum(phases_s[name] for name in before), sum(
        seconds for name, seconds in phases_s.items() if name not in (*before, "search")
    )
