"""The function table of a library for another processor, whose kernels run in an emulator.

Python, torch and the backend stay here: `Elsewhere` stands in for `native.Kernels`, sends what
a call's pointers lead to to cpu_kernels_server.cpp, and takes it back.
"""

import ctypes
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_mone.kernels.cpu import build, native

SERVER = Path(__file__).with_name("cpu_kernels_server.cpp")
GUARD = b"\xa5" * 64  # between the pieces of a call's memory, which no kernel may write
MOST = 16  # arguments, as the server reads them


def compile_server(compiler: str, library: Path) -> Path:
    """The program, beside the library that it runs."""
    program = library.with_name("server")
    subprocess.run(
        [compiler, "-std=c++17", "-O1", f"-I{build.SOURCES}", SERVER, library, "-o", program,
         f"-Wl,-rpath,{library.parent}"],
        check=True,
    )  # fmt: skip
    return program


class Elsewhere:
    """Kernels by name, as `native.Kernels`; `called` lists the names. Only tensors whose
    `data_ptr` went through `seen` can be sent."""

    def __init__(self, command: list[str | Path], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self.called: set[str] = set()
        self._storages: dict[int, tuple[int, int]] = {}
        hello = struct.unpack("4q", self._read(32))
        self._memory, self.interface_version = hello[:2]
        self.span, self.bins = hello[2:]

    def seen(self, data_ptr: Callable[[torch.Tensor], int]) -> Callable[[torch.Tensor], int]:
        """`Tensor.data_ptr` that notes where the tensor's storage begins and ends."""

        def noting(tensor: torch.Tensor) -> int:
            at, storage = data_ptr(tensor), tensor.untyped_storage()
            self._storages[at] = (storage.data_ptr(), storage.nbytes())
            return at

        return noting

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: self._call(name, arguments)

    def _call(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.called.add(name)
        names = [field[0] for field in native.Kernels._fields_]
        types, memory = dict(native._SIGNATURES)[name], _Memory(self._memory, self._storages)
        values = [memory.argument(*pair) for pair in zip(types, arguments, strict=True)]
        values += [0] * (MOST - len(values))
        assert self.process.stdin is not None
        size = len(memory.bytes)
        self.process.stdin.write(struct.pack(f"{2 + MOST}q", names.index(name), size, *values))
        self.process.stdin.write(memory.bytes)
        self.process.stdin.flush()
        memory.take_back(self._read(size))

    def _read(self, size: int) -> bytes:
        assert self.process.stdout is not None
        data = self.process.stdout.read(size)
        assert len(data) == size, f"the emulator ended with status {self.process.wait()}"
        return data

    def close(self) -> None:
        """End the program."""
        self.process.communicate()


class _Memory:
    """What one call's pointers lead to, laid out for the server, whose memory begins at `start`."""

    def __init__(self, start: int, storages: dict[int, tuple[int, int]]) -> None:
        self.start, self.storages = start, storages
        self.bytes = bytearray(GUARD)
        self._places: dict[int, tuple[int, int]] = {}  # by address here: offset there, size

    def argument(self, kind: Any, value: Any) -> int:
        """The value that the kernel gets."""
        if value is None or kind is native.c_int64:
            return int(value or 0)
        if kind is native.c_void_p:
            return self._pointer(value)
        there = kind._type_.from_buffer_copy(value._obj)
        keep = getattr(value._obj, "keep", None)
        if keep is not None:
            self.storages[ctypes.addressof(keep)] = ctypes.addressof(keep), ctypes.sizeof(keep)
        for name, type_ in kind._type_._fields_:
            if type_ is native.c_void_p and getattr(there, name):
                setattr(there, name, self._pointer(getattr(there, name)))
        return self.start + self._place(bytes(there))

    def _pointer(self, address: int) -> int:
        base, size = self.storages[address]
        if base not in self._places:
            self._places[base] = self._place(ctypes.string_at(base, size)), size
        return self.start + self._places[base][0] + address - base

    def _place(self, data: bytes) -> int:
        at = len(self.bytes)
        self.bytes += data + GUARD[: -len(data) % 64] + GUARD
        return at

    def take_back(self, after: bytes) -> None:
        """Write what the kernel left where it was read; nothing else may have changed."""
        for base, (at, size) in self._places.items():
            ctypes.memmove(base, after[at : at + size], size)
            self.bytes[at : at + size] = after[at : at + size]
        assert self.bytes == after, "a kernel wrote beside its outputs"
