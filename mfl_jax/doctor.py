"""`mfl doctor`: what this machine has, what is missing, and the command that mends it (to be run in the clone)."""

import importlib.metadata
import platform
import shutil
import sys
from pathlib import Path

import psutil

from input_pipeline.cores import available_cores

REQUIRED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "ml_collections", "numpy", "scipy", "Pillow")
PIPELINE = ("tifffile", "imagecodecs", "scikit-image", "google-crc32c", "tensorflow-datasets", "h5py", "safetensors")
OPTIONAL = {
    "openslide-python": ("MRXS and what tifffile cannot read", "pip install -e '.[openslide]'"),
    "pydicom": ("DICOM slides", "pip install -e '.[dicom]'"),
    "SimpleITK": ("transforms that ITK wrote", "pip install -e '.[itk]'"),
    "apache-beam": ("tiling on a cluster", "pip install -e '.[beam]'"),
    "submitit": ("sweeps on Slurm", "pip install -e '.[slurm]'"),
}


def report(folder: Path = Path()) -> tuple[list[str], bool]:
    """Lines to print, and whether all that is required is there."""
    lines = [f"python        {sys.version.split()[0]} on {platform.platform()}"]
    faults: list[str] = []
    for name in (*REQUIRED, *PIPELINE):
        version = _version(name)
        lines.append(f"{name:<24}{version or 'MISSING'}")
        if version is None:
            faults.append(f"{name} is missing: pip install '{name}' (or reinstall: pip install -e .)")
    tensorflow = _version("tensorflow-cpu") or _version("tensorflow")
    absent = "absent (TFDS and streams of executor 'tfdata' need it): pip install tensorflow-cpu"
    lines.append(f"{'tensorflow':<24}{tensorflow or absent}")
    for name, (use, command) in OPTIONAL.items():
        lines.append(f"{name:<24}{_version(name) or f'absent ({use}): {command}'}")
    lines += _devices(faults) + _machine(folder)
    lines += [f"TO MEND: {fault}" for fault in faults] or ["all that is required is there"]
    return lines, not faults


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices(faults: list[str]) -> list[str]:
    try:
        import jax

        devices = jax.devices()
    except Exception as error:  # a broken driver shows here first, as whatever the backend raises
        faults.append(f"jax finds no device: {error}")
        return []
    kinds = ", ".join(sorted({d.device_kind for d in devices}))
    lines = [f"devices       {len(devices)} x {kinds} ({devices[0].platform})"]
    if devices[0].platform == "cpu" and shutil.which("nvidia-smi"):
        lines.append("              an NVIDIA driver is there but jax does not use it: pip install -U 'jax[cuda13]'")
    return lines


def _machine(folder: Path) -> list[str]:
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(folder)
    return [
        f"cores         {available_cores()}",
        f"memory        {memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free",
        f"disk          {disk.free / 2**30:.1f} GiB free at {folder.resolve()}",
    ]
