import pytest

from gpt.hardware import ARCHS, DEFAULT_ARCH, GPUS, gpu_named, multiprocessors_of


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_figures_are_of_the_units_they_are_said_to_be(gpu):
    assert 1e11 < gpu.bytes_per_s < 1e13
    assert all(1e13 < rate < 1e16 for rate in gpu.flops_per_s.values())
    assert gpu.flops_per_s["fp32"] <= gpu.flops_per_s["fp16"]


@pytest.mark.parametrize("gpu", [gpu for gpu in GPUS if gpu.arch in ARCHS], ids=lambda gpu: gpu.name)
def test_no_product_is_larger_than_its_archs_largest(gpu):
    assert gpu.multiprocessors <= multiprocessors_of(gpu.arch)


def test_an_arch_of_unknown_products_takes_the_default_archs_number():
    assert multiprocessors_of("sm_88") == multiprocessors_of(DEFAULT_ARCH) == 84


@pytest.mark.parametrize(
    ("name", "product"),
    [
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA RTX A4000", None),  # no A40
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),  # no RTX 4090
    ],
)
def test_a_product_is_known_by_the_drivers_name(name, product):
    found = gpu_named(name)
    assert (found and found.name) == product
