"""The operator under PyTorch's transforms: the derivative of a fixed choice, or an error."""

from __future__ import annotations

import copy

import pytest
import torch
from sae_lens import TopKSAE, TopKSAEConfig
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

from sae_afa_plugin import TopAFASAE, TopAFASAEConfig, keep_prefix

D_SAE = 12
RNG = torch.Generator().manual_seed(0)
ACTS = torch.randn(5, D_SAE, generator=RNG, dtype=torch.float64)
TARGETS = ACTS.relu().norm(dim=-1) * torch.tensor([0.3, 0.6, 0.9, 1.2, 0.5], dtype=torch.float64)
NORMS = 0.5 + torch.rand(D_SAE, generator=RNG, dtype=torch.float64)
TANGENT = torch.randn(5, D_SAE, generator=RNG, dtype=torch.float64)
PERS = pytest.mark.parametrize("per", ["row", "batch"])


def _mask(per):
    """What is kept, by the definition and one sort."""
    scores = ACTS * NORMS
    flat, goal = (scores, TARGETS) if per == "row" else (scores.view(1, -1), TARGETS.norm()[None])
    order = flat.sort(descending=True, stable=True)
    norms = order.values.clamp(min=0).square().cumsum(-1).sqrt()
    distance = (norms - goal[:, None]).abs().where(order.values > 0, torch.inf)
    kept = torch.arange(flat.shape[1]) <= distance.argmin(-1, keepdim=True)
    return torch.zeros_like(kept).scatter(-1, order.indices, kept).view_as(ACTS)


def _keep(per):
    return lambda acts: keep_prefix(acts, TARGETS, NORMS, per=per)


def _cubes(per):
    return lambda acts: _keep(per)(acts).pow(3).sum()


@PERS
def test_forward_mode(per):
    out, tangent = jvp(_keep(per), (ACTS,), (TANGENT,))
    assert torch.equal(out, torch.where(_mask(per), ACTS, 0))
    assert torch.equal(tangent, torch.where(_mask(per), TANGENT, 0))
    with forward_ad.dual_level():
        out, tangent = forward_ad.unpack_dual(_keep(per)(forward_ad.make_dual(ACTS, TANGENT)))
        assert torch.equal(tangent, torch.where(_mask(per), TANGENT, 0))


@PERS
@pytest.mark.parametrize("jacobian", [jacfwd, jacrev])
def test_jacobians(per, jacobian):
    expected = torch.diag(_mask(per).flatten().double()).view(*ACTS.shape, *ACTS.shape)
    assert torch.equal(jacobian(_keep(per))(ACTS), expected)


@PERS
def test_reverse_mode(per):
    expected = torch.where(_mask(per), 3 * ACTS.square(), 0)
    torch.testing.assert_close(grad(_cubes(per))(ACTS), expected)
    _, pull = vjp(_keep(per), ACTS)
    assert torch.equal(pull(TANGENT)[0], torch.where(_mask(per), TANGENT, 0))
    x = ACTS.clone().requires_grad_()
    checkpoint(_cubes(per), x, use_reentrant=False).backward()
    torch.testing.assert_close(x.grad, expected)


@PERS
def test_second_derivatives(per):
    diagonal = torch.where(_mask(per), 6 * ACTS, 0)
    expected = torch.diag(diagonal.flatten()).view(*ACTS.shape, *ACTS.shape)
    torch.testing.assert_close(hessian(_cubes(per))(ACTS), expected)
    torch.testing.assert_close(jacrev(jacrev(_cubes(per)))(ACTS), expected)
    x = ACTS.clone().requires_grad_()
    (first,) = torch.autograd.grad(_cubes(per)(x), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, diagonal)


