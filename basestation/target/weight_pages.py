"""Pages of a model's weight files that are in memory because loading read them."""

import ctypes
import mmap
import sys

import psutil
from torch import nn


def release_weight_pages(model: nn.Module) -> None:
    """Give back the pages of the files from which a model's weights are mapped, where none was changed.

    transformers maps the files. Packed linear layers are copies, so of these files little more than rows of the
    embedding is read again: from the system's page cache, where all of it stays as long as there is memory.
    """
    if sys.platform != "linux":
        return
    held = [tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())]
    libc = ctypes.CDLL(None)
    for mapped in psutil.Process().memory_maps(grouped=False):
        start, end = (int(address, 16) for address in mapped.addr.split("-"))
        is_file = not mapped.path.startswith("[")
        if is_file and not mapped.anonymous and any(start <= address < end for address in held):
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)
