import pytest
import torch
from checkpoints import checkpoints, small_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

import fastws
from fastws.ops.tokenize import detokenize_reference, tokenize_reference
from fastws.testing import devices, implementations

CASES = [  # dtype, token size, batch: tokens shorter than rows, whole rows with bias, longer than rows
    (torch.float32, 17, 3),
    (torch.float32, 1, 1),
    (torch.float32, 64, 0),
    (torch.float64, 28, 2),
    (torch.float16, 64, 1),
    (torch.bfloat16, 4, 1),
]
SPANS = ("row", "layer", "network")


def example(token_size, batch=3, dtype=torch.float32, device="cpu", norm="keep", span="row"):
    layout = fastws.Layout.from_checkpoint(small_checkpoint(), token_size, norm, span)
    rng = torch.Generator().manual_seed(0)
    flat = torch.randn(batch, 2 * layout.num_weights, generator=rng).to(device, dtype)[:, ::2]  # not contiguous
    return flat, layout.table.to(device), layout


@pytest.mark.parametrize("name, function, device", implementations("tokenize"))
@pytest.mark.parametrize("dtype, token_size, batch", CASES)
@pytest.mark.parametrize("span", SPANS)
def test_tokenize_is_the_reference(name, function, device, dtype, token_size, batch, span):
    flat, table, layout = example(token_size, batch, dtype, device, span=span)
    actual = function(flat, table, token_size, layout.num_tokens)
    expected = tokenize_reference(flat, table, token_size, layout.num_tokens)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name, function, device", implementations("detokenize"))
@pytest.mark.parametrize("dtype, token_size, batch", CASES)
@pytest.mark.parametrize("norm", ["keep", "skip"])  # skip leaves weights that no token holds
@pytest.mark.parametrize("span", SPANS)
def test_detokenize_is_the_reference(name, function, device, dtype, token_size, batch, norm, span):
    _, table, layout = example(token_size, device=device, norm=norm, span=span)
    tokens = torch.randn(batch, layout.num_tokens, token_size).to(device, dtype)  # padding is not zero
    expected = detokenize_reference(tokens, table, layout.num_weights)
    torch.testing.assert_close(function(tokens, table, layout.num_weights), expected, rtol=0, atol=0)


@settings(max_examples=60, deadline=None)
@given(state=checkpoints(), token_size=st.integers(1, 40), norm=st.sampled_from(["keep", "skip"]))
def test_tokenize_is_the_definition(state, token_size, norm):
    """Rows with their bias, padded at the end, cut into chunks: specs of SANE, entry by entry."""
    layout = fastws.Layout.from_checkpoint(state, token_size, norm)
    flat = layout.flatten(state)
    tokens, lengths, positions = layout.tokenize(flat)
    n = 0
    for layer, (name, bias) in enumerate(layout.layers):
        weight = state[name].reshape(state[name].shape[0] if state[name].dim() else 1, -1)
        rows = torch.cat([weight, state[bias][:, None]], 1) if bias else weight
        for row in range(len(rows)):
            for begin in range(0, rows.shape[1], token_size):
                chunk = rows[row, begin : begin + token_size]
                assert lengths[n] == len(chunk) and positions[n].tolist() == [n, layer, row]
                assert torch.equal(tokens[n, : len(chunk)], chunk) and not tokens[n, len(chunk) :].any()
                n += 1
    assert n == layout.num_tokens == len(tokens)
    assert torch.equal(layout.mask.sum(1).int(), lengths)
    assert torch.equal(layout.detokenize(tokens, like=flat), flat)


