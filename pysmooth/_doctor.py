"""What runs here, and what does not, and why."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from .engine.backends import REGISTERED, fastest, native_module


def report() -> str:
    """The text that `doctor` prints."""
    lines = [
        f"pysmooth  {_version('pysmooth')}",
        f"python    {platform.python_version()} on {platform.platform()}",
        f"torch     {torch.__version__}{_toolkit()}",
        f"triton    {_version('triton')}",
        "",
        "backends",
    ]
    for info in REGISTERED:
        reason = info.missing()
        kinds = "any device" if (types := info.devices()) is None else ", ".join(types)
        if reason is None:
            lines.append(f"  {info.name:8} runs ({kinds}){_details(info.name)}")
        else:
            lines.append(f"  {info.name:8} does not run: {reason}. {info.remedy}")
    lines += ["", "devices and what backend='auto' gives them"]
    for device, name in _devices():
        lines.append(f"  {device:8} {fastest([torch.empty(0, device=device)]):8} {name}")
    return "\n".join(lines)


def doctor() -> None:
    """Prints which backends run here, which one each device gets, and why the others do not.

    Also `python -m pysmooth.doctor`. Good to have in a bug report.
    """
    print(report())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _toolkit() -> str:
    if torch.version.hip is not None:
        return f" (ROCm {torch.version.hip})"
    return " (no GPU support)" if torch.version.cuda is None else f" (CUDA {torch.version.cuda})"


def _details(backend: str) -> str:
    if backend != "cpu":
        return ""
    native = native_module()
    ways = {"directly": native.uses_direct(), "by DLPack": native.uses_dlpack()}
    way = next((way for way, there in ways.items() if there), "by Python attributes")
    return (
        f": instruction set {native.isa()}, {torch.get_num_threads()} threads, "
        f"tensors are read {way}"
    )


def _devices() -> list[tuple[str, str]]:
    found = [("cpu", platform.processor() or platform.machine())]
    if torch.cuda.is_available():
        found += [
            (f"cuda:{i}", torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())
        ]
    return found
