"""Clocks, power and temperature of the GPU, read through nvidia-ml-py where it is installed."""

from typing import Any

import torch


def driver_version(device: torch.device) -> str | None:
    """The GPU driver's version; None on a CPU or without nvidia-ml-py."""
    nvml = _nvml(device)
    return str(nvml.nvmlSystemGetDriverVersion()) if nvml else None


def gpu_state(device: torch.device) -> dict[str, Any] | None:
    """The device's state now; None on a CPU or without nvidia-ml-py."""
    nvml = _nvml(device)
    if nvml is None:
        return None
    try:
        handle = _handle(nvml, device)
        return {
            "sm_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "power_w": nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "temperature_c": nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        }
    except nvml.NVMLError as error:  # virtual machines may hide some of it
        return {"error": str(error)}


def _nvml(device: torch.device) -> Any:
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    pynvml.nvmlInit()
    return pynvml


def _handle(nvml: Any, device: torch.device) -> Any:
    # By its bus address: NVML counts all GPUs, torch only the visible ones.
    properties: Any = torch.cuda.get_device_properties(device)
    address = (
        f"{properties.pci_domain_id:08x}:{properties.pci_bus_id:02x}"
        f":{properties.pci_device_id:02x}.0"
    )
    return nvml.nvmlDeviceGetHandleByPciBusId(address)
