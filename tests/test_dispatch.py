"""Which form of an op a device chooses."""

import pytest
import tnl_kernels
import torch
from tnl_kernels.dispatch import form_of


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1", "meta", torch.device("cpu")])
def test_known_devices(device):
    assert form_of(device) == "torch"


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_other_devices_are_refused_with_the_known_ones(device):
    with pytest.raises(ValueError, match=f"on {device} tensors: move them to one of cpu, cuda, meta"):
        form_of(device)


def test_the_ops_ask_here(monkeypatch):
    monkeypatch.setattr("tnl_kernels.dispatch.FORM_OF_DEVICE", {})
    form_of.cache_clear()
    with pytest.raises(ValueError, match="no op of tnl_kernels is known to work on cpu tensors"):
        tnl_kernels.srmsnorm(torch.ones(1, 2))
    form_of.cache_clear()
