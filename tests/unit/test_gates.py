"""Gates: exact at 1 and 0, no trace when detached, the right gradient, alive in bf16."""

import copy

import pytest
import torch

from tests.models import logits, tiny_model, tokens
from tsp.decoder import find_decoder
from tsp.gates import Gates
from tsp.losses import lm_loss

FAMILIES = ["llama", "opt", "gpt2", "gpt_neo", "bloom", "gemma2"]
PLACEMENTS = ["residual", "output"]


def decoder_of(family="llama", dtype=torch.float32, **changes):
    return find_decoder(tiny_model(family, **changes).to(dtype))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_gates_at_one_are_the_dense_model_bit_for_bit(family, dtype, placement):
    decoder = decoder_of(family, dtype)
    dense = logits(decoder.model, tokens())
    with Gates(decoder, placement).attached():
        assert torch.equal(logits(decoder.model, tokens()), dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_residual_gate_at_zero_is_a_bypassed_layer_bit_for_bit(family, dtype):
    decoder = decoder_of(family, dtype)
    with decoder.bypassing([1, 3]):
        bypassed = logits(decoder.model, tokens())
    gates = Gates(decoder, "residual")
    gates.values[[1, 3]] = 0
    with gates.attached():
        assert torch.equal(logits(decoder.model, tokens()), bypassed)


def test_an_output_gate_at_zero_emits_nothing():
    decoder = decoder_of()
    gates, seen = Gates(decoder, "output"), []
    gates.values[2] = 0
    handle = decoder.layers[3].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with gates.attached():
        logits(decoder.model, tokens())
    handle.remove()
    assert seen[0].abs().max() == 0


@pytest.mark.parametrize("family", ["llama", "bloom"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_detached_gates_leave_no_trace(family, dtype):
    decoder = decoder_of(family, dtype)
    model = decoder.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dense, attributes = logits(model, tokens()), [set(vars(module)) for module in model.modules()]
    gates = Gates(decoder, recorded=[1, 2])
    gates.values.fill_(0.5)
    with gates.attached():
        assert list(model.state_dict()) == list(before)
        assert not torch.equal(logits(model, tokens()), dense)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(logits(model, tokens()), dense)
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert all(not module._forward_hooks for module in model.modules())
    assert not gates.gaps


def test_gates_are_detached_also_by_an_error():
    decoder = decoder_of()
    with pytest.raises(RuntimeError), Gates(decoder).attached():
        raise RuntimeError
    assert all(not layer._forward_hooks for layer in decoder.layers)


# GPT-2 computes in fp64 throughout; Llama's norm goes down to fp32 inside, so its difference must be coarser.
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(("family", "epsilon", "tolerance"), [("gpt2", 1e-6, 1e-6), ("llama", 3e-3, 1e-2)])
def test_gradient_equals_a_finite_difference(family, epsilon, tolerance, placement, monkeypatch):
    # Our own product is in fp32 whatever the model's dtype; here it is in fp64.
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    decoder = decoder_of(family, torch.float64)
    gates, ids = Gates(decoder, placement), tokens(4, 16)
    start = torch.linspace(0.4, 1.1, decoder.num_layers, dtype=torch.float64)
    gates.values = start.clone().requires_grad_(True)
    with gates.attached():
        lm_loss(decoder.model(input_ids=ids, use_cache=False).logits, ids).backward()
        gradient = gates.values.grad
        differences = []
        for index in range(decoder.num_layers):
            losses = []
            for sign in (1, -1):
                gates.values = start.clone()
                gates.values[index] += sign * epsilon
                losses.append(lm_loss(logits(decoder.model, ids), ids).item())
            differences.append((losses[0] - losses[1]) / (2 * epsilon))
    scale = gradient.abs().max().item()
    assert gradient.tolist() == pytest.approx(differences, rel=tolerance, abs=tolerance * scale)
    assert (gradient[:-1].abs() > 1e-3 * scale).all()


def test_the_last_output_gate_gets_no_gradient_as_the_final_norm_undoes_it():
    """The known trouble with the paper's placement in a pre-norm stack (method.md, section 2)."""
    decoder, ids = decoder_of(), tokens()
    gradients = {}
    for placement in PLACEMENTS:
        gates = Gates(decoder, placement)
        gates.values.requires_grad_(True)
        with gates.attached():
            lm_loss(decoder.model(input_ids=ids, use_cache=False).logits, ids).backward()
        gradients[placement] = gates.values.grad.abs()
    assert gradients["output"][-1] < 1e-5 * gradients["output"].max()
    assert gradients["residual"][-1] > 1e-3 * gradients["residual"].max()


@pytest.mark.parametrize(
    ("dtype", "placement", "value"),
    [
        (torch.float32, "residual", 0.999),
        (torch.float32, "output", 0.999),
        (torch.bfloat16, "residual", 0.999),
        # g * x in bf16 *is* x for 1 - g < 1/512, however it is computed: the emitted state has no digit for it.
        (torch.bfloat16, "output", 0.995),
    ],
)
def test_a_small_change_of_the_gates_changes_the_loss_and_has_a_gradient(dtype, placement, value):
    """Trap (d): a gate rounded to bf16 hides every change below 1/512, and its gradient would be lost with it."""
    decoder, ids = decoder_of(dtype=dtype), tokens(8, 24)
    gates = Gates(decoder, placement)
    assert gates.values.dtype == torch.float32
    losses, gradients = [], []
    for start in (1.0, 0.999, value):
        gates.values = torch.full((decoder.num_layers,), start, requires_grad=True)
        with gates.attached():
            loss = lm_loss(decoder.model(input_ids=ids, use_cache=False).logits, ids)
            loss.backward()
        losses.append(loss.item())
        gradients.append(gates.values.grad)
        assert torch.isfinite(gates.values.grad).all()
        assert (gates.values.grad[:-1] != 0).all()
    assert losses[0] != losses[2]
    assert gradients[0].dtype == torch.float32


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_product_is_made_in_fp32(placement):
    """In bf16 the gate 0.7013 would be 0.7031 and every product off by a quarter of a percent."""
    decoder, seen = decoder_of(dtype=torch.bfloat16), {}
    decoder.layers[2].register_forward_hook(lambda module, args, output: seen.update(x_in=args[0], x_out=output))
    decoder.layers[3].register_forward_pre_hook(lambda module, args: seen.update(emitted=args[0]))
    gates = Gates(decoder, placement)
    gates.values[2] = 0.7013
    with gates.attached():
        logits(decoder.model, tokens())
    x_in, x_out, emitted = (seen[name].double() for name in ("x_in", "x_out", "emitted"))
    expected = 0.7013 * x_out if placement == "output" else x_in + 0.7013 * (x_out - x_in)
    assert (emitted == expected.bfloat16().double()).double().mean() > 0.99


def test_the_gradient_in_bf16_points_as_in_fp32():
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        decoder, ids = decoder_of(dtype=dtype), tokens(8, 24)
        gates = Gates(decoder)
        gates.values.requires_grad_(True)
        with gates.attached():
            lm_loss(decoder.model(input_ids=ids, use_cache=False).logits, ids).backward()
        gradients.append(gates.values.grad)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.95


@pytest.mark.parametrize("value", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_recorded_gap_is_emitted_minus_received(placement, value):
    decoder = decoder_of("bloom")
    gates = Gates(decoder, placement, gated=[2], recorded=[2, 4])
    gates.values.fill_(value)
    seen = {}
    for index in (2, 3):  # the input of layer 3 is what layer 2 emitted
        decoder.layers[index].register_forward_pre_hook(
            lambda module, args, index=index: seen.__setitem__(index, args[0])
        )
    with gates.attached():
        logits(decoder.model, tokens())
        assert set(gates.gaps) == {2, 4}
        assert torch.equal(gates.gaps[2], seen[3] - seen[2])
        assert gates.gaps[4].abs().max() > 0, "recorded, not gated: its gate is not read"
    if placement == "residual" and value == 0:
        assert torch.equal(seen[3], seen[2])


def test_gap_carries_the_gradient_to_the_layer_and_the_gate():
    decoder = decoder_of()
    weight = decoder.layers[1].mlp.down_proj.weight.requires_grad_(True)
    gates = Gates(decoder, recorded=[1])
    gates.values.requires_grad_(True)
    with gates.attached():
        decoder.model(input_ids=tokens(), use_cache=False)
        gates.gaps[1].square().sum().backward()
    assert weight.grad.abs().max() > 0
    assert gates.values.grad[1] != 0


def test_gated_names_the_layers_that_are_multiplied():
    decoder = decoder_of()
    dense = logits(decoder.model, tokens())
    gates = Gates(decoder, gated=[2])
    gates.values.fill_(0.0)
    gates.values[2] = 1.0
    with gates.attached():
        assert torch.equal(logits(decoder.model, tokens()), dense)


def test_opened_gates_are_the_dense_model_for_a_while():
    decoder = decoder_of()
    dense = logits(decoder.model, tokens())
    gates = Gates(decoder, "output", recorded=[0])
    gates.values.fill_(0.7)
    with gates.attached():
        with gates.opened():
            assert torch.equal(logits(decoder.model, tokens()), dense)
            assert not gates.gaps, "nothing is recorded"
        assert not torch.equal(logits(decoder.model, tokens()), dense)
        assert set(gates.gaps) == {0}


def test_a_bypassed_layer_has_no_gate_and_reads_as_zero():
    decoder = decoder_of()
    gates = Gates(decoder, "output", recorded=[1])
    gates.values.fill_(0.9).requires_grad_(True)
    with gates.attached(), decoder.bypassing([1]):
        lm_loss(decoder.model(input_ids=tokens(), use_cache=False).logits, tokens()).backward()
        assert not gates.gaps
        assert gates.readable() == [pytest.approx(0.9), 0.0, *[pytest.approx(0.9)] * 3]
    assert gates.values.grad[1] == 0


def test_all_ones_need_no_second_model():
    """A deep copy made before attaching computes the same: the hooks hold no state of the model."""
    decoder = decoder_of()
    twin = copy.deepcopy(decoder.model)
    with Gates(decoder).attached():
        assert torch.equal(logits(decoder.model, tokens()), logits(twin, tokens()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_has_the_gradient_of_torchs_lerp_and_keeps_no_fp32_copies(dtype):
    torch.manual_seed(0)
    x_in, x_out = (torch.randn(3, 5, 8).to(dtype).requires_grad_(True) for _ in range(2))
    gate, kept = torch.tensor(0.3, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        emitted = Gates(decoder_of())._gate(x_in, x_out, gate)
    assert [one.dtype for one in kept if one.dim()] == [dtype, dtype]
    plain = torch.lerp(x_in.float(), x_out.float(), gate).to(dtype)
    slope = torch.randn(3, 5, 8).to(dtype)
    assert torch.equal(emitted, plain)
    for found, expected in zip(
        torch.autograd.grad(emitted, (x_in, x_out, gate), slope),
        torch.autograd.grad(plain, (x_in, x_out, gate), slope),
        strict=True,
    ):
        assert torch.equal(found, expected)
