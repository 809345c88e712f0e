"""Runs compiled models: sessions on a CPU and on a GPU, the CUDA graph of a step, and the threads of kernels."""

from typing import TYPE_CHECKING

from tvm_frontend.artifact import RELAY, CompiledModel
from tvm_frontend.runtime.threads import chosen_threads
from tvm_frontend.target import check_runs_here

if TYPE_CHECKING:
    from tvm_frontend.relay.session import RelaySession
    from tvm_frontend.runtime.graph_session import GraphSession
    from tvm_frontend.runtime.session import CachedSession, Session


def open_session(
    model: CompiledModel, threads: int | None = None
) -> "Session | CachedSession | GraphSession | RelaySession":
    """Load a model's library and map its weights, ready to run on `threads` CPU threads.

    By default the number is TVM_NUM_THREADS, or else OMP_NUM_THREADS, or else one thread for each physical core that
    this process may use. Between steps the threads sleep, unless TVM_THREAD_POOL_SPIN_COUNT makes them look for work
    longer. A model with a cache gives a `CachedSession`, one that chooses tokens on its GPU a `DeviceSession`, and one
    that Relay compiled a `RelaySession`, which runs in a process of Relay's environment; a file that was compiled as it
    is gives a `GraphSession`. Raises UserError if this machine cannot run the code.
    """
    arch = check_runs_here(model.target)
    if model.frontend == RELAY:
        from tvm_frontend.relay.session import RelaySession

        return RelaySession(model, chosen_threads(threads), arch)
    # These imports load TVM, which neither a RelaySession nor whoever imports `runtime.threads` alone needs.
    from tvm_frontend.graph import CHOOSE
    from tvm_frontend.runtime.device_session import DeviceSession
    from tvm_frontend.runtime.session import CachedSession, Session

    if model.form == "graph":
        from tvm_frontend.runtime.graph_session import GraphSession

        return GraphSession(model, chosen_threads(threads), arch)
    kind: type[Session] | type[CachedSession] = Session
    if model.form == "cached":
        kind = DeviceSession if CHOOSE in model.entry_points else CachedSession
    return kind(model, chosen_threads(threads), model.library(arch))
