"""The Frechet distance against Gaussians whose distance has a closed form."""

import numpy as np
import pytest

from musiclm_engine.evaluation import frechet_distance


def with_moments(mean: np.ndarray, covariance: np.ndarray, seed: int) -> np.ndarray:
    """Rows whose sample mean and covariance are these exactly."""
    rows = np.random.default_rng(seed).normal(size=(50, len(mean)))
    rows -= rows.mean(0)
    white = rows @ np.linalg.inv(np.linalg.cholesky(np.atleast_2d(np.cov(rows.T)))).T
    return white @ np.linalg.cholesky(covariance).T + mean


def test_in_one_dimension() -> None:
    a = with_moments(np.array([1.0]), np.array([[4.0]]), 0)
    b = with_moments(np.array([-2.0]), np.array([[9.0]]), 1)
    assert frechet_distance(a, b) == pytest.approx(3.0**2 + (3 - 2) ** 2, abs=1e-9)


def test_of_covariances_that_commute() -> None:
    """|difference of means|^2 + the sum of (sqrt of own eigenvalues, apart)^2 in a shared basis."""
    basis, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(6, 6)))
    own, other = np.array([1.0, 2, 3, 4, 5, 6]), np.array([6.0, 1, 4, 2, 8, 0.5])
    mean = np.arange(6.0)
    a = with_moments(np.zeros(6), basis @ np.diag(own) @ basis.T, 3)
    b = with_moments(mean, basis @ np.diag(other) @ basis.T, 4)
    exact = mean @ mean + ((np.sqrt(own) - np.sqrt(other)) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(exact, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(exact, rel=1e-9)


def test_of_two_dimensions_that_do_not_commute() -> None:
    """In two dimensions tr (AB)^(1/2) = (tr AB + 2 sqrt(det AB))^(1/2)."""
    A, B = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[5.0, -2.0], [-2.0, 1.0]])
    product = A @ B
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    a, b = with_moments(np.zeros(2), A, 5), with_moments(np.ones(2), B, 6)
    assert frechet_distance(a, b) == pytest.approx(
        2 + np.trace(A) + np.trace(B) - 2 * root, rel=1e-9
    )


def test_fewer_rows_than_dimensions_stay_real_and_zero_for_the_same_rows() -> None:
    rows = np.random.default_rng(7).normal(size=(20, 200)).astype(np.float32)
    assert frechet_distance(rows, rows) == pytest.approx(0, abs=1e-4)
    assert frechet_distance(rows, rows + 1) == pytest.approx(200, rel=1e-4)
    assert frechet_distance(rows, -rows) == pytest.approx(4 * (rows.mean(0) ** 2).sum(), rel=1e-4)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((3, 2)), np.zeros((3, 4)), r"\(3, 2\) and \(3, 4\)"),
        (np.zeros(3), np.zeros((3, 4)), r"\(3,\)"),
        (np.zeros((1, 4)), np.zeros((3, 4)), "1 and 3 embeddings, wanted at least 2"),
        (np.full((3, 4), np.nan), np.zeros((3, 4)), "not finite"),
    ],
)
def test_what_has_no_covariance_is_refused(a, b, message) -> None:
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)
