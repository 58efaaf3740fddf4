"""The losses in chunks are those of torch's own functions, and so are their gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models import VOCABULARY, distillation_loss, tiny_model, tokens
from tsp import losses
from tsp.losses import hidden_loss, lm_loss, task_loss
from tsp.targets import marked, share

B, T, V = 3, 7, 13


@pytest.fixture(params=[1, 5 * V, 2**20], ids=["a row a chunk", "five rows", "one chunk"])
def chunks(request, monkeypatch):
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", {"cpu": request.param})


def pair(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(2, B, T, V, generator=generator)).to(dtype).unbind()
    return student.requires_grad_(True), teacher, torch.randint(V, (B, T), generator=generator)


def plain(student, teacher, ids, weights, temperature):
    """By torch's functions and autograd: cross-entropy, distance, their weighted sum."""
    lm = F.cross_entropy(student[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    distance = distillation_loss(student, teacher, temperature)
    return lm, distance, weights[0] * lm + weights[1] * distance


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.1, 1.0)])
def test_losses_and_gradient_are_those_of_autograd(weights, temperature):
    student, teacher, ids = pair()
    lm, distance, total = plain(student, teacher, ids, weights, temperature)
    [wanted] = torch.autograd.grad(3 * total, student)
    ours = task_loss(student, ids, lm=weights[0], distill=weights[1], teacher_BTV=teacher, temperature=temperature)
    torch.testing.assert_close(torch.stack(ours), torch.stack([total, lm, distance]), rtol=1e-5, atol=1e-6)
    (3 * ours.total).backward()
    torch.testing.assert_close(student.grad, wanted, rtol=1e-4, atol=1e-7)
    assert not ours.lm.requires_grad
    assert not ours.distill.requires_grad


@pytest.mark.usefixtures("chunks")
def test_only_positions_count_whose_next_token_does():
    student, teacher, ids = pair()
    counts = torch.rand(B, T, generator=torch.Generator().manual_seed(1)) < 0.5
    chosen = marked(ids, counts)
    kept = counts[:, 1:]
    rows, aims, dense = student[:, :-1][kept], ids[:, 1:][kept], teacher[:, :-1][kept]
    distance = kl_divergence(Categorical(logits=dense), Categorical(logits=rows)).mean()
    wanted = 0.5 * F.cross_entropy(rows, aims) + 2 * distance
    [gradient] = torch.autograd.grad(wanted, student)
    ours = task_loss(student, chosen, share(chosen), lm=0.5, distill=2.0, teacher_BTV=teacher)
    assert ours.total.item() == pytest.approx(wanted.item(), rel=1e-5)
    ours.total.backward()
    torch.testing.assert_close(student.grad, gradient, rtol=1e-4, atol=1e-7)


def test_in_bf16_only_the_gradient_is_rounded():
    student, teacher, ids = pair(torch.bfloat16)
    exact, dense = student.detach().float().requires_grad_(True), teacher.float()
    ours = task_loss(student, ids, lm=0.1, distill=1.0, teacher_BTV=teacher)
    wanted = task_loss(exact, ids, lm=0.1, distill=1.0, teacher_BTV=dense)
    assert ours.total.item() == pytest.approx(wanted.total.item(), rel=1e-6)
    ours.total.backward()
    wanted.total.backward()
    assert student.grad.dtype == torch.bfloat16
    torch.testing.assert_close(student.grad, exact.grad.bfloat16())


def states(dtype=torch.float32):
    """Of a model of four layers that learns, and of the dense one, whose tokens are of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    ours, dense = torch.randn(2, 5, B, T, V, generator=generator).unbind()
    dense = dense * torch.logspace(-2, 2, T).unsqueeze(-1)
    return [h.to(dtype).requires_grad_(True) for h in ours + dense], list(dense.to(dtype))


def test_hidden_states_are_compared_by_token_where_a_kept_layer_or_the_norm_gets_them():
    ours, dense = states()
    ratios = [
        (torch.linalg.vector_norm(ours[k] - dense[k], dim=-1) / torch.linalg.vector_norm(dense[k], dim=-1)) ** 2
        for k in (1, 3, 4)
    ]
    wanted = 3 * torch.stack(ratios).mean()
    gradients = torch.autograd.grad(wanted, [ours[k] for k in (1, 3, 4)])
    found = 3 * hidden_loss(ours, dense, doomed=[2])
    assert len(dense) == 1, "the others are let go"
    torch.testing.assert_close(found, wanted)
    found.backward()
    assert ours[0].grad is ours[2].grad is None
    for place, gradient in zip((1, 3, 4), gradients, strict=True):
        torch.testing.assert_close(ours[place].grad, gradient)


def test_hidden_states_of_parts_of_a_batch_are_on_average_those_of_the_batch():
    ours, dense = states()
    parts = [hidden_loss([h[b : b + 1] for h in ours], [h[b : b + 1] for h in dense], ()) for b in range(B)]
    torch.testing.assert_close(torch.stack(parts).mean(), hidden_loss(ours, dense, ()))


def test_hidden_states_in_bf16_have_a_distance_in_fp32():
    ours, dense = states(torch.bfloat16)
    exact = [h.detach().float().requires_grad_(True) for h in ours]
    found, wanted = hidden_loss(ours, list(dense), ()), hidden_loss(exact, [h.float() for h in dense], ())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted)
    found.backward()
    wanted.backward()
    torch.testing.assert_close(ours[1].grad, exact[1].grad.bfloat16())


def test_hidden_states_of_a_token_that_are_all_zero_give_numbers():
    loss = hidden_loss([torch.zeros(1, 1, 4, requires_grad=True)] * 2, [torch.zeros(1, 1, 4)] * 2, ())
    assert loss.item() == 0


def test_lm_loss_is_that_of_transformers():
    model, ids = tiny_model(num_layers=1), tokens(3, 9)
    with torch.no_grad():
        theirs = model(input_ids=ids, labels=ids, use_cache=False)
    assert lm_loss(theirs.logits, ids).item() == pytest.approx(theirs.loss.item(), rel=1e-6)


def test_lm_loss_of_uniform_logits_is_log_of_the_vocabulary():
    assert lm_loss(torch.zeros(2, 5, VOCABULARY), tokens(2, 5)).item() == pytest.approx(math.log(VOCABULARY))


def test_the_distance_of_equal_logits_is_zero_with_zero_gradient():
    _, teacher, ids = pair()
    # A shift of all logits of a token is no difference.
    student = (teacher + 3).requires_grad_(True)
    loss = task_loss(student, ids, distill=1.0, teacher_BTV=teacher).total
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert student.grad.abs().max() < 1e-6


def test_the_teacher_gets_no_gradient():
    student, teacher, ids = pair()
    teacher.requires_grad_(True)
    task_loss(student, ids, distill=1.0, teacher_BTV=teacher).total.backward()
    assert student.grad.abs().max() > 0
    assert teacher.grad is None


def test_beside_logits_and_gradient_there_is_only_a_chunk(monkeypatch):
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", {"cpu": 2 * V})
    student, teacher, ids = pair()
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.untyped_storage().nbytes() > 4 * 2 * V:
                sizes.append((str(function), made.untyped_storage().data_ptr()))
            return made

    with Watch():
        loss = task_loss(student, ids, lm=0.1, distill=1.0, teacher_BTV=teacher).total
        loss.backward()
    new = {place for _, place in sizes} - {student.untyped_storage().data_ptr(), teacher.untyped_storage().data_ptr()}
    assert len(new - {ids.untyped_storage().data_ptr()}) <= 3, "the gradient, and the targets, which are small"
