"""torch.func and forward-mode AD on quantized layers: what the dense twin gives."""

import pytest

torch = pytest.importorskip("torch", reason="the layers need torch")

from torch import func, nn
from torch.autograd import forward_ad

import hqq_cpp

SIZES = {"nbits": 4, "group_size": 16}
X = torch.linspace(-1, 1, 3 * 32).reshape(3, 32)


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 16))
    return hqq_cpp.quantize_model_(model, SIZES).eval()


def dense(model):
    twin = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 16)).eval()
    for ours, theirs in ((model[0], twin[0]), (model[2], twin[2])):
        theirs.weight.data, theirs.bias.data = ours.dequantize(), ours.bias.detach().clone()
    return twin


@pytest.fixture(params=["as made", "after a call"])
def model(request):
    model = net()
    if request.param == "after a call":
        model(X)
        assert model[0].is_tiled
    return model


def loss(model):
    return lambda x: model(x).pow(3).sum()


def dual(model):
    with forward_ad.dual_level():
        y = model(forward_ad.make_dual(X, X + 1))
        return torch.stack(forward_ad.unpack_dual(y))


def reverse_over_dual(model):
    x = X.clone().requires_grad_()
    with forward_ad.dual_level():
        y = loss(model)(forward_ad.make_dual(x, X + 1))
        return torch.autograd.grad(forward_ad.unpack_dual(y).tangent, x)[0]


def of_bias(transform):
    """With respect to the first bias."""

    def run(model):
        bias = model[0].bias.detach()
        return transform(lambda b: func.functional_call(model, {"0.bias": b}, (X,)).square(), bias)

    return run


TRANSFORMS = {
    "grad": lambda m: func.grad(loss(m))(X),
    "value": lambda m: func.grad_and_value(loss(m))(X)[1],
    "jvp": lambda m: torch.stack(func.jvp(m, (X,), (X + 1,))),
    "jacrev": lambda m: func.jacrev(m)(X[0]),
    "jacfwd": lambda m: func.jacfwd(m)(X[0]),
    "hessian": lambda m: func.hessian(loss(m))(X[0]),
    "reverse twice": lambda m: func.jacrev(func.jacrev(loss(m)))(X[0]),
    "third": lambda m: func.grad(lambda x: func.jvp(func.grad(loss(m)), (x,), (x,))[1].sum())(X),
    "gradient of each": lambda m: torch.vmap(func.grad(loss(m)))(X),
    "autograd.functional": lambda m: torch.autograd.functional.hessian(loss(m), X[0]),
    "dual": dual,
    "dual without grad": torch.no_grad()(dual),
    "reverse over dual": reverse_over_dual,
    "grad of bias": of_bias(lambda f, b: func.grad(lambda b: f(b).sum())(b)),
    "jvp of bias": of_bias(lambda f, b: func.jvp(f, (b,), (b,))[1]),
    "weight": lambda m: func.jvp(lambda x: x @ m[0].weight.t(), (X,), (X + 1,))[1],
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_derivatives(model, name):
    ours, theirs = TRANSFORMS[name](model), TRANSFORMS[name](dense(model))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_gradcheck():
    model = net().double()
    x = X.double().requires_grad_()
    options = {"check_batched_grad": True}
    assert torch.autograd.gradcheck(
        model, x, check_forward_ad=True, check_batched_forward_grad=True, **options
    )
    assert torch.autograd.gradgradcheck(model, x, **options)


BATCHES = {
    "rows": lambda m: torch.vmap(m)(X),
    "columns": lambda m: torch.vmap(m, in_dims=1, out_dims=1)(X.t().contiguous()),
    "two levels": lambda m: torch.vmap(torch.vmap(m))(X.expand(2, 3, 32)),
    "chunks": lambda m: torch.vmap(m, chunk_size=2)(X),
    "weight": lambda m: torch.vmap(lambda x: x @ m[0].weight.t())(X),
}


@pytest.mark.parametrize("name", BATCHES)
def test_vmap(model, name):
    hqq_cpp.set_backend("auto", mode="exact")
    try:
        ours = BATCHES[name](model)
    finally:
        hqq_cpp.set_backend("auto", mode="auto")
    torch.testing.assert_close(ours, BATCHES[name](dense(model)), rtol=1e-4, atol=1e-4)


def test_vmap_over_weights():
    """An ensemble: each has weights of its own."""
    layers = [hqq_cpp.quantize_linear(torch.randn(24, 32), SIZES) for _ in range(3)]
    stacked = {
        k: torch.stack([la.state_dict()[k] for la in layers]) for k in layers[0].state_dict()
    }
    x = X.clone().requires_grad_()

    def call(tensors, x):
        return func.functional_call(layers[0], tensors, (x,))

    together = torch.vmap(call, in_dims=(0, None))(stacked, x)
    torch.testing.assert_close(together, torch.stack([layer(x) for layer in layers]))
    each = torch.vmap(call)(stacked, x)
    torch.testing.assert_close(each, torch.stack([la(row) for la, row in zip(layers, x)]))


def test_experts_and_embedding():
    q = [hqq_cpp.quantize(torch.randn(24, 32), SIZES) for _ in range(3)]
    experts, counts = hqq_cpp.HqqExperts(q), torch.tensor([2, 0, 3])
    W, bias, x = experts.dequantize(), torch.randn(3, 24), torch.randn(6, 32)
    owner = torch.tensor([0, 0, 2, 2, 2])

    def reference(x, bias):
        y = torch.einsum("roi,ri->ro", W[owner], x[:5]) + bias[owner]
        return torch.cat([y, y.new_zeros(1, 24)])

    def ours(x, bias):
        return experts(x, counts, bias)

    for f in (
        lambda call: func.jvp(call, (x, bias), (x + 1, bias - 1))[1],
        lambda call: func.grad(lambda x: call(x, bias).pow(3).sum())(x),
        lambda call: func.grad(lambda b: call(x, b).pow(3).sum())(bias),
        lambda call: func.jvp(func.grad(lambda x: call(x, bias).pow(3).sum()), (x,), (x,))[1],
        lambda call: torch.vmap(func.grad(lambda x: call(x, bias).pow(3).sum()))(
            torch.stack([x, 2 * x])
        ),
    ):
        torch.testing.assert_close(f(ours), f(reference), rtol=1e-4, atol=1e-3)
    table = hqq_cpp.HqqEmbedding(q[0])
    ids = torch.tensor([[0, 5], [23, 1]])
    assert torch.equal(torch.vmap(table)(ids), table(ids))
    with pytest.raises(IndexError, match="index 24 is out of range"):
        torch.vmap(table)(ids + 1)


@pytest.mark.parametrize("tensor", ["scale", "col_scale"])
@pytest.mark.parametrize("transform", ["grad", "jvp"])
def test_a_weight_has_no_derivative(tensor, transform):
    """torch.func would take none for zero."""
    layer = hqq_cpp.quantize_linear(torch.randn(24, 32), SIZES)
    values = layer.state_dict()[tensor]

    def call(values):
        return func.functional_call(layer, {tensor: values}, (X,)).sum()

    with pytest.raises(RuntimeError, match=f"no derivative with respect to {tensor}: a quantized"):
        if transform == "grad":
            func.grad(call)(values)
        else:
            func.jvp(call, (values,), (values,))
