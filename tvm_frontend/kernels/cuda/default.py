"""GPU schedules by TVM's dlight rules for every kernel of a Relax module that has no schedule of its own."""

import logging
from collections.abc import Sequence

import tvm
from tvm import relax
from tvm.ir.transform import Pass, PassContext, module_pass
from tvm.s_tir import Schedule, ScheduleError, dlight
from tvm.tirx import PrimFunc

from tvm_frontend.target import CompileTarget

log = logging.getLogger(__name__)


def schedule_cuda(target: CompileTarget) -> list[Pass]:
    """Return the passes from Relax operators to scheduled GPU kernels, as TVM's own `tvm.relax.backend.cuda.pipeline`.

    B and T may be symbolic. The passes that follow (dataflow lowering, memory planning) are the same for all targets.
    """
    return [
        relax.backend.DispatchSortScan(),
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FoldConstant(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        ScheduleKernels(
            target.to_tvm(),
            (
                dlight.gpu.Matmul(),
                dlight.gpu.GEMV(),
                dlight.gpu.Reduction(),
                dlight.gpu.GeneralReduction(),
                dlight.gpu.Fallback(),
            ),
        ),
    ]


@module_pass(opt_level=0, name="ScheduleKernels")
class ScheduleKernels:
    """Schedule each kernel that has no schedule yet by the first of `rules` that matches it and succeeds on it.

    dlight's own pass lets a rule that fails half-way (ScheduleError) end the compilation, as Matmul does in float16
    with B=2 and a symbolic T. Here the next rule follows, and a warning names kernel and rule. Raises the last
    ScheduleError if no rule is left.
    """

    def __init__(self, target: tvm.target.Target, rules: Sequence[dlight.ScheduleRule]) -> None:
        self.target = target
        self.rules = rules

    def transform_module(self, module: tvm.IRModule, _context: PassContext) -> tvm.IRModule:
        """Return `module` with its kernels scheduled; TVM calls this."""
        scheduled = {}
        for name, function in module.functions_items():
            if isinstance(function, PrimFunc) and not function.attrs.get("tirx.is_scheduled", False):
                schedule = self._first_that_fits(name.name_hint, function)
                if schedule is not None:
                    scheduled[name] = schedule.mod["main"].with_attr("tirx.is_scheduled", True)
        for name, function in scheduled.items():
            module[name] = function
        return module

    def _first_that_fits(self, name: str, function: PrimFunc) -> Schedule | None:
        failure = None
        for rule in self.rules:
            try:
                schedule = rule.apply(function, self.target, False)
            except ScheduleError as error:
                failure = error
                log.warning("kernel %s: rule %s failed on it, trying the next", name, type(rule).__name__)
                continue
            if schedule is not None:
                return schedule
        if failure is not None:
            raise failure
        return None
