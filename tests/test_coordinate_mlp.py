import subprocess
import sys

import pytest
import torch
from on_host import compile_for_host, numbers, pointers
from torch.utils._python_dispatch import TorchDispatchMode

import fastws
from fastws import _native
from fastws.ops.coordinate_mlp import (
    ACTIVATIONS,
    coordinate_mlp_backward_reference,
    coordinate_mlp_reference,
    fits_narrow,
)
from fastws.testing import assert_as_accurate, devices, implementations

GRID = [(3, 2), (1, 1), (4, 3), (2, 70), (5, 1)]
KERNELS = sum(filters * channels for filters, channels in GRID)
CASES = [  # rows, h, hidden layers, outputs
    (1, 1, 0, 1),
    (0, 8, 1, 9),
    (50, 33, 3, 9),
    (261, 180, 3, 9),
    (100, 320, 1, 25),
    (37, 513, 2, 1),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TILE = 64  # rows and columns of Triton's blocks


def example(count, width, depth, outputs, dtype=torch.float32, device="cpu", activation=0):
    """Arguments of the op; what can be strided is."""
    rng = torch.Generator().manual_seed(0)

    def strided(*shape, scale=1.0):
        x = torch.randn(*shape, 2, generator=rng) * scale
        return x.to(device, dtype)[..., 0]

    tables = strided(len(GRID) + 1, width), strided(5, width), strided(70, width)
    grid = torch.tensor(GRID).T.contiguous().T.to(device)
    rows = torch.randint(KERNELS, (count, 2), generator=rng).to(device)[:, 0]
    hidden = strided(depth, width, width, scale=(2 / width) ** 0.5), strided(depth, width)
    last = strided(outputs, width, scale=width**-0.5), strided(outputs)
    return *tables, grid, rows, *hidden, *last, activation


def from_embeddings(embeddings, first_weight, grid, layers, activation):
    """The published form: a row of joined embeddings per kernel, then linear layers."""
    function = ACTIVATIONS[activation][0]
    places = [(i, f, c) for i, size in enumerate(grid) for f in range(size[0]) for c in range(size[1])]
    x = torch.stack([torch.cat([table[i] for table, i in zip(embeddings, place, strict=True)]) for place in places])
    x = x @ first_weight.T
    for weight, bias in layers:
        x = torch.nn.functional.linear(function(x), weight, bias)
    return x


def predictions(function):
    return lambda *args: function(*args, False)[0]


def keep(*args):
    """What the forward pass keeps for the backward pass, and nothing."""
    return torch.ops.fastws.coordinate_mlp(*args, True)[1], torch.ops.fastws.coordinate_mlp(*args, False)[1]


def assert_gradients_as_accurate(actual, grad, *args):
    def cast(x, dtype):
        return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    dtypes = {grad.dtype, torch.float64}
    expected = {d: coordinate_mlp_backward_reference(*(cast(x, d) for x in (grad, grad, *args))) for d in dtypes}
    for output, x in enumerate(actual):
        if x.numel():
            assert_as_accurate(x, lambda grad, output=output: expected[grad.dtype][output], grad)


@pytest.mark.parametrize("name, function, device", implementations("coordinate_mlp"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_coordinate_mlp_is_the_reference(name, function, device, dtype, case):
    if (name, device, dtype) == ("triton", "cpu", torch.bfloat16):
        pytest.skip("Triton's interpreter cannot multiply bfloat16")
    if (name, device) == ("triton", "cpu"):  # interpreted: a whole block and a part, and two whole blocks and a part
        case = min(case[0], TILE + 6), min(case[1], 2 * TILE + 2), *case[2:]
    args = example(*case, dtype, device)
    actual, kept = function(*args, False)
    assert actual.shape == (case[0], case[3]) and actual.dtype == dtype and kept.shape == (0,)
    if case[0]:
        assert_as_accurate(actual, predictions(coordinate_mlp_reference), *args)


@pytest.mark.parametrize("name, function, device", implementations("coordinate_mlp_backward"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_coordinate_mlp_backward_is_the_reference(name, function, device, dtype, case):
    args = example(*case, dtype, device, activation=list(ACTIVATIONS).index("gelu"))
    grad = torch.randn(case[0], case[3], generator=torch.Generator().manual_seed(1)).to(device, dtype)
    kept, nothing = keep(*args)
    actual = function(grad, nothing, *args)
    for x, like in zip(actual, [*args[:3], *args[5:9]], strict=True):
        assert x.shape == like.shape and x.dtype == dtype
    for computed, read in zip(actual, function(grad, kept, *args), strict=True):
        torch.testing.assert_close(computed, read, rtol=0, atol=0)
    assert_gradients_as_accurate(actual, grad, *args)


@pytest.mark.parametrize("name, function, device", implementations("coordinate_mlp"))
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coordinate_mlp_activations(name, function, device, activation, dtype):
    args = example(64, 40, 2, 9, dtype, device, list(ACTIVATIONS).index(activation))
    args = 3 * args[0], *args[1:]  # so that all branches are taken
    assert_as_accurate(predictions(function)(*args), predictions(coordinate_mlp_reference), *args)
    grad = torch.ones(64, 9, dtype=dtype, device=device)
    if name == device:
        actual = torch.ops.fastws.coordinate_mlp_backward(grad, keep(*args)[0], *args)
        assert_gradients_as_accurate(actual, grad, *args)


@pytest.mark.parametrize("device", devices())
def test_coordinate_mlp_by_hand(device):
    tables = [torch.tensor(t, device=device) for t in ([[1.0], [-10.0]], [[0.0], [2.0]], [[0.0], [1.0]])]
    grid = torch.tensor([[1, 2], [2, 2]], device=device)
    rows = torch.tensor([1, 5, 0, 0], device=device)
    weights = [torch.tensor([[2.0]], device=device), torch.tensor([[3.0], [-1.0]], device=device)]
    biases = [torch.tensor([1.0], device=device), torch.tensor([0.0, 4.0], device=device)]
    y = fastws.coordinate_mlp(tables, grid, rows, weights, biases)  # 1 + 1, -10 + 2 + 1, 1, 1, then 2x + 1
    assert y.tolist() == [[15.0, -1.0], [3.0, 3.0], [9.0, 1.0], [9.0, 1.0]]


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_coordinate_mlp_is_the_published_predictor(device, activation):
    rng = torch.Generator().manual_seed(0)
    sizes = len(GRID), 5, 70
    embeddings = [torch.randn(size, 4, generator=rng, dtype=torch.float64).to(device) for size in sizes]
    shapes = (7, 12), (7, 7), (7,), (9, 7), (9,)
    parameters = [torch.randn(*s, generator=rng, dtype=torch.float64).to(device).requires_grad_() for s in shapes]
    first, *rest = parameters
    tables = [e @ w.T for e, w in zip(embeddings, first.split(4, dim=1), strict=True)]
    rows, grid = torch.arange(KERNELS, device=device), torch.tensor(GRID, device=device)
    y = fastws.coordinate_mlp(tables, grid, rows, rest[::2], rest[1::2], activation=activation)
    expected = from_embeddings(embeddings, first, GRID, [rest[:2], rest[2:]], activation)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(*(torch.autograd.grad(z.pow(2).sum(), parameters) for z in (y, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("device", devices())
def test_coordinate_mlp_rows_do_not_depend_on_each_other(device):
    *tables, grid, rows, weights, biases, weight, bias, activation = example(261, 65, 2, 9, device=device)
    network = weights, biases, weight, bias, activation
    predict = predictions(torch.ops.fastws.coordinate_mlp)
    y = predict(*tables, grid, rows, *network)
    for part in (slice(3, 4), slice(10, 37), slice(40, 250)):
        alone = predict(*tables, grid, rows[part], *network)
        exact = device == "cpu" and "coordinate_mlp" in _native.COMPILED["cpu"]  # libraries choose by the size
        torch.testing.assert_close(alone, y[part], **({"rtol": 0, "atol": 0} if exact else {}))
    swapped = predict(*tables[:2], tables[2].roll(1, 0), grid, rows, *network)
    assert (swapped - y).abs().max() > 0.1  # a wrong coordinate is noticed


@pytest.mark.parametrize("device", devices())
def test_coordinate_mlp_of_nan_is_nan(device):
    for activation in range(len(ACTIVATIONS)):
        args = example(30, 20, 2, 9, device=device, activation=activation)
        args[0][2, 5] = float("nan")
        bad = fastws.ops.coordinate_mlp.coordinates(args[3], args[4])[0] == 2
        y, _ = torch.ops.fastws.coordinate_mlp(*args, False)
        assert y[bad].isnan().all() and not y[~bad].isnan().any()


@pytest.mark.skipif("coordinate_mlp" not in _native.COMPILED["cpu"], reason="PyTorch's own sums depend on the threads")
def test_coordinate_mlp_does_not_depend_on_the_threads():
    args = example(1500, 33, 2, 9)
    grad, threads = torch.randn(1500, 9), torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        y, kept = torch.ops.fastws.coordinate_mlp(*args, True)
        results.append((y, *torch.ops.fastws.coordinate_mlp_backward(grad, kept, *args)))
    torch.set_num_threads(threads)
    for first, *others in zip(*results, strict=True):
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_coordinate_mlp_gradients(device, activation):
    *tables, grid, _, weights, biases, weight, bias, _ = example(6, 3, 2, 4, torch.float64, device)
    tables, grid, rows = [table[:4] for table in tables], grid[:3], torch.tensor([5, 18, 6, 8, 0, 18], device=device)
    inputs = [x.clone().requires_grad_() for x in (*tables, *weights, weight, *biases, bias)]

    def function(*x):
        return fastws.coordinate_mlp(x[:3], grid, rows, x[3:6], x[6:], activation=activation)

    assert torch.autograd.gradcheck(function, inputs)


def test_coordinate_mlp_is_differentiable_once():
    *tables, grid, rows, _, _, weight, bias, _ = example(6, 5, 0, 4)
    y = fastws.coordinate_mlp([tables[0].clone().requires_grad_(), *tables[1:]], grid, rows, [weight], [bias])
    (grad,) = torch.autograd.grad(y.sum(), y.grad_fn.next_functions[0][0].variable, create_graph=True)
    with pytest.raises(NotImplementedError, match="coordinate_mlp: differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("device", devices())
def test_coordinate_mlp_opcheck(device):
    args = example(20, 9, 2, 3, device=device)
    grad = torch.randn(20, 3, device=device)
    kept = torch.ops.fastws.coordinate_mlp(*args, device == "cpu")[1]
    torch.library.opcheck(torch.ops.fastws.coordinate_mlp_backward.default, (grad, kept, *args))
    args = [x.clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]
    torch.library.opcheck(torch.ops.fastws.coordinate_mlp.default, (*args, False))


@pytest.mark.parametrize("device", devices())
def test_coordinate_mlp_narrow_opcheck(device):
    args = example(20, 9, 2, 3, device=device)
    grad, kept = torch.randn(20, 3, device=device), torch.ops.fastws.coordinate_mlp_narrow(*args, False)[1]
    torch.library.opcheck(torch.ops.fastws.coordinate_mlp_narrow_backward.default, (grad, kept, *args))
    args = [x.clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]
    torch.library.opcheck(torch.ops.fastws.coordinate_mlp_narrow.default, (*args, False))


@pytest.mark.parametrize("device", [device for device in devices() if device == "cuda"])
@pytest.mark.skipif("coordinate_mlp_narrow" not in _native.COMPILED["cuda"], reason="_C_cuda.so is not loaded")
def test_coordinate_mlp_narrow_has_one_result(device):
    args = example(8192 + 300, 180, 3, 9, device=device)
    grad, nothing = torch.randn(8192 + 300, 9, device=device), torch.empty(0, device=device)
    runs = [torch.ops.fastws.coordinate_mlp_backward(grad, nothing, *args) for _ in range(3)]
    assert all(torch.equal(*pair) for run in runs[1:] for pair in zip(run, runs[0], strict=True))
    assert_gradients_as_accurate(runs[0], grad, *args)


def test_coordinate_mlp_narrow_is_for_narrow_layers():
    for shape, dtype, fits in [
        ((192, 192), torch.float32, True),
        ((180, 9), torch.bfloat16, True),
        ((193, 9), torch.float16, False),
        ((33, 200), torch.float32, False),
        ((33, 9), torch.float64, False),
    ]:
        assert fits_narrow(*example(1, shape[0], 1, shape[1], dtype)) == fits


@pytest.mark.parametrize("device", devices())
def test_coordinate_mlp_compiles(device):
    *tables, grid, rows, weights, biases, weight, bias, _ = example(20, 9, 2, 3, device=device)
    weight = weight.clone().requires_grad_()

    def function(weight):
        return fastws.coordinate_mlp(tables, grid, rows, [*weights, weight], [*biases, bias]).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    losses = function(weight), compiled(weight)
    assert losses[0] == losses[1]
    assert torch.equal(*(torch.autograd.grad(loss, weight)[0] for loss in losses))


def narrow_on_host(args, grad=None, shared=232448):
    """The device code of coordinate_mlp_narrow, threads of which are fibers: predictions, or gradients given one."""
    tensors = [x.contiguous() for x in args[:-1]]
    parameters, grid, rows = tensors[:3] + tensors[5:], tensors[3], tensors[4]
    y = torch.full((len(rows), len(parameters[6])), torch.nan, dtype=parameters[0].dtype)
    grads = [torch.full_like(x, torch.nan) for x in parameters]
    kind = -2 if y.dtype == torch.bfloat16 else y.itemsize
    network = parameters[0].shape[1], len(parameters[3]), len(parameters[6]), args[-1], len(grid)
    sizes = kind, *network, *(len(x) for x in parameters[:3]), len(rows), 2, shared, grad is not None
    given = y if grad is None else grad.float().contiguous()
    function = compile_for_host("coordinate_mlp").coordinate_mlp
    function(numbers(*sizes), pointers(*parameters, y, given, *grads, grid, rows))
    return y if grad is None else grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [*CASES[:3], (90, 180, 3, 9), (70, 100, 1, 25), (20, 30, 2, 130)])
def test_coordinate_mlp_narrow_on_host(dtype, case):
    args = example(*case, dtype, activation=list(ACTIVATIONS).index("gelu"))
    grad = torch.randn(case[0], case[3], generator=torch.Generator().manual_seed(1)).to(dtype)
    if case[0]:
        assert_as_accurate(narrow_on_host(args), predictions(coordinate_mlp_reference), *args)
    assert_gradients_as_accurate(narrow_on_host(args, grad), grad, *args)


@pytest.mark.parametrize("activation", range(len(ACTIVATIONS)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_coordinate_mlp_narrow_activations_on_host(activation, dtype):
    args = example(40, 40, 2, 9, dtype, activation=activation)
    args, grad = (3 * args[0], *args[1:]), torch.ones(40, 9, dtype=dtype)
    assert_as_accurate(narrow_on_host(args), predictions(coordinate_mlp_reference), *args)
    assert_gradients_as_accurate(narrow_on_host(args, grad), grad, *args)
    args[0][2, 5] = torch.nan
    bad = fastws.ops.coordinate_mlp.coordinates(args[3], args[4])[0] == 2
    assert torch.equal(narrow_on_host(args).isnan().all(1), bad) and torch.equal(
        narrow_on_host(args).isnan().any(1), bad
    )


def test_coordinate_mlp_narrow_with_little_shared_memory_on_host():
    args = example(300, 60, 3, 9, torch.bfloat16)
    y = narrow_on_host(args)
    assert all(torch.equal(narrow_on_host(args, shared=shared), y) for shared in (8192, 20000))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coordinate_mlp_narrow_of_a_table_row_for_each_kernel_on_host(dtype, axis):
    """Layers of one kernel, more of them than threads, or filters of one channel."""
    *tables, _, rows, weights, biases, weight, bias, kind = example(90, 20, 1, 9, dtype)
    rng = torch.Generator().manual_seed(2)
    tables = [table[:1].contiguous() for table in tables]
    tables[axis] = torch.randn(600, 20, generator=rng).to(dtype)
    grid = torch.tensor([[600, 1]]) if axis else torch.ones(600, 2, dtype=torch.int64)
    rows = torch.randint(600, (90,), generator=rng)
    args = *tables, grid, rows, weights, biases, weight, bias, kind
    grad = torch.randn(90, 9, generator=rng).to(dtype)
    assert_as_accurate(narrow_on_host(args), predictions(coordinate_mlp_reference), *args)
    assert_gradients_as_accurate(narrow_on_host(args, grad), grad, *args)


def test_coordinate_mlp_narrow_sums_parts_on_host():
    args = example(8192 + 40, 5, 1, 2)
    grad = torch.randn(8192 + 40, 2, generator=torch.Generator().manual_seed(1))
    assert_gradients_as_accurate(narrow_on_host(args, grad), grad, *args)


MEMORY = """
import resource, torch, fastws
torch.set_num_threads(1)
def train(rows):
    h, grid = 512, torch.tensor([[256, 256]])
    tables = [torch.randn(256, h, requires_grad=True) for _ in range(3)]
    weights = [torch.randn(h, h, requires_grad=True) for _ in range(3)] + [torch.randn(9, h, requires_grad=True)]
    biases = [torch.randn(h) for _ in range(3)] + [torch.randn(9)]
    fastws.coordinate_mlp(tables, grid, torch.arange(rows), weights, biases).sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
small = train(4096)
print(train(12288) - small)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in KiB on Linux only")
def test_coordinate_mlp_stores_no_activations_of_many_rows():
    # a process that begins anew: of a child of another one the system counts memory differently
    output = subprocess.run([sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True).stdout
    # four inputs and four outputs of activations of 8,192 rows would be 128 MiB, rows and predictions are 0.4
    assert float(output) < 40


def test_coordinate_mlp_makes_no_gradient_of_what_is_kept():
    class Zeros(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function.overloadpacket in (torch.ops.aten.zeros, torch.ops.aten.new_zeros, torch.ops.aten.zeros_like):
                self.largest = max(self.largest, result.numel())
            return result

    *args, activation = example(300, 33, 3, 9)
    tables = [table.requires_grad_() for table in args[:3]]
    y = torch.ops.fastws.coordinate_mlp(*tables, *args[3:], activation, True)[0].sum()
    with Zeros() as zeros:
        y.backward()
    assert zeros.largest < 300 * 33


def test_coordinate_mlp_names_the_wrong_argument():
    *tables, grid, rows, weights, biases, weight, bias, _ = example(20, 9, 2, 3)

    def call(tables=tables, grid=grid, rows=rows, weights=(*weights, weight), biases=(*biases, bias), **activation):
        return fastws.coordinate_mlp(tables, grid, rows, weights, biases, **activation)

    for arguments, message in [
        ({"activation": "tanh"}, "activation must be one of relu, leaky_relu, .*, got 'tanh'"),
        ({"tables": tables[:2]}, r"tables must be three of \[indices, h\], not empty, got \[\[6, 9\], \[5, 9\]\]"),
        (
            {"tables": [t[:, :0] for t in tables]},
            "tables must be .*, not empty, got .*70, 0",
        ),
        ({"biases": biases}, "weights and biases must be of as many layers, at least 1, got 3 and 2"),
        ({"weights": (*weights, weight[:, 1:])}, r"weights\[2\] must be \[3, 9\] torch.float32 on cpu, got \[3, 8\]"),
        ({"biases": (*biases, bias.double())}, r"biases\[2\] must be \[3\] torch.float32 .*, got \[3\] torch.float64"),
        ({"rows": rows.int()}, r"rows must be \[n\] int64 on cpu, got \[20\] torch.int32"),
        ({"rows": rows + KERNELS}, rf"rows must be kernels of the grid, 0 to {KERNELS - 1}, got "),
        ({"grid": 0 * grid}, "grid must hold at least 1 filter and 1 channel, got 0"),
        ({"tables": (*tables[:2], tables[2][:69])}, r"tables\[2\] must have a row for each of 70 channels, got 69"),
    ]:
        with pytest.raises(ValueError, match=f"coordinate_mlp: {message}"):
            call(**arguments)
