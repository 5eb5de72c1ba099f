"""Which form of an op a device chooses."""

import pytest
import tnl_kernels
import torch
from tnl_kernels.dispatch import FORM_OF_DEVICE, _log, form_of


@pytest.mark.parametrize("device", ["cpu", "meta", torch.device("cpu")])
def test_host_tensors_take_the_torch_forms(device):
    assert form_of(device) == "torch"


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda")])
def test_gpu_tensors_take_the_triton_forms_but_fp64_ones(device):
    assert form_of(device) == "triton"
    assert form_of(device, torch.bfloat16) == "triton"
    assert form_of(device, torch.float64) == "torch"


def test_the_choice_is_logged_once(caplog):
    _log.cache_clear()
    with caplog.at_level("INFO", logger="tnl_kernels.dispatch"):
        form_of("cpu")
        form_of("cpu")
    assert caplog.messages == ["ops on cpu tensors use the torch forms"]


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_other_devices_are_refused_with_the_known_ones(device):
    with pytest.raises(ValueError, match=f"on {device} tensors: move them to one of cpu, cuda, meta"):
        form_of(device)


def test_the_ops_ask_here(monkeypatch):
    monkeypatch.setattr("tnl_kernels.dispatch.FORM_OF_DEVICE", {})
    with pytest.raises(ValueError, match="no op of tnl_kernels is known to work on cpu tensors"):
        tnl_kernels.srmsnorm(torch.ones(1, 2))


def test_an_fp64_stream_takes_the_torch_form(monkeypatch):
    monkeypatch.setitem(FORM_OF_DEVICE, "cpu", "triton")
    x, residual = torch.randn(3, 8), torch.randn(3, 8, dtype=torch.float64)
    _, total = tnl_kernels.add_srmsnorm(x, residual)
    assert torch.equal(total, residual + x)