@settings(max_examples=60, deadline=None)
@given(
    state=checkpoints(),
    token_size=st.integers(1, 40),
    norm=st.sampled_from(["keep", "skip"]),
    span=st.sampled_from(["layer", "network"]),
)
def test_tokens_that_span_rows_are_the_definition(state, token_size, norm, span):
    """Layers with their bias column, or the flat vector, as one vector each that is cut into chunks and padded once."""
    layout = fastws.Layout.from_checkpoint(state, token_size, norm, span)
    flat = layout.flatten(state)
    tokens, lengths, positions = layout.tokenize(flat)
    vectors = []
    for name, bias in layout.layers:
        weight = state[name].reshape(state[name].shape[0] if state[name].dim() else 1, -1)
        vectors.append((torch.cat([weight, state[bias][:, None]], 1) if bias else weight).flatten())
    bounds = torch.tensor([len(vector) for vector in vectors]).cumsum(0)
    vectors = [torch.cat(vectors)] if span == "network" else vectors
    n = 0
    for layer, vector in enumerate(vectors):
        for number, chunk in enumerate(vector.split(token_size)):
            assert lengths[n] == len(chunk)
            assert torch.equal(tokens[n, : len(chunk)], chunk) and not tokens[n, len(chunk) :].any()
            if span == "network":
                layer = int(torch.searchsorted(bounds, n * token_size, right=True))
                number = n - (int(bounds[layer - 1]) // token_size if layer else 0)
            assert positions[n].tolist() == [n, layer, number]
            n += 1
    assert n == layout.num_tokens == len(tokens)
    assert torch.equal(layout.mask.sum(1).int(), lengths)
    assert torch.equal(layout.detokenize(tokens, like=flat), flat)


def test_tokens_that_span_rows_by_hand():
    state = {"a.weight": torch.tensor([[1.0, 2.0], [4.0, 5.0]]), "a.bias": torch.tensor([7.0, 8.0])}
    state["b.weight"] = torch.tensor([[10.0, 11.0]])
    flat = torch.cat([x.flatten() for x in state.values()])
    layout = fastws.Layout.from_checkpoint(state, 4, span="layer")
    assert layout.tokenize(flat).values.tolist() == [[1, 2, 7, 4], [5, 8, 0, 0], [10, 11, 0, 0]]
    assert layout.positions.tolist() == [[0, 0, 0], [1, 0, 1], [2, 1, 0]] and layout.lengths.tolist() == [4, 2, 2]
    layout = layout.with_tokens(5, span="network")
    assert layout.tokenize(flat).values.tolist() == [[1, 2, 4, 5, 7], [8, 10, 11, 0, 0]]
    assert layout.positions.tolist() == [[0, 0, 0], [1, 1, 1]]  # the second begins with the bias
    assert layout.with_tokens().token_size == layout.num_weights == 8


def test_tokenize_by_hand():
    state = {"a.weight": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), "a.bias": torch.tensor([7.0, 8.0])}
    layout = fastws.Layout.from_checkpoint(state, token_size=3)
    tokens = fastws.tokenize(layout.flatten(state)[None], layout.table, 3)
    assert tokens.tolist() == [[[1, 2, 3], [7, 0, 0], [4, 5, 6], [8, 0, 0]]]


def test_tokenize_does_not_depend_on_the_threads():
    flat, table, layout = example(17, batch=50)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(torch.ops.fastws.tokenize(flat, table, 17, layout.num_tokens))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("device", devices())
def test_tokenize_gradients(device):
    flat, table, layout = example(17, 2, torch.float64, device, norm="skip")
    tokens = fastws.tokenize(flat, table, 17)
    assert torch.autograd.gradcheck(lambda x: fastws.tokenize(x, table, 17), flat.clone().requires_grad_())
    inverse = lambda x: fastws.detokenize(x, table, layout.num_weights)  # noqa: E731
    assert torch.autograd.gradcheck(inverse, tokens.clone().requires_grad_())
    assert torch.autograd.gradgradcheck(inverse, tokens.clone().requires_grad_())


@pytest.mark.parametrize("device", devices())
def test_tokenize_opcheck(device):
    flat, table, layout = example(17, device=device)
    tokens = fastws.tokenize(flat, table, 17)
    torch.library.opcheck(torch.ops.fastws.tokenize.default, (flat.requires_grad_(), table, 17, layout.num_tokens))
    args = tokens.requires_grad_(), table, layout.num_weights
    torch.library.opcheck(torch.ops.fastws.detokenize.default, args)


def test_tokenize_compiles():
    flat, table, layout = example(17)

    def there_and_back(flat):
        tokens = fastws.tokenize(flat, table, 17, layout.num_tokens)
        return fastws.detokenize(2 * tokens, table, layout.num_weights)

    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")  # needs no compiler
    assert torch.equal(compiled(flat), there_and_back(flat))


def test_tokenize_names_the_wrong_argument():
    flat, table, _ = example(17)
    with pytest.raises(ValueError, match=r"tokenize: flat must be \[B, P\] floating point, got \[4\] torch.float32"):
        fastws.tokenize(torch.zeros(4), table, 17)
    with pytest.raises(ValueError, match=r"tokenize: flat must be .* floating point, got .* torch.int64"):
        fastws.tokenize(flat.long(), table, 17)
    with pytest.raises(ValueError, match="tokenize: table must be .* int64 on cpu, got .* torch.int32"):
        fastws.tokenize(flat, table.int(), 17)
    for token_size in (0, -3):
        with pytest.raises(ValueError, match=f"tokenize: token_size must be at least 1, got {token_size}"):
            fastws.tokenize(flat, table, token_size)
    with pytest.raises(ValueError, match=r"detokenize: tokens must be \[B, N, T\]"):
        fastws.detokenize(flat, table, 3)


INTO = {  # operator: its arguments but out, and the shape of out
    "tokenize": lambda flat, table, layout: ((flat, table, 17), (len(flat), layout.num_tokens, 17)),
    "detokenize": lambda flat, table, layout: (
        (fastws.tokenize(flat, table, 17), table, layout.num_weights),
        (len(flat), layout.num_weights),
    ),
}


