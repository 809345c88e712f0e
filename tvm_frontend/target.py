"""Compilation targets: their kinds, the names of CPUs and GPU archs, and the instruction sets that code may use.

The figures of GPUs (multiprocessors, shared memory, rates) stand in `gpt.hardware`.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gpt.cli import UserError
from gpt.hardware import ARCHS, BLOCK_SHARED_BYTES, BLOCK_THREADS, DEFAULT_ARCH, WARP_LANES

if TYPE_CHECKING:
    import tvm

KINDS = ("llvm", "cuda")
CUDA_ARCHS = tuple(ARCHS)

# CPU features that LLVM uses only where the program asks for one by name (cache control, memory protection keys, random
# numbers, AES, AMX, …). A machine without them runs our code, and virtual machines hide many of them.
_ONLY_BY_NAME = frozenset(
    """
    adx aes amx-avx512 amx-bf16 amx-complex amx-fp16 amx-fp8 amx-int8 amx-movrs amx-tf32 amx-tile cldemote
    clflushopt clwb clzero cmpccxadd crc32 enqcmd fsgsbase fxsr hreset invpcid kl lwp movdir64b movdiri movrs mwaitx
    pclmul pconfig pku prefetchi prfchw ptwrite raoint rdpid rdpru rdrnd rdseed rtm serialize sgx sha sha512 shstk
    sm3 sm4 tsxldtrk uintr usermsr vaes vpclmulqdq waitpkg wbnoinvd widekl xsave xsavec xsaveopt xsaves
    """.split()  # noqa: SIM905 (a list of sixty strings is unreadable)
)


# CPUs that Relay's LLVM 10 knows, one for each instruction set that changes its kernels, best first.
RELAY_CPUS = ("skylake-avx512", "haswell", "x86-64")


@dataclass(frozen=True)
class CompileTarget:
    """A target to compile for; `resolve_target` makes it.

    kind: `llvm` or `cuda`. mcpu: the host CPU by LLVM's name, for both kinds. archs: of the GPUs, as `sm_86`; empty for
    llvm. features: the CPU's instruction sets that the code may use, by LLVM's names (`avx2`, `fma`, `avx512f`, …).
    """

    kind: str
    mcpu: str
    archs: tuple[str, ...]
    features: frozenset[str]

    def each(self) -> "list[CompileTarget]":
        """Return one target per arch, or this target alone if it has no arch."""
        return [replace(self, archs=(arch,)) for arch in self.archs] or [self]

    @property
    def arch(self) -> str | None:
        """The arch of a target that `each` returned; None for llvm."""
        return self.archs[0] if self.archs else None

    @property
    def gpu_arch(self) -> str:
        """The arch of a cuda target that `each` returned. Raises ValueError for llvm, which has none."""
        if self.arch is None:
            raise ValueError(f"target {self.kind}: has no arch")
        return self.arch

    @property
    def vector_bits(self) -> int:
        """Width of the CPU's widest vector register for float32: 512, 256 or 128 bits."""
        return 512 if "avx512f" in self.features else 256 if "avx" in self.features else 128

    @property
    def name(self) -> str:
        """The name used in folder names: `llvm`, or the archs joined by hyphens."""
        return "-".join(self.archs) or self.kind

    def to_tvm(self) -> "tvm.target.Target":
        """Convert to TVM's Target, always with an explicit CPU, and for cuda with an explicit arch and host."""
        from tvm.target import Target

        # LLVM names a CPU by its model, even where the hypervisor hides some of that model's features.
        hidden = sorted(_features_of_cpu(self.mcpu) - self.features)
        host = {"kind": "llvm", "mcpu": self.mcpu} | ({"mattr": [f"-{name}" for name in hidden]} if hidden else {})
        if self.kind == "llvm":
            return Target(host)
        limits = {
            "max_threads_per_block": BLOCK_THREADS,
            "max_shared_memory_per_block": BLOCK_SHARED_BYTES,
            "thread_warp_size": WARP_LANES,
        }
        return Target({"kind": "cuda", "arch": self.arch, "host": host, **limits})

    @property
    def relay_name(self) -> str:
        """The target in Relay's spelling."""
        return f"cuda -arch={self.arch}" if self.kind == "cuda" else self.relay_host

    @property
    def relay_host(self) -> str:
        """The host CPU in Relay's spelling."""
        return f"llvm -mcpu={self.mcpu}"

    def to_json(self) -> dict[str, Any]:
        """Convert to plain JSON; `from_json` reads it back."""
        return {"kind": self.kind, "mcpu": self.mcpu, "archs": list(self.archs), "features": sorted(self.features)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "CompileTarget":
        """Read what `to_json` wrote."""
        return cls(data["kind"], data["mcpu"], tuple(data["archs"]), frozenset(data["features"]))


def resolve_target(kind: str = "llvm", *, mcpu: str | None = None, arch: str | None = None) -> CompileTarget:
    """Resolve the target that a user names: mcpu defaults to this machine's CPU, arch (cuda only) to sm_86.

    arch: one, or several separated by commas. It is never taken from a GPU that happens to be installed. Raises
    UserError for an unknown kind, mcpu or arch, and for an arch given with llvm.
    """
    if kind not in KINDS:
        instead = _flags_for(kind)
        raise UserError(
            f"target {kind!r}: say {instead}"
            if instead
            else f"target {kind!r}: not known{_near(kind, KINDS)}; known are {', '.join(KINDS)}"
        )
    if kind == "llvm" and arch is not None:
        raise UserError(f"arch {arch!r} is a GPU's and target llvm is the CPU: leave --arch out, or say --target cuda")
    archs = tuple(dict.fromkeys((arch or DEFAULT_ARCH).split(","))) if kind == "cuda" else ()
    for each in archs:
        if each not in CUDA_ARCHS:
            raise UserError(f"arch {each!r}: not known{_near(each, CUDA_ARCHS)}; known are {', '.join(CUDA_ARCHS)}")
    if mcpu is None:
        mcpu = _host_cpu()
        features = _features_of_cpu(mcpu) & _host_features()
    else:
        features = _known_cpu_features(mcpu)
    return CompileTarget(kind, mcpu, archs, features)


def _flags_for(target: str) -> str | None:
    """Return the flags for a target given in another notation: TVM's own `llvm -mcpu=NAME`, `sm_90` or `cpu`."""
    name, *options = target.split()
    given = dict(option.lstrip("-").split("=", 1) for option in options if "=" in option)
    if re.fullmatch(r"(sm|compute)_?\d+a?", name):
        return f"--target cuda --arch sm_{re.sub(r'[a-z_]', '', name)}"
    kind = {"cpu": "llvm", "host": "llvm", "native": "llvm", "gpu": "cuda", "nvidia": "cuda"}.get(name)
    kind = kind or (name if name in KINDS else None)
    if kind is None:
        return None
    flags = [f"--{flag} {given[flag]}" for flag in ({"llvm": ["mcpu"], "cuda": ["arch"]}[kind]) if flag in given]
    return " ".join([f"--target {kind}", *flags])


def resolve_relay_target(kind: str = "llvm", *, mcpu: str | None = None, arch: str | None = None) -> CompileTarget:
    """Resolve a target for Relay, whose LLVM 10 knows no CPU since 2020: by default the best one that runs here.

    Relay compiles for one arch; several raise UserError.
    """
    if mcpu is None:
        here = _host_features()
        mcpu = next(name for name in RELAY_CPUS if _features_of_cpu(name) <= here)
    target = resolve_target(kind, mcpu=mcpu, arch=arch)
    if len(target.archs) > 1:
        raise UserError(f"arch {arch!r}: Relay compiles for one at a time")
    return target


def check_runs_here(target: dict[str, Any]) -> str | None:
    """Check that code for `target` (as `CompileTarget.to_json` wrote it) runs on this machine.

    Returns which of its archs this machine's GPU runs, None for llvm. Raises UserError that names what the code needs
    and what this machine has; without the check a CPU that lacks an instruction would end in SIGILL.
    """
    needed = CompileTarget.from_json(target)
    if missing := needed.features - _host_features():
        raise UserError(
            f"this artifact was compiled for the CPU {needed.mcpu}, and this machine's ({_host_cpu()}) lacks "
            f"{', '.join(sorted(missing))}: compile it here with python -m tvm_frontend.compile, or elsewhere with "
            f"--mcpu {_host_cpu()}"
        )
    return _arch_for_this_gpu(needed.archs) if needed.kind == "cuda" else None


def _arch_for_this_gpu(archs: Sequence[str]) -> str:
    from tvm_frontend.cuda_toolchain import gpu_arch

    here, held = gpu_arch(), " or ".join(archs)
    if here is None:
        raise UserError(
            f"this artifact needs a GPU that runs {held}, and this machine shows none: run it on one that has it"
        )
    # Machine code runs on its own arch and later minor ones of the same major (CUDA programming guide, binary
    # compatibility).
    number = {arch: int(arch.removeprefix("sm_")) for arch in (*archs, here)}
    fitting = [arch for arch in archs if number[arch] // 10 == number[here] // 10 and number[arch] <= number[here]]
    if not fitting:
        raise UserError(
            f"this artifact was compiled for {held}, and this machine's GPU is {here}: compile it again with "
            f"--target cuda --arch {here}"
        )
    return max(fitting, key=number.__getitem__)


def _known_cpu_features(mcpu: str) -> frozenset[str]:
    from tvm.target import Target, codegen

    names = [str(name) for name in codegen.llvm_get_cpu_archlist(Target({"kind": "llvm"}))]
    if mcpu not in names:
        raise UserError(f"mcpu {mcpu!r}: not known to LLVM{_near(mcpu, names)}; this machine's is {_host_cpu()}")
    features = _features_of_cpu(mcpu)
    if "64bit" in _features_of_cpu(_host_cpu()) and "64bit" not in features:
        raise UserError(f"mcpu {mcpu!r}: a 32-bit CPU; name a 64-bit one, as x86-64 or this machine's {_host_cpu()}")
    return features


def _features_of_cpu(mcpu: str) -> frozenset[str]:
    from tvm.target import Target, codegen

    # LLVM's list holds tuning hints too; what it can detect on a host are the instruction sets.
    listed = frozenset(str(name) for name in codegen.llvm_get_cpu_features(Target({"kind": "llvm", "mcpu": mcpu})))
    return (listed & frozenset(_host_detection())) - _ONLY_BY_NAME


def _host_features() -> frozenset[str]:
    return frozenset(name for name, present in _host_detection().items() if present) - _ONLY_BY_NAME


def _host_detection() -> dict[str, bool]:
    """Map every feature that LLVM can detect on this kind of host to whether it is present."""
    import tvm  # noqa: F401  (registers the function)
    import tvm_ffi

    detected = tvm_ffi.get_global_func("tvm.codegen.llvm.GetHostCPUFeatures")()
    return {str(name): bool(present) for name, present in detected.items()}


def _host_cpu() -> str:
    from tvm.target import codegen

    return str(codegen.llvm_get_system_cpu())


def _near(name: str, names: "tuple[str, ...] | list[str]") -> str:
    near = difflib.get_close_matches(name, names, n=3)
    return f" (near: {', '.join(near)})" if near else ""
