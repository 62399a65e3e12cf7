"""What one GPU of a name can do: its data sheet's figures, without sparsity; docs/planning.md names the sheets."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from megatron_fec.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """Rates are per second and per GPU, links in one direction."""

    name: str
    device_names: tuple[str, ...]  # what torch.cuda.get_device_name says
    capability: tuple[int, int]  # compute capability
    memory: float  # bytes
    bf16: float  # FLOP/s
    fp8: float
    fp32: float
    hbm: float  # bytes/s
    nvlink: float
    network: float  # to other nodes
    host_link: float  # PCIe, to host memory
    price: float  # dollars an hour; an assumption, which --price replaces

    def peak(self, precision: str) -> float:
        """FLOP/s of the products of a policy.precision."""
        if precision == "fp32":
            return self.fp32
        return self.bf16 if precision == "bf16" else self.fp8


GPUS = {
    "h100-80": Gpu(
        name="h100-80",
        device_names=("NVIDIA H100 80GB HBM3",),
        capability=(9, 0),
        memory=80e9,
        bf16=989e12,
        fp8=1979e12,
        fp32=67e12,
        hbm=3.35e12,
        nvlink=450e9,
        network=50e9,
        host_link=64e9,
        price=3.0,
    ),
    "h200": Gpu(
        name="h200",
        device_names=("NVIDIA H200",),
        capability=(9, 0),
        memory=141e9,
        bf16=989e12,
        fp8=1979e12,
        fp32=67e12,
        hbm=4.8e12,
        nvlink=450e9,
        network=50e9,
        host_link=64e9,
        price=4.0,
    ),
    "b200": Gpu(
        name="b200",
        device_names=("NVIDIA B200",),
        capability=(10, 0),
        memory=180e9,
        bf16=2250e12,
        fp8=4500e12,
        fp32=75e12,
        hbm=8.0e12,
        nvlink=900e9,
        network=50e9,
        host_link=64e9,
        price=6.0,
    ),
}


def find_gpu(name: str) -> Gpu:
    """The GPU of this name; ConfigError names the nearest one."""
    if name in GPUS:
        return GPUS[name]
    begun = [known for known in GPUS if name and known.startswith(name.lower())]  # h100 for h100-80
    near = begun or difflib.get_close_matches(name.lower(), GPUS, n=1, cutoff=0.3)
    remedy = f" Did you mean {near[0]}?" if near else ""
    raise ConfigError(f"--gpu {name} is not a GPU that the planner knows: {', '.join(GPUS)}.{remedy}")


def gpu_of_device(device_name: str) -> Gpu | None:
    """The GPU that torch.cuda.get_device_name means, or None."""
    return next((gpu for gpu in GPUS.values() if device_name in gpu.device_names), None)
