"""Tensors without copies: NumPy, DLPack, torch, lifetimes, hostile producers."""

import gc
import pickle
import weakref

import numpy as np
import pytest

import hqq_cpp

torch = pytest.importorskip("torch", reason="DLPack is tested against torch")

NUMPY_DTYPES = [
    "bool",
    "uint8",
    "int8",
    "int16",
    "uint16",
    "float16",
    "int32",
    "uint32",
    "float32",
    "float64",
    "int64",
    "uint64",
]
TORCH_ONLY = ("bfloat16", "float8_e4m3fn", "float8_e5m2")


class Producer:
    """Something with __dlpack__ that is neither torch's nor NumPy's."""

    def __init__(self, array, device=(1, 0), versioned=True):
        self.array, self.device, self.versioned = array, device, versioned

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **arguments):
        if not self.versioned and arguments:
            raise TypeError("this producer is older than DLPack 1.0")
        return self.array.__dlpack__(**arguments)


# ---- into Tensor ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_numpy_arrays_are_shared(dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    tensor = hqq_cpp.Tensor(array)
    assert (tensor.dtype, tensor.shape, tensor.ndim, tensor.size) == (dtype, (2, 3), 2, 6)
    assert tensor.nbytes == array.nbytes and tensor.data_ptr == array.ctypes.data
    assert np.array_equal(tensor.numpy(), array) and tensor.numpy().dtype == array.dtype


@pytest.mark.parametrize("dtype", [*NUMPY_DTYPES, *TORCH_ONLY])
def test_torch_tensors_are_shared_both_ways(dtype):
    source = torch.arange(6).reshape(2, 3).to(getattr(torch, dtype))
    tensor = hqq_cpp.Tensor(source)
    assert tensor.dtype == dtype and tensor.data_ptr == source.data_ptr()
    back = torch.from_dlpack(tensor)
    assert back.dtype == source.dtype and back.data_ptr() == source.data_ptr()
    assert torch.equal(back.view(torch.uint8), source.view(torch.uint8))


@pytest.mark.parametrize("versioned", [True, False])
def test_other_producers(versioned):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = hqq_cpp.Tensor(Producer(array, versioned=versioned))
    assert tensor.data_ptr == array.ctypes.data and np.array_equal(tensor.numpy(), array)


def test_pinned_memory_counts_as_cpu():
    cuda_host = 3
    assert hqq_cpp.Tensor(Producer(np.zeros(2), device=(cuda_host, 0))).shape == (2,)


def test_strided_arrays_are_copied_in_order(rng):
    array = rng.standard_normal((3, 4, 5))
    for view in (array[::2], array.T, array[:, ::-1, 1:], array[:, :0], array[1, 2, 3, None]):
        assert np.array_equal(hqq_cpp.Tensor(view).numpy(), view)
    source = torch.from_numpy(array).permute(2, 0, 1)
    assert np.array_equal(hqq_cpp.Tensor(source).numpy(), source.numpy())


def test_other_layouts_of_numpy():
    assert hqq_cpp.Tensor(np.array([1.5, -2], ">f4")).numpy().tolist() == [1.5, -2]
    unaligned = np.frombuffer(b"x" + np.float32(3).tobytes(), np.float32, offset=1)
    assert hqq_cpp.Tensor(unaligned).numpy().tolist() == [3]
    assert hqq_cpp.Tensor(np.float32(7)).shape == ()
    assert hqq_cpp.Tensor([[1, 2]]).dtype == "int64"


def test_what_requires_grad_is_detached():
    source = torch.nn.Parameter(torch.ones(2, 2))
    assert hqq_cpp.Tensor(source).data_ptr == source.data_ptr()


def test_another_device_is_refused():
    with pytest.raises(ValueError, match="not in CPU memory"):
        hqq_cpp.Tensor(torch.empty(2, device="meta"))
    with pytest.raises(ValueError, match="on the device .*2, 0.*; it must be in CPU memory"):
        hqq_cpp.Tensor(Producer(np.zeros(2), device=(2, 0)))


def test_unsupported_types_are_refused():
    for array in (np.zeros(2, complex), np.array(["a"]), np.array([None]), np.zeros(2, "M8[s]")):
        with pytest.raises(ValueError, match="not supported"):
            hqq_cpp.Tensor(array)
    with pytest.raises(ValueError, match="DLPack type with code 5, 64 bits"):
        hqq_cpp.Tensor(torch.zeros(2, dtype=torch.complex64))


