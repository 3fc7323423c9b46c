"""The specification itself: against the paper's formulas, finite differences and closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cot2align.kernels import reference
from tests.kernels import direct


@pytest.mark.parametrize("epsilon", [10.0, 0.1, 0.02])
@pytest.mark.parametrize("num_iters", [1, 2, 3, 10, 100])
def test_value_and_gradient_are_the_papers(epsilon, num_iters):
    tensors = direct.problem(9, 13)

    def loss(x, y, p):
        return reference.fused_ot_loss(
            x[None], y[None], p, epsilon=epsilon, num_iters=num_iters, tol=0.0
        )

    expected, expected_grads = direct.gradients(
        lambda x, y, p: direct.ot_loss(x, y, p, epsilon, num_iters), tensors
    )
    value, grads = direct.gradients(loss, tensors)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    for got, want in zip(grads, expected_grads, strict=True):
        assert direct.relative(got, want) < 1e-9


@pytest.mark.parametrize("grad", ["unrolled", "implicit"])
def test_gradcheck(grad):
    # 200 iterations at epsilon 0.5 are converged, where the implicit gradient is the gradient.
    x, y, p = (t.requires_grad_() for t in direct.problem(4, 5, 3, 4))
    mask = torch.tensor([[True, True, False, True]])

    def loss(x, y, p):
        return reference.fused_ot_loss(
            x[None], y[None], p, student_mask=mask, epsilon=0.5, num_iters=200, tol=0.0, grad=grad
        )

    assert torch.autograd.gradcheck(loss, (x, y, p))


@pytest.mark.parametrize(("name", "where"), [("mps", "cpu"), ("cpu", "cpu"), ("cuda:1", "cuda:1")])
def test_the_implicit_gradient_is_solved_where_float64_is(name, where):
    assert reference.float64_device(torch.device(name)) == torch.device(where)


def test_detached_is_the_plan_as_a_constant():
    x, y, p = direct.problem(5, 7)
    solved = reference.solve(
        x[None], y[None], p, None, None, reference.OTSettings(0.1, 50, 0.0, "detached")
    )

    def frozen(x, y, p):
        cost = 1 - torch.softmax(x @ (y @ p).T / math.sqrt(x.shape[1]), dim=1)
        return (solved.plan[0] * cost).sum()

    def loss(x, y, p):
        return reference.fused_ot_loss(
            x[None], y[None], p, epsilon=0.1, num_iters=50, tol=0.0, grad="detached"
        )

    expected, expected_grads = direct.gradients(frozen, (x, y, p))
    value, grads = direct.gradients(loss, (x, y, p))
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert all(direct.relative(g, e) < 1e-10 for g, e in zip(grads, expected_grads, strict=True))


def test_constant_cost_gives_the_uniform_plan():
    plan = reference.solve(
        torch.zeros(1, 3, 4), torch.randn(1, 5, 4), None, None, None, reference.OTSettings()
    )
    assert torch.allclose(plan.plan, torch.full((1, 3, 5), 1 / 15))
    assert plan.loss.item() == pytest.approx(1 - 1 / 5, rel=1e-6)
    assert plan.num_iters.tolist() == [1]


@pytest.mark.parametrize(("n", "m"), [(1, 6), (6, 1)])
def test_one_token_on_a_side_leaves_one_plan(n, m):
    x, y, _ = direct.problem(n, m, 4, 4)
    solved = reference.solve(x[None], y[None], None, None, None, reference.OTSettings())
    assert torch.allclose(solved.plan[0], torch.full((n, m), 1 / (n * m), dtype=torch.float64))
    assert solved.loss.item() == pytest.approx(1 - 1 / m if n == 1 else 0.0, abs=1e-12)


def test_sharp_problem_finds_the_permutation():
    order = torch.tensor([2, 0, 3, 1])
    x = 30 * torch.eye(4, dtype=torch.float64)
    solved = reference.solve(
        x[None], x[order][None], None, None, None, reference.OTSettings(epsilon=0.02)
    )
    assert torch.equal(solved.plan[0].argmax(1), order.argsort())
    assert solved.loss.item() < 1e-12


def test_stops_at_the_first_iteration_within_the_tolerance():
    x, y, p = (t[None] for t in direct.problem(20, 30))
    runs = [
        reference.solve(x, y, p[0], None, None, reference.OTSettings(0.1, k, 0.0))
        for k in range(1, 40)
    ]
    errors = [run.marginal_error.item() for run in runs]
    assert errors[0] > 1e-3 > errors[-1]
    first = next(k for k, error in enumerate(errors) if error <= 1e-3)
    stopped = reference.solve(x, y, p[0], None, None, reference.OTSettings(0.1, 1000, 1e-3))
    assert stopped.num_iters.item() == first + 1
    assert torch.allclose(stopped.plan, runs[first].plan, rtol=1e-12, atol=0)
    column_error = (stopped.plan.sum(1) - 1 / 30).abs().sum().item()
    assert stopped.marginal_error.item() == pytest.approx(column_error, rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.booleans(), min_size=1, max_size=9),
    st.lists(st.booleans(), min_size=1, max_size=9),
    st.sampled_from([1e-3, 0.05, 1.0, 1e3]),
)
def test_masks_are_cropping(rows, cols, epsilon):
    x, y, p = direct.problem(len(rows), len(cols))
    rows, cols = torch.tensor(rows), torch.tensor(cols)

    def loss(x, y, p):
        x = x.masked_fill(~rows[:, None], math.nan)
        return reference.fused_ot_loss(
            x[None],
            y[None],
            p,
            student_mask=rows[None],
            teacher_mask=cols[None],
            epsilon=epsilon,
            num_iters=7,
            tol=0.0,
        )

    value, (dx, dy, dp) = direct.gradients(loss, (x, y, p))
    assert not dx[~rows].any()
    assert not dy[~cols].any()
    if not rows.any() or not cols.any():
        assert value == 0
        assert not dx.any()
        assert not dp.any()
        return
    expected = direct.ot_loss(x[rows], y[cols], p, epsilon, 7)
    assert value.item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-12)
