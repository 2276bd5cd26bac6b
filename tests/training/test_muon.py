import pytest
import torch

from forcedrop.training.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8), (1, 6, 6)])
def test_orthogonalised_matrices_keep_singular_vectors_and_lose_singular_values(shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    found = u.transpose(1, 2) @ orthogonalise(x) @ vt.transpose(1, 2)  # diagonal in the same singular vectors
    values = torch.diagonal(found, dim1=1, dim2=2)
    torch.testing.assert_close(found, torch.diag_embed(values), rtol=0, atol=1e-10)
    assert float(values.min()) > 0.3
    assert float(values.max()) < 1.3
    assert float(s.max() / s.min()) > 2  # the spread was larger before


@pytest.mark.parametrize("shape", [(24, 12), (12, 24)])
def test_steps_agree_with_torch_up_to_its_bfloat16(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(*shape, generator=generator)
    mine, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    ours = Muon([mine], lr=0.05, weight_decay=0.1)
    reference = torch.optim.Muon([theirs], lr=0.05, weight_decay=0.1)
    for _ in range(5):
        gradient = torch.randn(*shape, generator=generator)
        mine.grad, theirs.grad = gradient.clone(), gradient.clone()
        ours.step()
        reference.step()
    moved = float((theirs.detach() - start).norm())
    assert float((mine - theirs).detach().norm()) < 0.02 * moved


def test_equal_shapes_in_one_batch_step_as_alone() -> None:
    generator = torch.Generator().manual_seed(2)
    weights = [torch.nn.Parameter(torch.randn(6, 9, generator=generator, dtype=torch.float64)) for _ in range(3)]
    alone = [torch.nn.Parameter(w.detach().clone()) for w in weights]
    together, single = Muon(weights), [Muon([w]) for w in alone]
    for w, a in zip(weights, alone, strict=True):
        w.grad = torch.randn(6, 9, generator=generator, dtype=torch.float64)
        a.grad = w.grad.clone()
    together.step()
    for optimiser in single:
        optimiser.step()
    for w, a in zip(weights, alone, strict=True):
        torch.testing.assert_close(w, a, rtol=0, atol=1e-12)


def test_anything_but_a_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match=r"matrices.*\(3,\)"):
        Muon([torch.nn.Parameter(torch.zeros(3))])