@pytest.mark.parametrize(
    "in_dims", [(0, 0, None), (0, None, None), (0, 0, 0), (0, 0, 1), (1, 0, 0)]
)
@PERS
def test_vmap_is_a_loop(per, in_dims):
    acts = torch.stack([ACTS, ACTS.flip(0), -ACTS], dim=in_dims[0])
    targets = TARGETS if in_dims[1] is None else torch.stack([TARGETS, 2 * TARGETS, TARGETS])
    norms = NORMS
    if in_dims[2] is not None:
        norms = torch.stack([NORMS, NORMS.flip(0), NORMS], dim=in_dims[2])

    def of(tensor, dim, i):
        return tensor if dim is None else tensor.select(dim, i)

    def keep(acts, targets, norms):
        return keep_prefix(acts, targets, norms, per=per)

    arguments = (acts, targets, norms)
    found = vmap(keep, in_dims)(*arguments)
    for i in range(3):
        one = [of(tensor, dim, i) for tensor, dim in zip(arguments, in_dims, strict=True)]
        assert torch.equal(found[i], keep(*one))


def test_vmap_over_gradients_of_rows():
    def of_row(acts, target):
        return keep_prefix(acts, target, NORMS).pow(3).sum()

    found = vmap(grad(of_row))(ACTS, TARGETS)
    torch.testing.assert_close(found, torch.where(_mask("row"), 3 * ACTS.square(), 0))


def test_rows_that_are_not_finite_under_a_transform():
    acts = ACTS.clone()
    acts[1, 3] = torch.nan
    out, tangent = jvp(_keep("row"), (acts,), (TANGENT,))
    assert out[1].isnan().all()
    assert torch.equal(out[0], torch.where(_mask("row")[0], ACTS[0], 0))
    assert torch.equal(tangent[0], torch.where(_mask("row")[0], TANGENT[0], 0))


TRACED = {
    "plain": _keep("row"),
    "grad": grad(_cubes("row")),
    "jvp": lambda acts: jvp(_keep("row"), (acts,), (TANGENT,))[1],
    "vmap": lambda acts: vmap(lambda a, t: keep_prefix(a, t, NORMS))(acts, TARGETS),
    "jacrev": jacrev(_keep("row")),
}


@pytest.mark.parametrize("name", TRACED)
def test_transforms_inside_of_what_is_compiled(name):
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(TRACED[name])(ACTS), TRACED[name](ACTS))


def test_it_is_compiled_without_breaks_and_exported():
    torch.compiler.reset()
    compiled = torch.compile(_keep("row"), fullgraph=True)
    assert torch.equal(compiled(ACTS), _keep("row")(ACTS))
    exported = torch.export.export(_Module(), (ACTS,)).module()
    assert torch.equal(exported(ACTS), _keep("row")(ACTS))


class _Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("targets", TARGETS)
        self.register_buffer("norms", NORMS)

    def forward(self, acts):
        return keep_prefix(acts, self.targets, self.norms)


# --- whole SAEs: what works for TopK ---

X, V = torch.randn(2, 16, generator=RNG, dtype=torch.float64)


def _saes():
    torch.manual_seed(0)
    topafa = TopAFASAE(TopAFASAEConfig(d_in=16, d_sae=64))
    topk = TopKSAE(TopKSAEConfig(d_in=16, d_sae=64, k=8))
    return [sae.double().requires_grad_(False) for sae in (topafa, topk)]


TRANSFORMS = {
    "jvp": lambda f: jvp(f, (X,), (V,))[1],
    "jacfwd": lambda f: jacfwd(f)(X) @ V,
    "jacrev": lambda f: jacrev(f)(X) @ V,
    "rows of grad": lambda f: torch.stack([grad(lambda y, i=i: f(y)[i])(X) for i in range(64)]) @ V,
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("which", [0, 1], ids=["topafa", "topk"])
def test_an_sae_under_a_transform(name, which):
    sae = _saes()[which]
    expected = torch.autograd.functional.jacobian(sae.encode, X) @ V
    assert expected.norm() > 0.1
    torch.testing.assert_close(TRANSFORMS[name](sae.encode), expected)


def test_derivatives_for_the_weights():
    sae = _saes()[0]
    weights = {name: w.detach() for name, w in sae.named_parameters()}

    def error(weights):
        return (functional_call(sae, weights, X) - X).square().sum()

    found = grad(error)(weights)
    plain = copy.deepcopy(sae).requires_grad_(True)
    (plain(X) - X).square().sum().backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)
