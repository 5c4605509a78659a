"""How busy the machine was during a run: process CPU and memory, RAM, and the GPU through NVML."""

import time

import psutil
import torch

MIB = 2**20


class Monitor:
    """Sampled by its owner every few hundred milliseconds, from any one thread.

    GPU figures need a CUDA device that is already in use and the package nvidia-ml-py (module `pynvml`);
    without them the reason is part of the result.
    """

    def __init__(self, device: torch.device | None = None):
        self._process = psutil.Process()
        self._started = time.perf_counter()
        self._cpu_started = self._cpu_seconds()
        self._rss = self._ram = self._gpu_used = 0
        self._utilisation: list[int] = []
        self._missing = None
        self._handle = None
        self._nvml = None
        self._name = "cpu" if device is None else device.type
        self._device = device if self._name == "cuda" and torch.cuda.is_initialized() else None
        if self._device is None:
            self._missing = "no CUDA device"
        else:
            self._open_nvml(self._device)
        self.sample()

    def sample(self) -> None:
        """Look once; a few hundred microseconds."""
        self._rss = max(self._rss, self._process.memory_info().rss)
        self._ram = max(self._ram, psutil.virtual_memory().used)
        if self._nvml is None or self._handle is None:
            return
        try:
            self._gpu_used = max(self._gpu_used, int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used))
            self._utilisation.append(int(self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu))
        except self._nvml.NVMLError as error:
            self._handle, self._missing = None, f"NVML: {error}"

    def process(self) -> dict:
        """CPU in percent of one core since the start, and the largest memory seen, in MiB."""
        elapsed = max(time.perf_counter() - self._started, 1e-6)
        return {
            "cpu_percent": round((self._cpu_seconds() - self._cpu_started) / elapsed * 100, 1),
            "rss_mib_max": round(self._rss / MIB, 1),
            "ram_used_mib_max": round(self._ram / MIB, 1),
            "ram_total_mib": round(psutil.virtual_memory().total / MIB, 1),
        }

    def device(self) -> dict:
        """The device's name and size, and what NVML saw."""
        if self._device is None:
            return {"name": self._name, "utilisation_missing": self._missing}
        properties = torch.cuda.get_device_properties(self._device)
        result = {"name": properties.name, "total_mib": round(properties.total_memory / MIB, 1)}
        if self._utilisation:
            result["used_mib_max"] = round(self._gpu_used / MIB, 1)
            result["utilisation_mean"] = round(sum(self._utilisation) / len(self._utilisation), 1)
            result["utilisation_max"] = max(self._utilisation)
        if self._missing:
            result["utilisation_missing"] = self._missing
        return result

    def _open_nvml(self, device: torch.device) -> None:
        try:
            import pynvml
        except ImportError:
            self._missing = "the package nvidia-ml-py is not installed"
            return
        try:
            pynvml.nvmlInit()
            # by UUID: CUDA_VISIBLE_DEVICES renumbers torch's devices, not NVML's
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
            self._nvml = pynvml
        except pynvml.NVMLError as error:
            self._missing = f"NVML: {error}"

    def _cpu_seconds(self) -> float:
        times = self._process.cpu_times()
        return times.user + times.system
