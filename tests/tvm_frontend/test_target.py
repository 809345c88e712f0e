import re
from pathlib import Path

import pytest

from gpt.cli import UserError
from tvm_frontend import target as target_module
from tvm_frontend.target import CUDA_ARCHS, CompileTarget, check_runs_here, resolve_target

ROOT = Path(__file__).parents[2]


def test_llvm_is_compiled_for_this_machines_cpu_and_runs_here():
    target = resolve_target("llvm")
    assert target.kind == target.name == "llvm"
    assert target.arch is None
    with pytest.raises(ValueError, match="llvm: has no arch"):
        _ = target.gpu_arch
    assert target.to_tvm().attrs["mcpu"] == target.mcpu
    check_runs_here(target.to_json())


def test_cuda_is_compiled_for_sm_86_unless_told_otherwise():
    assert resolve_target("cuda").arch == resolve_target("cuda").gpu_arch == "sm_86"
    tvm_target = resolve_target("cuda", arch="sm_90").to_tvm()
    assert tvm_target.attrs["arch"] == "sm_90"
    assert tvm_target.host.attrs["mcpu"] == resolve_target("llvm").mcpu


@pytest.mark.parametrize(
    ("mcpu", "vector_bits", "has", "lacks"),
    [
        ("x86-64", 128, {"sse2"}, {"avx", "fma"}),
        ("haswell", 256, {"avx2", "fma"}, {"avx512f"}),
        ("skylake-avx512", 512, {"avx512f", "fma"}, {"avx512vnni"}),
        ("znver4", 512, {"avx512vnni", "avx512bf16"}, {"avx512fp16"}),
    ],
)
def test_a_named_cpu_brings_its_own_features(mcpu, vector_bits, has, lacks):
    target = resolve_target(mcpu=mcpu)
    assert target.vector_bits == vector_bits
    assert has <= target.features
    assert not lacks & target.features


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"kind": "cudda"}, "near: cuda"),
        ({"kind": "cuda", "arch": "sm_50"}, "known are sm_75"),
        ({"kind": "cuda", "arch": "sm_86,"}, "arch '': not known"),
        ({"kind": "cuda", "arch": "sm_8"}, "near: sm_8"),
        ({"kind": "llvm", "arch": "sm_86"}, "--target cuda"),
        ({"mcpu": "skylake-avx51"}, "near: skylake-avx512"),
        ({"mcpu": "i386"}, "32-bit"),
    ],
)
def test_a_wrong_word_is_named_with_what_to_say_instead(arguments, said):
    with pytest.raises(UserError, match=said) as caught:
        resolve_target(**arguments)
    assert "\n" not in str(caught.value)


def test_no_arch_that_cuda_13_dropped_is_known():
    assert min(int(arch.removeprefix("sm_")) for arch in CUDA_ARCHS) == 75


def test_json_and_back_is_the_same_target():
    target = resolve_target("cuda", mcpu="haswell", arch="sm_80")
    assert CompileTarget.from_json(target.to_json()) == target


def test_features_that_the_machine_hides_are_switched_off(monkeypatch):
    host = target_module._host_features()
    hidden = "sse4.2" if "sse4.2" in host else sorted(host)[0]
    monkeypatch.setattr(target_module, "_host_features", lambda: host - {hidden})
    target = resolve_target("llvm")
    assert hidden not in target.features
    assert f"-{hidden}" in target.to_tvm().attrs["mattr"]


def test_a_lesser_cpu_is_told_what_it_lacks(monkeypatch):
    needs = resolve_target(mcpu="skylake-avx512").to_json()
    monkeypatch.setattr(target_module, "_host_features", lambda: resolve_target(mcpu="haswell").features)
    with pytest.raises(UserError, match=r"skylake-avx512.* lacks avx512bw, avx512cd, avx512dq, avx512f, avx512vl"):
        check_runs_here(needs)


@pytest.mark.parametrize(
    ("compiled", "here", "said"),
    [
        ("sm_86", None, "runs sm_86, and this machine shows none"),
        ("sm_80,sm_86", None, "runs sm_80 or sm_86, and"),
        ("sm_80,sm_86", "sm_90", "compiled for sm_80 or sm_86, and this machine's GPU is sm_90"),
        ("sm_86", "sm_80", "this machine's GPU is sm_80"),
        ("sm_86", "sm_90", "--arch sm_90"),
        ("sm_103", "sm_100", "--arch sm_100"),
    ],
)
def test_a_missing_or_other_gpu_is_an_error(monkeypatch, compiled, here, said):
    monkeypatch.setattr("tvm_frontend.cuda_toolchain.gpu_arch", lambda: here)
    with pytest.raises(UserError, match=said):
        check_runs_here(resolve_target("cuda", arch=compiled).to_json())


@pytest.mark.parametrize(
    ("compiled", "here", "runs"),
    [
        ("sm_86", "sm_86", "sm_86"),
        ("sm_86", "sm_89", "sm_86"),
        ("sm_80,sm_86,sm_90", "sm_86", "sm_86"),
        ("sm_86,sm_80,sm_90", "sm_89", "sm_86"),
        ("sm_80,sm_86,sm_90", "sm_90", "sm_90"),
    ],
)
def test_machine_code_runs_on_its_arch_and_later_minor_ones(monkeypatch, compiled, here, runs):
    monkeypatch.setattr("tvm_frontend.cuda_toolchain.gpu_arch", lambda: here)
    assert check_runs_here(resolve_target("cuda", arch=compiled).to_json()) == runs


def test_several_archs_are_named_together_and_compiled_for_one_by_one():
    target = resolve_target("cuda", arch="sm_80,sm_86,sm_80")
    assert target.name == "sm_80-sm_86"
    assert [each.to_tvm().attrs["arch"] for each in target.each()] == ["sm_80", "sm_86"]


def test_what_a_schedule_asks_the_cpu_for_is_recorded_in_the_artifact():
    """A feature of `_ONLY_BY_NAME` is not, so no kernel may call for it by name."""
    sources = [path.read_text() for path in (ROOT / "tvm_frontend").rglob("*.py")]
    asked = {name for text in sources for name in re.findall(r'"([\w.-]+)" in (?:\w+\.)*features', text)}
    assert {"avx512bf16", "avx512vnni"} <= asked
    assert not asked & target_module._ONLY_BY_NAME
    assert asked <= target_module._host_detection().keys()


@pytest.mark.parametrize("feature", ["avx512bf16", "avx512vnni"])
def test_the_narrow_products_instructions_are_needed(monkeypatch, feature):
    needs = resolve_target(mcpu="znver4")
    monkeypatch.setattr(target_module, "_host_features", lambda: needs.features - {feature})
    with pytest.raises(UserError, match=f"znver4.* lacks {feature}: compile it here"):
        check_runs_here(needs.to_json())
