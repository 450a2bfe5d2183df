"""What ONNX Runtime's CUDA provider needs: shared libraries, a driver, code for the GPU's compute capability, kernels.

Without them ONNX Runtime runs the model on the CPU; here they are looked for, and what is missing is named.
"""

import ctypes
import logging
import mmap
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import onnxruntime

from protocol.bundle import CacheKind, Manifest
from protocol.errors import EdgedraftError, SettingsError

logger = logging.getLogger(__name__)

CUDA_PROVIDERS = ("CUDAExecutionProvider", "TensorrtExecutionProvider")
Capability: TypeAlias = tuple[int, int]
"""A GPU's compute capability, major and minor."""
_LIBRARY = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
_NEEDED = re.compile(rb"(lib(?:cudart|cublas|cublasLt|cudnn|cufft|curand|nvinfer|nvonnxparser)\.so)\.([0-9]+)(?=\0)")
_TENSORRT = "TensorrtExecutionProvider", "libonnxruntime_providers_tensorrt.so"
_DRIVER = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
_FAT_BINARY = struct.pack("<I", 0xBA55ED50)
_CONTAINER = struct.Struct("<4xHHQ")  # version, bytes of this header, bytes of the entries
_ENTRY = struct.Struct("<HHIQ12xI")  # kind, version, bytes of this header, bytes of the code, architecture
_PTX, _BINARY = 1, 2
_LENGTHS = frozenset(
    {
        "Add",
        "Cast",
        "Concat",
        "Constant",
        "Gather",
        "ReduceSum",
        "Reshape",
        "Shape",
        "Slice",
        "Squeeze",
        "Sub",
        "Unsqueeze",
    }
)
"""Nodes that ONNX Runtime prefers to run on the CPU where they compute lengths and positions."""
_EXPORT_AGAIN = "export it again with: edgedraft-export convert --for cuda"
_JETSON: frozenset[Capability] = frozenset({(7, 2), (8, 7), (11, 0)})
"""Xavier, Orin and Thor, which run only binary code made for exactly them."""


@dataclass(frozen=True)
class GpuCode:
    """The compute capabilities that a library has code for: as binaries, and as PTX that the driver compiles."""

    binaries: frozenset[Capability]
    ptx: frozenset[Capability]

    def runs_on(self, gpu: Capability) -> bool:
        """Whether a GPU can run it: a binary of its major version that is no newer, or PTX that is no newer."""
        if gpu in self.binaries or any(made_for <= gpu for made_for in self.ptx):
            return True
        return gpu not in _JETSON and any(made_for[0] == gpu[0] and made_for <= gpu for made_for in self.binaries)

    def __str__(self) -> str:
        return _listed([*self.binaries, *self.ptx])


def gpu_code(library: Path = _LIBRARY) -> GpuCode:
    """Read for which compute capabilities a shared library has code.

    Raises:
        SettingsError: it does not exist: this ONNX Runtime is built without CUDA.
    """
    found = set(_entries(_open(library)))
    return GpuCode(*(frozenset(gpu for kind, gpu in found if kind == wanted) for wanted in (_BINARY, _PTX)))


def check_code(wanted: str) -> None:
    """Check, when an image is built, that ONNX Runtime has code for boards.

    Args:
        wanted: compute capabilities, as "8.7 11.0".

    Raises:
        SettingsError: it has none for one of them.
    """
    code = gpu_code()
    boards = [_capability(word) for word in wanted.split()]
    if missing := [board for board in boards if not code.runs_on(board)]:
        allowed = f"a wheel with code for {_listed(missing)} (COMPUTE_CAPABILITY); this one's is for {code}"
        raise SettingsError("ONNXRUNTIME", f"onnxruntime {onnxruntime.__version__}", allowed)


def check_cuda(provider: str, library: Path = _LIBRARY, load: Callable[[str], Any] = ctypes.CDLL) -> None:
    """Check that ONNX Runtime can use a GPU.

    Args:
        provider: the execution provider that was asked for.
        library: of ONNX Runtime's CUDA provider.
        load: a shared library by its name.

    Raises:
        SettingsError: it cannot; names each library that is missing, the driver's fault, or the GPU without code.
    """
    needed = _needed(library)
    if provider == _TENSORRT[0]:
        needed += _needed(library.with_name(_TENSORRT[1]))
    faults = [f"{name} is not installed" for name in needed if not _loads(name, load)]
    try:
        gpus = _gpus(load)
    except EdgedraftError as error:
        faults.append(str(error))
    else:
        code = gpu_code(library)
        faults += [
            f"the GPU's compute capability is {_listed([gpu])} (ONNX Runtime has code for {code})"
            for gpu in gpus
            if not code.runs_on(gpu)
        ]
    if faults:
        raise SettingsError("provider", provider, f"CPUExecutionProvider, because {', '.join(faults)}")


