"""Tensors shared with p2r-kernels in another process: the same memory, not a copy.

    tensor = open_tensor(json.loads(line))    # what tensor.ipcHandle() gave, as JSON
    handle, tensor, close = share_tensor(tensor)    # for device.fromIpcHandle(handle)

On CUDA this is cudaIpcMemHandle_t through the driver's own functions, on the CPU memory without a file,
sealed so that nobody can shorten it (Linux).
The two processes order their work by themselves: before a message says that data is there, wait for
it (torch.cuda.synchronize() here, `await device.synchronize()` there). Whoever shares must keep the
memory until the other has closed it; `close` here is the counterpart of `dispose` there.

    python3 tensors.py                        # reads handles, a line each: negates the tensor in place

Needs PyTorch for tensors; without it `open_memory` still gives the CPU's bytes.
"""
import ctypes
import fcntl
import json
import mmap
import os
import sys

WIDTHS = {"f32": 4, "f16": 2, "bf16": 2, "i32": 4, "u8": 1}


def driver():
    library = ctypes.CDLL("libcuda.so.1")
    library.cuIpcOpenMemHandle_v2.argtypes = [ctypes.c_void_p, Handle, ctypes.c_uint]
    return library


class Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_ubyte * 64)]


def check(code, what):
    if code != 0:
        raise RuntimeError(f"{what}: CUDA driver error {code}")


def count(shape):
    size = 1
    for d in shape:
        size *= d
    return size


def open_memory(handle):
    """The bytes of a tensor in a file, as a writable memoryview, and the function that closes it."""
    with open(handle["name"], "r+b") as file:
        mapped = mmap.mmap(file.fileno(), max(handle["bytes"], 1))
    start = handle["offset"]
    size = count(handle["shape"]) * WIDTHS[handle["dtype"]]
    return memoryview(mapped)[start : start + size], mapped.close


def new_memory(size):
    """The name of new memory that p2r-kernels opens, the memory, and the function that closes the name."""
    file = os.memfd_create("p2r-kernels", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.posix_fallocate(file, 0, max(size, 1))
    add_seals, seal, shrink, grow = 1033, 1, 2, 4  # fcntl has names for these from Python 3.8 on some systems
    fcntl.fcntl(file, add_seals, seal | shrink | grow)
    mapped = mmap.mmap(file, max(size, 1))
    return f"/proc/{os.getpid()}/fd/{file}", memoryview(mapped)[:size], lambda: os.close(file)


class CudaMemory:
    """Device memory as torch.as_tensor takes it; bf16 as integers of its size."""

    def __init__(self, address, shape, dtype):
        kind = {"f32": "<f4", "f16": "<f2", "bf16": "<i2", "i32": "<i4", "u8": "|u1"}[dtype]
        self.__cuda_array_interface__ = {
            "shape": tuple(shape),
            "typestr": kind,
            "data": (address, False),
            "version": 3,
        }


def torch_dtype(name):
    import torch

    return {
        "f32": torch.float32,
        "f16": torch.float16,
        "bf16": torch.bfloat16,
        "i32": torch.int32,
        "u8": torch.uint8,
    }[name]


def open_tensor(handle):
    """A PyTorch tensor on the memory of a handle, and what closes it once the tensor is gone."""
    import torch

    dtype = torch_dtype(handle["dtype"])
    if handle["backend"] == "cpu":
        memory, close = open_memory(handle)
        flat = torch.frombuffer(memory, dtype=dtype) if len(memory) else torch.empty(0, dtype=dtype)
        return flat.reshape(handle["shape"]), close
    torch.zeros(1, device="cuda")  # makes the context that the driver opens the memory in
    cuda = driver()
    base = ctypes.c_uint64()
    raw = Handle((ctypes.c_ubyte * 64)(*bytes.fromhex(handle["name"])))
    lazy_enable_peer_access = 1
    check(
        cuda.cuIpcOpenMemHandle_v2(ctypes.byref(base), raw, lazy_enable_peer_access),
        "cuIpcOpenMemHandle",
    )
    memory = CudaMemory(base.value + handle["offset"], handle["shape"], handle["dtype"])
    tensor = torch.as_tensor(memory, device="cuda")
    tensor = tensor.view(dtype) if handle["dtype"] == "bf16" else tensor
    return tensor, lambda: check(cuda.cuIpcCloseMemHandle(base), "cuIpcCloseMemHandle")


def share_tensor(tensor):
    """The handle of a contiguous PyTorch tensor, the tensor that shares its memory, and the function that
    ends the sharing. On the CPU the tensor is copied into new memory: write to the one that is returned."""
    import torch

    names = {torch_dtype(name): name for name in WIDTHS}
    described = {"shape": list(tensor.shape), "dtype": names[tensor.dtype], "pid": os.getpid()}
    if tensor.device.type == "cpu":
        size = tensor.numel() * tensor.element_size()
        name, memory, close = new_memory(size)
        handle = {"backend": "cpu", "name": name, "bytes": size, "offset": 0, **described}
        flat = torch.frombuffer(memory, dtype=tensor.dtype) if size else torch.empty(0, dtype=tensor.dtype)
        shared = flat.reshape(tensor.shape)
        shared.copy_(tensor)
        return handle, shared, close
    torch.cuda.synchronize()
    cuda = driver()
    # PyTorch cuts tensors out of larger allocations; a handle names the allocation.
    base, bytes_, raw = ctypes.c_uint64(), ctypes.c_size_t(), Handle()
    address = ctypes.c_uint64(tensor.data_ptr())
    check(
        cuda.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(bytes_), address),
        "cuMemGetAddressRange",
    )
    check(cuda.cuIpcGetMemHandle(ctypes.byref(raw), base), "cuIpcGetMemHandle")
    handle = {
        "backend": "cuda",
        "name": bytes(raw.reserved).hex(),
        "bytes": bytes_.value,
        "offset": address.value - base.value,
        **described,
    }
    return handle, tensor, lambda: None


def main():
    for line in sys.stdin:
        handle = json.loads(line)
        tensor, close = open_tensor(handle)
        tensor.neg_()
        if handle["backend"] == "cuda":
            import torch

            torch.cuda.synchronize()
        del tensor
        close()
        print("done", flush=True)


if __name__ == "__main__":
    main()
