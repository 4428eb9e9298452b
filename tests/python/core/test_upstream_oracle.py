"""solver="hqq" against upstream's own Quantizer, in float32 on the CPU."""

from pathlib import Path

import numpy as np
import pytest

import hqq_cpp
import reference

torch = pytest.importorskip("torch", reason="the oracle needs torch")
upstream = pytest.importorskip("hqq.core.quantize", reason="the oracle is the package hqq 0.2.8")

MODEL = Path(__file__).resolve().parents[3] / "examples" / "tiny-llama" / "model.safetensors"
LAYERS = ("model.layers.1.self_attn.q_proj.weight", "model.layers.2.mlp.down_proj.weight")


def make_matrices():
    rng = np.random.default_rng(3)
    matrices = {
        "gauss": rng.standard_normal((128, 192)) * 0.02,
        # Residuals large enough for the shrinkage to act: it leaves those below 0.17 alone.
        "wide": rng.standard_normal((64, 256)) * 2,
        "heavy_tails": rng.standard_t(2.5, (192, 128)) * 0.05,
    }
    tensors = hqq_cpp.load_safetensors(MODEL)
    for name in LAYERS:
        matrices[name] = np.asarray(tensors[name])
    return {name: W.astype(np.float32) for name, W in matrices.items()}


MATRICES = make_matrices()


def quantize_upstream(W, nbits, group_size, axis):
    """(codes, scale, zero, W_r) as arrays."""
    W_q, meta = upstream.Quantizer.quantize(
        torch.from_numpy(W),
        nbits=nbits,
        group_size=group_size,
        axis=axis,
        optimize=True,
        round_zero=nbits == 4,
        device="cpu",
        compute_dtype=torch.float32,
        bitpack=False,
    )
    W_r = ((W_q - meta["zero"]) * meta["scale"]).reshape(W.shape)
    codes = W_q.reshape(W.shape).to(torch.uint8)
    return codes.numpy(), meta["scale"].numpy(), meta["zero"].numpy(), W_r.numpy()


def mean_abs_error(W, W_r):
    return reference.error_stats(W, W_r)["mean_abs_error"]


@pytest.mark.parametrize("group_size", (16, 64, None))
@pytest.mark.parametrize("axis", (0, 1))
@pytest.mark.parametrize("nbits", reference.NBITS)
@pytest.mark.parametrize("name", MATRICES)
def test_same_codes_and_error(name, nbits, axis, group_size):
    W = MATRICES[name]
    codes, scale, zero, W_r = quantize_upstream(W, nbits, group_size, axis)
    q = hqq_cpp.quantize(
        W,
        {
            "nbits": nbits,
            "group_size": group_size,
            "axis": axis,
            "solver": "hqq",
            "balance": "none",
            "meta_dtype": "float32",
        },
    )
    assert np.mean(q.codes() == codes) >= 0.999
    error = mean_abs_error(W, W_r)
    assert mean_abs_error(W, hqq_cpp.dequantize(q)) == pytest.approx(error, rel=1e-3)
    # The scale comes from the range alone; only the order of two roundings differs.
    np.testing.assert_allclose(np.asarray(q.scale).ravel(), scale.ravel(), rtol=3e-7)
    # One code that differs moves a zero by a level / group_size.
    assert np.abs(np.asarray(q.zero).ravel() - zero.ravel()).mean() <= 0.01


@pytest.mark.parametrize("nbits", reference.NBITS)
@pytest.mark.parametrize("axis", (0, 1))
def test_reference_agrees_too(nbits, axis):
    """The NumPy reference is no second opinion unless upstream shares it."""
    W = MATRICES["heavy_tails"]
    codes, scale, _, W_r = quantize_upstream(W, nbits, 64, axis)
    groups = reference.Groups(*W.shape, 64, axis)
    ours, our_scale, our_zero = reference.solve_hqq(W, groups, nbits)
    assert np.mean(ours == codes) >= 0.999
    np.testing.assert_array_equal(our_scale, scale.ravel())
    error = mean_abs_error(W, reference.dequantize(ours, our_scale, our_zero, groups))
    assert error == pytest.approx(mean_abs_error(W, W_r), rel=1e-3)


def master_optimize_weights(tensor, scale, zero, min_max, axis=0, device=None):
    """Upstream's loop as its master branch has it: beta grows after every step."""
    from hqq.core.optimize import optimize_weights_proximal_legacy_step as step

    best, beta = torch.inf, 10.0
    for _ in range(20):
        W_r, _, zero, scale = step(tensor, scale, zero, min_max, beta, 0.7, axis)
        beta *= GROWTH
        error = torch.abs(tensor - W_r).mean()
        if not error < best:
            break
        best = error
    W_q = torch.round(tensor * scale + zero).clamp_(min_max[0], min_max[1])
    return W_q, scale, zero


# Not 1.01, which changes less than the tolerances.
GROWTH = 1.5


@pytest.mark.parametrize("axis", (0, 1))
@pytest.mark.parametrize("nbits", (3, 2, 1))
def test_growing_beta_is_that_of_the_master_branch(monkeypatch, nbits, axis):
    W = MATRICES["wide"]
    released = quantize_upstream(W, nbits, 64, axis)[0]
    monkeypatch.setattr(upstream.Quantizer, "optimize_weights", master_optimize_weights)
    codes, _, zero, _ = quantize_upstream(W, nbits, 64, axis)
    config = {
        "nbits": nbits,
        "axis": axis,
        "solver": "hqq",
        "balance": "none",
        "meta_dtype": "float32",
        "kappa": GROWTH,
    }
    grown = hqq_cpp.quantize(W, config | {"grow_beta": True})
    assert np.mean(grown.codes() == codes) >= 0.999
    assert np.abs(np.asarray(grown.zero).ravel() - zero.ravel()).mean() <= 0.01
    # Without the switch kappa has no effect, and the two differ.
    kept = hqq_cpp.quantize(W, config)
    assert np.mean(kept.codes() == released) >= 0.999 > np.mean(kept.codes() == codes)
    expected = reference.solve_hqq(W, reference.Groups(*W.shape, 64, axis), nbits, kappa=GROWTH)[0]
    assert np.mean(grown.codes() == expected) >= 0.999


@pytest.mark.parametrize("nbits", (4, 3, 2, 1))
def test_joint_beats_it(nbits):
    """Goals of the README for Gaussian weights: rmse lower by 5, 9, 24 and 40 percent."""
    W = MATRICES["gauss"]
    W_r = quantize_upstream(W, nbits, 64, 1)[3]
    q = hqq_cpp.quantize(W, {"nbits": nbits, "solver": "joint", "balance": "none"})
    rmse = reference.error_stats(W, hqq_cpp.dequantize(q))["rms_error"]
    bound = {4: 0.95, 3: 0.91, 2: 0.76, 1: 0.60}[nbits]
    assert rmse <= bound * reference.error_stats(W, W_r)["rms_error"]


def test_another_solver_fails_the_comparison():
    """The tolerances tell solvers apart."""
    W = MATRICES["gauss"]
    codes, *_ = quantize_upstream(W, 3, 64, 1)
    config = {"nbits": 3, "solver": "minmax", "balance": "none", "meta_dtype": "float32"}
    assert np.mean(hqq_cpp.quantize(W, config).codes() == codes) < 0.999