def check_bundle(provider: str, manifest: Manifest) -> None:
    """Check that a bundle's graph is one for a GPU: its attention has kernels there, and its KV cache stays there.

    Raises:
        SettingsError: it is not.
    """
    if manifest.cache_kind is not CacheKind.SHARED or manifest.cache_dtype != "float16":
        reason = f"the bundle is for a CPU: its attention is of {manifest.cache_dtype}"
        raise SettingsError("provider", provider, f"CPUExecutionProvider, because {reason}; {_EXPORT_AGAIN}")


def check_nodes(provider: str, session: onnxruntime.InferenceSession) -> None:
    """Check that a session runs its graph on the GPU, except for the arithmetic with lengths and positions.

    Raises:
        SettingsError: names the nodes that ONNX Runtime runs on the CPU.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        logger.warning("ONNX Runtime %s cannot tell which nodes run on the CPU", onnxruntime.__version__)
        return
    nodes = Counter(
        node.op_type
        for subgraph in session.get_provider_graph_assignment_info()
        if subgraph.ep_name == "CPUExecutionProvider"
        for node in subgraph.get_nodes()
        if node.op_type not in _LENGTHS
    )
    if nodes:
        listed = ", ".join(f"{op_type} ({count} nodes)" for op_type, count in sorted(nodes.items()))
        reason = f"ONNX Runtime has no kernel there for {listed}"
        raise SettingsError("provider", provider, f"CPUExecutionProvider, because {reason}; {_EXPORT_AGAIN}")


def _needed(library: Path) -> list[str]:
    """The libraries that it names, in the newest version of each, which is the one that it is built for."""
    versions: dict[str, int] = {}
    for name, version in _NEEDED.findall(_open(library)):
        versions[name.decode()] = max(int(version), versions.get(name.decode(), 0))
    return [f"{name}.{version}" for name, version in sorted(versions.items())]


def _gpus(load: Callable[[str], Any]) -> list[Capability]:
    """The compute capability of each GPU.

    Raises:
        EdgedraftError: there is no driver, or it finds no GPU.
    """
    if not _loads(_DRIVER, load):
        raise EdgedraftError(f"the driver {_DRIVER} is not there (--runtime nvidia, or --gpus all)")
    driver = load(_DRIVER)
    count = ctypes.c_int()
    if (code := driver.cuInit(0)) or (code := driver.cuDeviceGetCount(ctypes.byref(count))):
        raise EdgedraftError(f"the driver reports CUDA error {code}")
    return [(_attribute(driver, _MAJOR, device), _attribute(driver, _MINOR, device)) for device in range(count.value)]


def _attribute(driver: Any, attribute: int, device: int) -> int:
    value = ctypes.c_int()
    if code := driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
        raise EdgedraftError(f"the driver reports CUDA error {code}")
    return value.value


def _entries(data: mmap.mmap) -> Iterator[tuple[int, Capability]]:
    """Kind and compute capability of each piece of code in the fat binaries of a library."""
    at = data.find(_FAT_BINARY)
    while at >= 0:
        version, header, size = _CONTAINER.unpack_from(data, at)
        position, end = at + header, at + header + size
        if version == 1 and header == _CONTAINER.size and end <= len(data):
            while position + _ENTRY.size <= end:
                kind, _, entry_header, entry_size, architecture = _ENTRY.unpack_from(data, position)
                yield kind, (architecture // 10, architecture % 10)
                position += max(entry_header + entry_size, _ENTRY.size)
        at = data.find(_FAT_BINARY, at + len(_FAT_BINARY))


def _open(library: Path) -> mmap.mmap:
    try:
        with library.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise SettingsError("provider", "CUDA", f"CPUExecutionProvider: {library} is missing") from error


def _loads(name: str, load: Callable[[str], Any]) -> bool:
    try:
        load(name)
    except OSError:
        return False
    return True


def _capability(text: str) -> Capability:
    major, _, minor = text.partition(".")
    if not (major.isdecimal() and minor.isdecimal()):
        raise SettingsError("COMPUTE_CAPABILITY", text, "numbers as 8.7")
    return int(major), int(minor)


def _listed(capabilities: Sequence[Capability]) -> str:
    return ", ".join(f"{major}.{minor}" for major, minor in sorted(set(capabilities))) or "no GPU"
