import pytest
import torch

from gpt.peak import peak_flops

CPU = torch.device("cpu")


def test_a_cpus_peak_is_measured():
    peak, source = peak_flops(CPU, "fp32")
    assert 1e8 < peak < 1e15
    assert "measured" in source


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4e12),
        ("NVIDIA H200", "tf32", 494.7e12),
    ],
)
def test_a_known_gpus_peak_is_its_data_sheets(monkeypatch, name, precision, peak):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), precision) == (peak, f"{name}'s data sheet")
