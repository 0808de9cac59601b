"""A device beside the CPU, in main memory: what lies in the wrong place stops a run here as it would on a GPU, and reads by the host are counted.

A tensor on it wraps one of the CPU, on which the operations run. Whoever imports this has the device for the whole process.
"""

import contextlib
import os
import traceback
from collections import Counter
from collections.abc import Iterator

import torch
from captures import captured
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "other"
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}  # indices may lie on the CPU, as for CUDA
# What makes the host wait for a GPU: values that it reads, and shapes that depend on values.
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.bincount.default}
# Where the project's own code reads, file by file, until it is cleared.
reads: Counter[str] = Counter()
_generators: dict[int, torch.Generator] = {}  # those of the device
_capturing: list[bool] = []  # while a graph is captured
graphs: list = []  # those that were, until it is cleared


class _Backend(_DummyBackendModule):
    """What accelerate and transformers ask a device's module for."""

    def set_device(self, device) -> None: ...
    def synchronize(self, device=None) -> None: ...
    def empty_cache(self) -> None: ...
    def manual_seed(self, seed) -> None: ...
    def set_rng_state(self, state, device=None) -> None: ...
    def set_rng_state_all(self, states) -> None: ...
    def get_amp_supported_dtype(self):
        return [torch.bfloat16]

    def get_rng_state(self, device=None):
        return torch.random.get_rng_state()

    def get_rng_state_all(self):
        return [torch.random.get_rng_state()]


_setup_privateuseone_for_python_backend(NAME, _Backend())
DEVICE = torch.device(NAME, 0)


def _count() -> None:
    frames = (frame.filename for frame in reversed(traceback.extract_stack()) if "/hf_thinktok/" in frame.filename)
    reads[os.path.basename(next(frames, "elsewhere"))] += 1


class OtherTensor(torch.Tensor):
    """A tensor on the device; `host` has its values."""

    @staticmethod
    def __new__(cls, host: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls, host.size(), strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype, layout=host.layout, device=DEVICE
        )

    def __init__(self, host: torch.Tensor):
        self.host = host

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    # Parameters are written through `data`, saved by their storage, and copied with their model.
    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        torch.Tensor.data.__set__(self, value)
        self.host = value.host

    def data_ptr(self):
        return self.host.data_ptr()

    def untyped_storage(self):
        return self.host.untyped_storage()

    def __reduce_ex__(self, protocol):
        return self.host.__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        copy = OtherTensor(self.host.detach().clone()).requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copy._is_param = True
        return memo.setdefault(id(self), copy)

    def tolist(self):
        _count()
        return self.host.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError(f"a tensor on {NAME} is no array: copy it to the CPU first.")

    __array__ = numpy

    def new_tensor(self, values, dtype=None, device=DEVICE, requires_grad=False):
        return torch.tensor(values, dtype=dtype or self.dtype, device=device, requires_grad=requires_grad)

    def __repr__(self):
        return f"OtherTensor({self.host})"


def _each(function, value):
    """The function's value in each place of nested lists and tuples, which are all that operations take and give: PyTorch's trees take thrice the time."""
    return type(value)([_each(function, one) for one in value]) if isinstance(value, list | tuple) else function(value)


def _run(func, args, kwargs):
    """An operation on the CPU, and what it gives where it belongs."""
    tensors, given = [], {}

    def on_host(value):
        if isinstance(value, torch.Tensor):
            host = value.host if isinstance(value, OtherTensor) else value
            tensors.append(value)
            given[id(host)] = value
            return host
        return torch.device("cpu") if isinstance(value, torch.device) and value.type == NAME else value

    def placed(value):
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in given:  # in place
            return given[id(value)]
        return OtherTensor(value) if to.type == NAME else value

    host_args, host_kwargs = _each(on_host, args), {name: _each(on_host, value) for name, value in kwargs.items()}
    there = any(isinstance(tensor, OtherTensor) for tensor in tensors)
    strangers = [tuple(tensor.shape) for tensor in tensors if tensor.ndim and not isinstance(tensor, OtherTensor)]  # numbers may lie anywhere
    if there and strangers and func not in COPIES and not (func in INDEXING and isinstance(args[0], OtherTensor)):
        raise RuntimeError(f"{func} has tensors on {NAME} and, of the shapes {strangers}, on the CPU.")
    to = torch.device(kwargs.get("device") or (DEVICE if there and func is not aten._local_scalar_dense.default else "cpu"))
    if func is aten.copy_.default and not isinstance(args[0], OtherTensor):
        to = torch.device("cpu")
    if (generator := kwargs.get("generator")) is not None and (generator._cdata in _generators) != (to.type == NAME):
        raise RuntimeError(f"{func} draws on {to} with a generator that is elsewhere.")
    by_mask = func in INDEXING and any(getattr(index, "dtype", None) == torch.bool for index in args[1])
    waits = there and (func in READS or by_mask or (func in COPIES and to.type == "cpu"))
    if _capturing and (waits or (func in COPIES and to.type == NAME and strangers) or kwargs.get("generator") is not None):
        raise RuntimeError(f"{func} is no part of a graph: it reads, is sent from the CPU, or draws.")
    if waits:
        _count()
    return _each(placed, func(*host_args, **host_kwargs))


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _OfValues(TorchFunctionMode):
    """Tensors that are made of values there: PyTorch itself does so while modes are off."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func not in (torch.tensor, torch.as_tensor) or torch.device(kwargs.get("device") or "cpu").type != NAME:
            return func(*args, **kwargs)
        device, requires_grad = kwargs.pop("device"), kwargs.pop("requires_grad", False)
        return func(*args, **kwargs).to(device).requires_grad_(requires_grad)


@contextlib.contextmanager
def present() -> Iterator[None]:
    """There is the device, and tensors come to it and go from it."""
    with _OfValues(), _Operations():
        yield


# What passes through no mode.
_library = torch.library.Library("aten", "IMPL")
for _make in (aten.empty.memory_format, aten.empty_strided.default):
    _library.impl(_make, lambda *args, make=_make, **kwargs: _run(make, args, {"device": DEVICE} | kwargs), "PrivateUse1")


def _copy_from(source, target, non_blocking=False):
    target.host.copy_(getattr(source, "host", source))
    return target


_library.impl("_copy_from", _copy_from, "PrivateUse1")


_load = torch.load
torch.load = lambda *args, map_location=None, **kwargs: _load(*args, map_location=map_location if callable(map_location) else "cpu", **kwargs)


class _Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        generator = super().__new__(cls)
        generator.there = torch.device(device)
        if generator.there.type == NAME:
            _generators[generator._cdata] = generator
        return generator

    def __init__(self, device="cpu"): ...

    @property
    def device(self):
        return self.there


torch.Generator = _Generator
torch.__future__.set_swap_module_params_on_conversion(True)  # `to` changes a parameter, and ties stay ties
os.environ |= {"ACCELERATE_TORCH_DEVICE": f"{NAME}:0", "ACCELERATE_USE_CPU": "false"}


@contextlib.contextmanager
def _while_capturing() -> Iterator[None]:
    _capturing.append(True)
    try:
        yield
    finally:
        _capturing.pop()


def capture(run, inputs):
    """What a graph of CUDA could not hold is refused."""
    replay = captured(run, inputs, _while_capturing())
    graphs.append(replay)
    return replay