def test_errors_of_a_producer_arrive_unchanged():
    class Broken(Producer):
        def __dlpack__(self, **arguments):
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        hqq_cpp.Tensor(Broken(np.zeros(2)))


def test_what_is_no_capsule_is_refused():
    class Broken(Producer):
        def __dlpack__(self, **arguments):
            return "capsule"

    with pytest.raises(ValueError, match="PyCapsule"):
        hqq_cpp.Tensor(Broken(np.zeros(2)))


def test_a_capsule_is_used_once():
    capsule = np.zeros(2).__dlpack__()

    class Reused(Producer):
        def __dlpack__(self, **arguments):
            return capsule

    hqq_cpp.Tensor(Reused(np.zeros(2)))
    with pytest.raises(ValueError, match="PyCapsule"):
        hqq_cpp.Tensor(Reused(np.zeros(2)))


# ---- out of Tensor -------------------------------------------------------------------------------


def test_numpy_views_are_read_only_and_share():
    tensor = hqq_cpp.Tensor(np.arange(4.0))
    array = tensor.numpy()
    assert array.ctypes.data == tensor.data_ptr and not array.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    with pytest.raises(ValueError):
        array.flags.writeable = True
    array = np.from_dlpack(tensor)
    assert array.ctypes.data == tensor.data_ptr and not array.flags.writeable


def test_asarray():
    tensor = hqq_cpp.Tensor(np.arange(4.0))
    assert np.asarray(tensor).ctypes.data == tensor.data_ptr
    assert np.asarray(tensor, np.float32).dtype == np.float32
    copy = np.array(tensor)
    copy[0] = 9
    assert tensor.numpy()[0] == 0
    assert tensor.__array__(copy=True).flags.writeable


def test_asarray_refuses_a_copy_that_was_not_wanted():
    tensor = hqq_cpp.Tensor(torch.ones(2, dtype=torch.bfloat16))
    assert np.asarray(tensor).dtype == np.float32
    with pytest.raises(ValueError, match="without a copy"):
        tensor.__array__(copy=False)
    with pytest.raises(ValueError, match="without a copy"):
        hqq_cpp.Tensor(np.zeros(2)).__array__(np.float32, copy=False)


def test_bfloat16_to_numpy_is_exact():
    bits = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    array = hqq_cpp.Tensor(bits).numpy()
    assert np.array_equal(array.view(np.uint32) >> 16, np.arange(65536))
    assert not (array.view(np.uint32) & 0xFFFF).any()


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_has_no_numpy(dtype):
    with pytest.raises(ValueError, match=f"no {dtype}.*from_dlpack"):
        hqq_cpp.Tensor(torch.zeros(2).to(getattr(torch, dtype))).numpy()


def test_dlpack_arguments():
    tensor = hqq_cpp.Tensor(np.arange(4.0))
    assert tensor.__dlpack_device__() == (1, 0)
    assert "dltensor_versioned" in repr(tensor.__dlpack__(max_version=(1, 0)))
    for old in (tensor.__dlpack__(), tensor.__dlpack__(max_version=(0, 8))):
        assert '"dltensor"' in repr(old)
    copy = torch.from_dlpack(tensor, copy=True)
    assert copy.data_ptr() != tensor.data_ptr and copy.tolist() == [0, 1, 2, 3]
    assert torch.from_dlpack(tensor.__dlpack__()).data_ptr() == tensor.data_ptr


def test_dlpack_arguments_that_cannot_be_met():
    tensor = hqq_cpp.Tensor(np.arange(4.0))
    with pytest.raises(BufferError, match="stream"):
        tensor.__dlpack__(stream=7)
    with pytest.raises(BufferError, match="no other device"):
        tensor.__dlpack__(dl_device=(2, 0))


def test_empty_and_scalar_tensors_travel():
    for source in (torch.zeros(0, 3), torch.zeros(()), torch.zeros(2, 0, 3, dtype=torch.bfloat16)):
        back = torch.from_dlpack(hqq_cpp.Tensor(source))
        assert back.shape == source.shape and back.dtype == source.dtype


def test_length():
    assert len(hqq_cpp.Tensor(np.zeros((3, 2)))) == 3
    with pytest.raises(TypeError, match="0-D"):
        len(hqq_cpp.Tensor(np.zeros(())))


