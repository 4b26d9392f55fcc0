import copy
import warnings

import pytest
import torch
from torch import Tensor

from models.mmdit import MMDiT, MMDiTConfig
from tests.models.mmdit_golden import TINY_V1, fill_by_rule, golden_network, relative_error, seeded

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _inputs() -> Inputs:
    config = TINY_V1
    return (
        seeded("latent", (2, config.latent_len, config.latent_dim)),
        seeded("clip", (2, config.clip_len, config.clip_dim)),
        seeded("sync", (2, config.sync_len, config.sync_dim)),
        seeded("text", (2, config.text_len, config.text_dim)),
        torch.tensor([0.1, 0.9]),
    )


def _step(network: MMDiT) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of two samples and every gradient."""
    network.zero_grad()
    losses = network(*_inputs()).square().mean(dim=(1, 2))
    losses.mean().backward()
    return losses.tolist(), {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def _same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_checkpointed_blocks_run_twice_in_training_alone_and_change_no_bit() -> None:
    network = golden_network().train()
    calls: list[int] = []
    network.get_submodule("fused_blocks.0.ffn").register_forward_pre_hook(lambda *_: calls.append(1))
    losses, gradients = _step(network)
    assert len(calls) == 1
    network.checkpoint_activations = True
    again, recomputed = _step(network)
    assert len(calls) == 3
    assert again == losses
    assert _same_bits(recomputed, gradients)
    _step(network.eval())
    with torch.no_grad():
        network.train()(*_inputs())
    assert len(calls) == 5


def test_checkpointing_keeps_less_than_half_of_the_activations_for_backward() -> None:
    network, kept = golden_network().train(), []
    for network.checkpoint_activations in (False, True):
        sizes: dict[int, int] = {}

        def note(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = network(*_inputs())
        kept.append(sum(size for pointer, size in sizes.items() if pointer not in weights))
        assert output.requires_grad
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("checkpointed", [False, True])
def test_blocks_that_cannot_be_compiled_say_so_once_and_run_as_they_are(checkpointed: bool) -> None:
    def no_compiler(*_: object) -> object:
        raise OSError("no C++ compiler\nand a long explanation")

    network = golden_network().train()
    losses, gradients = _step(network)
    network.checkpoint_activations = checkpointed
    network.compile_blocks(backend=no_compiler)
    with pytest.warns(RuntimeWarning, match="^blocks run uncompiled, .*no C.. compiler and a long") as warned:
        uncompiled_losses, uncompiled = _step(network)
    assert len(warned) == 1
    assert "\n" not in str(warned[0].message)
    assert uncompiled_losses == losses
    assert _same_bits(uncompiled, gradients)
    with warnings.catch_warnings(action="error"):
        _step(network)


def test_a_fault_inside_a_compiled_block_is_raised_and_not_blamed_on_the_compiler() -> None:
    network = golden_network()
    network.compile_blocks(backend="eager")

    def fail(*_: object) -> None:
        raise ArithmeticError("ours")

    network.get_submodule("fused_blocks.0.ffn").register_forward_pre_hook(fail)
    with warnings.catch_warnings(action="error", category=RuntimeWarning), pytest.raises(ArithmeticError, match="ours"):
        network(*_inputs())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_blocks_give_the_same_losses_gradients_and_names(checkpointed: bool) -> None:
    network = golden_network().train()
    losses, gradients = _step(network)
    names = list(network.state_dict())
    network.checkpoint_activations = checkpointed
    network.compile_blocks(backend="eager")
    with warnings.catch_warnings(action="error", category=RuntimeWarning):
        compiled_losses, compiled = _step(network)
    assert compiled_losses == pytest.approx(losses, rel=1e-5)
    assert max(relative_error(compiled[name], gradient) for name, gradient in gradients.items()) < 1e-3
    assert list(network.state_dict()) == names
    twin = copy.deepcopy(network)
    with torch.no_grad():
        twin.get_parameter("fused_blocks.0.attn.qkv.weight").mul_(2)
    assert _step(twin)[0] != pytest.approx(losses, rel=1e-5)  # a copy runs on weights of its own
    assert _step(network)[0] == compiled_losses


@pytest.mark.slow
def test_the_real_compiler_gives_the_same_loss_and_gradients() -> None:
    network = MMDiT(MMDiTConfig(**vars(TINY_V1) | {"depth": 2, "fused_depth": 1}))
    fill_by_rule(network)
    losses, gradients = _step(network)
    network.compile_blocks()
    with warnings.catch_warnings(action="error", category=RuntimeWarning):
        compiled_losses, compiled = _step(network)
    assert compiled_losses == pytest.approx(losses, rel=1e-5)
    assert max(relative_error(compiled[name], gradient) for name, gradient in gradients.items()) < 1e-3
