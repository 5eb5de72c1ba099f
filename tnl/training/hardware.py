"""Peak arithmetic rate of a device, the denominator of MFU."""

import re
import time

import torch

# Dense bf16 TFLOP/s of the data sheets; the first name that stands in the device's name counts.
PEAK_BF16_TFLOPS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "V100": 125.0,
}


def peak_flops(device: torch.device, given_tflops: float | None) -> tuple[float | None, str]:
    """Peak FLOP/s of one device, and where the figure is from.

    ``given_tflops`` first, then the data sheet of a known GPU. The figure of a CPU is measured by one matrix
    product, on the threads that this process has. An unknown GPU has none: MFU is then not reported.
    """
    if given_tflops:
        return given_tflops * 1e12, "logging.peak_tflops"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, tflops in PEAK_BF16_TFLOPS.items():
            if re.search(rf"\b{known}\b", name):
                return tflops * 1e12, f"data sheet of {known}, dense bf16"
        return None, f"unknown for {name}; set logging.peak_tflops to see MFU"
    n, best = 1024, float("inf")
    a, b = torch.ones(n, n), torch.ones(n, n)
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best, "measured fp32 matrix product"