def test_pickle():
    for source in (torch.arange(6.0).reshape(2, 3).bfloat16(), torch.zeros(0), torch.tensor(3)):
        tensor = hqq_cpp.Tensor(source)
        copy = pickle.loads(pickle.dumps(tensor))
        assert (copy.dtype, copy.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(torch.from_dlpack(copy), source)


@pytest.mark.parametrize(
    "state, message",
    [
        (("float32", (2,), b"1234"), "has 4 bytes"),
        (("float32", (2**62, 2), b"1234"), "2\\^63"),
        (("float99", (1,), b"1234"), "unknown dtype"),
        (("float32",), "3 parts"),
    ],
)
def test_pickle_refuses_wrong_states(state, message):
    tensor = hqq_cpp.Tensor.__new__(hqq_cpp.Tensor)
    with pytest.raises(ValueError, match=message):
        tensor.__setstate__(state)


# ---- lifetimes -----------------------------------------------------------------------------------


def test_views_outlive_the_tensor(rng):
    W = rng.standard_normal((64, 256), dtype=np.float32)
    q = hqq_cpp.quantize(W, {"nbits": 4, "meta_dtype": "bfloat16"})
    expected = q.W_q.numpy().copy(), torch.from_dlpack(q.scale).clone()
    codes, scale = q.W_q.numpy(), torch.from_dlpack(q.scale)
    del q
    gc.collect()
    # Memory that was freed would be handed out again.
    garbage = [np.full(codes.nbytes, 0xAA, np.uint8) for _ in range(50)]
    assert np.array_equal(codes, expected[0]) and torch.equal(scale, expected[1])
    del garbage


class Tracked(np.ndarray):
    """An array that can be watched with a weak reference."""


@pytest.mark.parametrize("through", ["numpy", "torch", "capsule"])
def test_a_shared_array_lives_as_long_as_needed_and_no_longer(through):
    array = np.arange(4.0).view(Tracked)
    watch = weakref.ref(array)
    tensor = hqq_cpp.Tensor(array)
    del array
    gc.collect()
    assert watch() is not None
    view = {
        "numpy": lambda t: t.numpy(),
        "torch": torch.from_dlpack,
        "capsule": lambda t: t.__dlpack__(),
    }[through](tensor)
    del tensor
    gc.collect()
    assert watch() is not None
    del view
    gc.collect()
    assert watch() is None


def test_a_mapped_tensor_outlives_its_file(tmp_path):
    path = tmp_path / "x.safetensors"
    hqq_cpp.save_safetensors(path, {"x": np.arange(1000)})
    tensor = hqq_cpp.load_safetensors(path)["x"]
    path.unlink()
    assert np.array_equal(tensor.numpy(), np.arange(1000))


# ---- quantize reads in place ---------------------------------------------------------------------

PEAK = """
import resource, sys
import numpy as np, torch, hqq_cpp
# Everything that is set up once.
hqq_cpp.quantize(torch.ones(64, 64, dtype=torch.bfloat16), {"nbits": 4})
rows, cols = 4096, 8192
if sys.argv[1] == "bfloat16":
    W = torch.randn(rows, cols).bfloat16()
elif sys.argv[1] == "rows":
    W = torch.randn(rows, cols + 64).bfloat16()[:, 32:-32]
elif sys.argv[1] == "float16":
    W = np.random.default_rng(0).standard_normal((rows, cols), dtype=np.float32).astype(np.float16)
else:
    W = torch.randn(cols, rows).bfloat16().T
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
def now(): return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
# Raises the peak to what is held now, past that of making W.
ballast = np.ones(max(0, peak() - now()) // 8 + 1)
before = peak()
q = hqq_cpp.quantize(W, {"nbits": 4, "iterations": 1}, threads=1)
print((peak() - before - q.nbytes) / (rows * cols * 2))
"""


@pytest.mark.parametrize("layout", ["bfloat16", "float16", "rows"])
def test_quantize_does_not_copy(run_python, layout):
    done = run_python(PEAK, layout)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.5  # of the bytes of W


def test_quantize_copies_only_what_lies_across(run_python):
    """The measurement above sees a copy where there is one."""
    assert float(run_python(PEAK, "transposed").stdout) > 0.75