@pytest.mark.parametrize("op", INTO)
@pytest.mark.parametrize("norm", ["keep", "skip"])
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("device", devices())
def test_out_is_what_is_returned(op, norm, batch, device):
    flat, table, layout = example(17, batch, device=device, norm=norm)
    args, shape = INTO[op](flat, table, layout)
    out = torch.full(shape, 7.0, device=device)
    assert getattr(fastws, op)(*args, out=out) is out
    assert torch.equal(out, getattr(fastws, op)(*args))


@pytest.mark.parametrize("op", INTO)
@pytest.mark.parametrize("dtype, token_size, batch", CASES)
def test_every_implementation_writes_into_out(op, dtype, token_size, batch):
    for _, function, device in implementations(f"{op}_out"):
        flat, table, layout = example(token_size, batch, dtype, device, norm="skip")
        tokens = tokenize_reference(flat, table, token_size, layout.num_tokens)
        expected = tokens if op == "tokenize" else detokenize_reference(tokens, table, layout.num_weights)
        out = torch.full_like(expected, 7.0)
        args = (flat, table, token_size) if op == "tokenize" else (tokens, table)
        assert function(*args, out) is None
        torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize("op", INTO)
def test_out_that_does_not_fit_is_one_sentence(op):
    flat, table, layout = example(17)
    args, shape = INTO[op](flat.contiguous(), table, layout)
    function, good = getattr(fastws, op), torch.empty(shape)
    wrong = {
        "shape": good[:, 1:],
        "batch": good[:2],
        "dtype": good.double(),
        "device": good.to("meta"),
        "strides": torch.empty(*shape[:-1], 2 * shape[-1])[..., ::2],
    }
    expected = rf"{op}: out must be \[{', '.join(map(str, shape))}\] torch.float32 on cpu, contiguous, got \["
    for name, out in wrong.items():
        with pytest.raises(ValueError, match=expected) as error:
            function(*args, out=out)
        assert "\n" not in str(error.value), name


@pytest.mark.parametrize("op", INTO)
def test_out_that_shares_memory_is_refused(op):
    flat, table, layout = example(17)
    args, shape = INTO[op](flat, table, layout)
    name, count, size = ("flat" if op == "tokenize" else "tokens"), args[0].numel(), torch.Size(shape).numel()
    memory = torch.zeros(count + size)
    memory[:count] = args[0].flatten()
    x = memory[:count].view(args[0].shape)
    beside, one_too_far = memory[count:].view(shape), memory[count - 1 : -1].view(shape)
    function = getattr(fastws, op)
    assert torch.equal(function(x, *args[1:], out=beside), function(*args))
    with pytest.raises(ValueError, match=f"{op}: out must not share memory with {name}, got one that does"):
        function(x, *args[1:], out=one_too_far)


@pytest.mark.parametrize("op", INTO)
def test_out_has_no_gradient(op):
    flat, table, layout = example(17)
    args, shape = INTO[op](flat, table, layout)
    function, name = getattr(fastws, op), "flat" if op == "tokenize" else "tokens"
    out, wanting = torch.empty(shape), args[0].clone().requires_grad_()
    for which, (x, target) in {name: (wanting, out), "out": (args[0], out.clone().requires_grad_())}.items():
        with pytest.raises(ValueError, match=f"{op}: {which} must not require a gradient where out is given"):
            function(x, *args[1:], out=target)
        with torch.no_grad():
            assert torch.equal(function(x, *args[1:], out=target), function(*args))


@pytest.mark.parametrize("op", INTO)
def test_out_that_a_gradient_needs_is_known_to_have_changed(op):
    flat, table, layout = example(17)
    args, shape = INTO[op](flat, table, layout)
    out, x = torch.ones(shape), torch.ones(shape, requires_grad=True)
    product = x * out
    getattr(fastws, op)(*args, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_out_compiles():
    flat, table, layout = example(17)

    def there_and_back(flat, tokens, again):
        fastws.tokenize(2 * flat, table, 17, layout.num_tokens, out=tokens)
        return 1 + fastws.detokenize(tokens + 1, table, layout.num_weights, out=again)

    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")  # needs no compiler
    outs = [[torch.empty(3, layout.num_tokens, 17), torch.empty(flat.shape)] for _ in range(2)]
    assert torch.equal(compiled(flat, *outs[0]), there_and_back(flat, *outs[1]))
    assert all(map(torch.equal, *outs))


@pytest.mark.parametrize("device", devices())
def test_out_opcheck(device):
    flat, table, layout = example(17, device=device)
    tokens = fastws.tokenize(flat, table, 17)
    torch.library.opcheck(torch.ops.fastws.tokenize_out.default, (flat, table, 17, torch.empty_like(tokens)))
    torch.library.opcheck(torch.ops.fastws.detokenize_out.default, (tokens, table, torch.empty(flat.shape).to(flat)))
