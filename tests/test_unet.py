"""The network: its exact size, its shapes, its parts against their formulas, its conditions, and what it refuses."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import unet
from unet import (
    LEVELS,
    Attention,
    ResBlock,
    UNet,
    UNetConfig,
    count_parameters,
    default_multipliers,
    timestep_embedding,
)

SMALL = dict(width=16, multipliers=(1, 2), blocks=1, groups=4, head_width=8)


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """Draw every parameter anew: a fresh network outputs 0, whatever happens before its last convolution."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / max(1, p[0].numel()) ** 0.5)
    return module.eval()


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_reference_network_has_the_parameters_counted_by_hand():
    def linear(a, b):
        return a * b + b

    def conv(a, b):
        return 9 * a * b + b

    def block(a, b):
        return 2 * a + conv(a, b) + linear(256, 2 * b) + 2 * b + conv(b, b) + (a * b if a != b else 0)

    down = [(64, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512), (512, 512)]
    middle = [(512, 512), (512, 512)]
    up = [(512 + 512, 512), (512 + 512, 512), (512 + 256, 512), (512 + 256, 256), (256 + 256, 256), (256 + 128, 256),
          (256 + 128, 128), (128 + 128, 128), (128 + 64, 128), (128 + 64, 64), (64 + 64, 64), (64 + 64, 64)]
    attention = 2 * 512 + linear(512, 3 * 512) + linear(512, 512)
    total = (linear(64, 256) + linear(256, 256) + conv(3, 64) + sum(block(*widths) for widths in down + middle + up)
             + attention + 2 * 64 + conv(64, 3))
    assert total == 54_195_523
    assert count_parameters(UNet()) == total


def test_the_command_prints_a_table_that_adds_up(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["unet.py"])
    unet.main()
    lines = capsys.readouterr().out.splitlines()
    counts = [int(line.split()[-1].replace(",", "")) for line in lines[1:]]
    assert lines[-1].endswith(" 54,195,523") and sum(counts[:-1]) == counts[-1]


@pytest.mark.parametrize("size, parameters, gflop", [
    (64, 54_195_523, 18.0), (128, 54_866_115, 34.6), (256, 55_536_707, 101.0),
])
def test_the_network_of_each_size_costs_what_the_table_says(size, parameters, gflop):
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = UNet(UNetConfig(multipliers=LEVELS[size]))
        model(torch.zeros(1, 3, size, size), torch.zeros(1, dtype=torch.long))
    assert count_parameters(model) == parameters
    assert round(counter.get_total_flops() / 1e9, 1) == gflop
    assert size // model.config.size_multiple == 8  # the deepest level


def test_the_command_prints_the_network_of_a_size(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["unet.py", "--image_size", "256"])
    unet.main()
    table = capsys.readouterr().out
    assert "down 1       256 x 256" in table and "middle           8 x 8" in table and table.endswith(" 55,536,707\n")
    assert default_multipliers(32) == default_multipliers(96) == (1, 2, 4, 8)


@pytest.mark.parametrize("flags", [["--width", "33"], ["--image_size", "30"], ["--multipliers", "0"]])
def test_the_command_refuses_in_one_line(flags, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["unet.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        unet.main()
    assert stopped.value.code.startswith("error:") and "\n" not in stopped.value.code


@pytest.mark.parametrize("changes, shape", [
    (dict(), (2, 3, 16, 16)),
    (dict(), (1, 3, 6, 10)),  # not square, one level halved
    (dict(multipliers=(1,), head_width=16), (2, 3, 5, 5)),
    (dict(multipliers=(1, 1, 2, 2), blocks=2), (2, 3, 8, 8)),
    (dict(channels=4), (2, 4, 8, 8)),
])
def test_the_output_has_the_shape_of_the_image(changes, shape):
    config = UNetConfig(**{**SMALL, **changes})
    assert shape[2] % config.size_multiple == 0
    output = randomised(UNet(config))(noise(*shape), torch.arange(shape[0]))
    assert output.shape == shape and output.isfinite().all() and output.std() > 0


def test_a_fresh_network_outputs_zero():
    assert UNet(UNetConfig(**SMALL))(noise(2, 3, 8, 8), torch.tensor([0, 9])).count_nonzero() == 0


def test_an_image_depends_on_its_own_timestep_and_not_on_the_batch():
    model, x, t = randomised(UNet(UNetConfig(**SMALL))), noise(3, 3, 8, 8), torch.tensor([0, 400, 999])
    together = model(x, t)
    for i in range(3):
        torch.testing.assert_close(together[[i]], model(x[[i]], t[[i]]))
    assert (together - model(x, t.flip(0))).abs()[[0, 2]].max() > 0.01


def test_augment_labels_change_the_output_and_cost_no_parameter():
    model, x, t = randomised(UNet(UNetConfig(**SMALL))), noise(2, 3, 8, 8), torch.tensor([5, 900])
    plain = model(x, t)
    assert model(x, t, augment_labels=torch.zeros(2, 5)).equal(plain)
    outputs = [plain] + [model(x, t, augment_labels=sign * torch.eye(5)[[i, i]]) for i in range(5) for sign in (1, -1)]
    for i, a in enumerate(outputs):
        for b in outputs[:i]:
            assert (a - b).abs().max() > 1e-3  # the network can tell each augmentation from each other one
    sizes = {count_parameters(UNet(UNetConfig(**SMALL, augment_dim=dim))) for dim in (0, 5, 11)}
    assert len(sizes) == 1
    assert not any("augment" in name for name in model.state_dict())


def test_augment_waves_are_orthogonal_and_have_the_norm_of_the_timestep():
    waves = UNet(UNetConfig(**{**SMALL, "width": 64, "head_width": 64})).augment_waves
    torch.testing.assert_close(waves @ waves.T, 32 * torch.eye(5), rtol=0, atol=1e-4)
    norms = timestep_embedding(torch.arange(1000), 64).square().sum(1)
    torch.testing.assert_close(norms, torch.full((1000,), 32.0))


def test_timestep_embedding_is_cosines_then_sines():
    t = torch.tensor([0, 1, 17, 999])
    frequencies = torch.tensor([10000 ** (-i / 32) for i in range(32)], dtype=torch.float64)
    angles = t[:, None].double() * frequencies
    expected = torch.cat([angles.cos(), angles.sin()], dim=1).float()
    torch.testing.assert_close(timestep_embedding(t, 64), expected, rtol=0, atol=2e-4)  # float32 angles to 999


def test_attention_against_an_explicit_softmax():
    module, x = randomised(Attention(32, UNetConfig(groups=4, head_width=8))), noise(2, 32, 3, 5)
    flat = module.qkv(F.group_norm(x, 4, module.norm.weight, module.norm.bias)).flatten(2)  # [2, 96, 15]
    heads = []
    for first in range(0, 32, 8):
        q, k, v = (flat[:, part * 32 + first : part * 32 + first + 8] for part in range(3))
        scores = torch.einsum("bcq,bck->bqk", q, k) / 8**0.5
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        heads.append(torch.einsum("bqk,bck->bcq", weights, v))
    expected = x + module.out(torch.cat(heads, dim=1).view_as(x))
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("c_in", [8, 12])
def test_residual_block_scales_then_shifts(c_in):
    block, x, emb = randomised(ResBlock(c_in, 8, 10, UNetConfig(groups=4))), noise(2, c_in, 4, 4), noise(2, 10)
    h = F.conv2d(F.silu(F.group_norm(x, 4, block.norm_1.weight, block.norm_1.bias)),
                 block.conv_1.weight, block.conv_1.bias, padding=1)
    scale_shift = F.linear(emb, block.scale_shift.weight, block.scale_shift.bias)[:, :, None, None]
    h = F.group_norm(h, 4, block.norm_2.weight, block.norm_2.bias) * (1 + scale_shift[:, :8]) + scale_shift[:, 8:]
    h = F.conv2d(F.silu(h), block.conv_2.weight, block.conv_2.bias, padding=1)
    shortcut = x if c_in == 8 else F.conv2d(x, block.shortcut.weight)
    torch.testing.assert_close(block(x, emb), shortcut + h, rtol=1e-4, atol=1e-5)


def test_dropout_acts_in_training_only():
    model, x, t = randomised(UNet(UNetConfig(**SMALL, dropout=0.5))), noise(1, 3, 8, 8), torch.tensor([3])
    assert model(x, t).equal(model(x, t))
    model.train()
    assert not model(x, t).equal(model(x, t))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointing_gives_the_same_gradients_for_less_memory(dropout):
    model = randomised(UNet(UNetConfig(**SMALL, dropout=dropout, num_types=2))).train()
    x, t, labels = noise(4, 3, 16, 16), torch.tensor([3, 40, 500, 900]), torch.eye(2)[[0, 1, 0, 1]]
    results, memory = [], []
    for model.grad_checkpoint in (False, True):
        tensors = []  # held, so that no two of them have one address
        torch.manual_seed(0)  # of the dropout
        with saved_tensors_hooks(lambda tensor, kept=tensors: kept.append(tensor) or tensor, lambda tensor: tensor):
            output = model(x, t, labels, augment_labels=noise(4, 5))
        model.zero_grad()
        output.square().mean().backward()
        results.append([output, *(p.grad for p in model.parameters())])
        storages = {y.untyped_storage().data_ptr(): y.untyped_storage().nbytes() for y in tensors}
        memory.append(sum(storages.values()))
    assert all(ours.equal(theirs) for ours, theirs in zip(*results))
    assert memory[1] < memory[0] / 3
    with torch.no_grad():  # sampling is neither slower nor different
        assert model.eval()(x, t).equal(model(x, t))


def test_every_parameter_gets_a_gradient():
    model = randomised(UNet(UNetConfig(**SMALL)))
    model(noise(2, 3, 8, 8), torch.tensor([3, 800]), augment_labels=noise(2, 5)).square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert without == []


@pytest.mark.parametrize("wrong", [
    dict(width=0), dict(blocks=0), dict(channels=0), dict(groups=0), dict(head_width=0),
    dict(multipliers=(1, 0)), dict(multipliers=()), dict(multipliers=[]),
    dict(width=40), dict(width=15, groups=15, head_width=15), dict(head_width=60),
    dict(dropout=1.0), dict(dropout=-0.1),
])
def test_impossible_networks_are_refused(wrong):
    with pytest.raises(ValueError):
        UNetConfig(**wrong)


def network_of_three_classes() -> UNet:
    """Return a network of three classes whose output depends on each of its inputs."""
    torch.manual_seed(0)
    model = UNet(UNetConfig(width=8, multipliers=(1, 2), blocks=1, groups=4, num_types=3)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("blocks, more", [(1, 2), (2, 4), (2, 2)])
def test_a_deeper_network_takes_over_the_function_of_a_shallower_one(blocks, more):
    sizes = (SMALL | dict(blocks=number, num_types=2) for number in (blocks, more))
    shallow, deep = (randomised(UNet(UNetConfig(**size))) for size in sizes)
    deep.load_shallower(shallow)
    inputs = (noise(3, 3, 16, 16), torch.tensor([0, 5, 900]), torch.tensor([[1.0, 0], [0, 0], [1, 1]]))
    torch.testing.assert_close(deep(*inputs), shallow(*inputs))
    deep(*inputs).square().mean().backward()
    new = [block for level in (*deep.down, *deep.up) for block in level if not block.conv_2.weight.any()]
    assert len(new) == 2 * len(deep.down) * (more - blocks)
    assert all(block.conv_2.weight.grad.any() for block in new)


def test_classes_are_a_set_and_zeros_are_unconditional():
    model = network_of_three_classes()
    x, t = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.full((4,), 50)
    labels = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]])  # integers are accepted too
    with torch.no_grad():
        conditional, unconditional = model(x[:1].expand(4, -1, -1, -1), t, labels), model(x[:1], t[:1])
        assert torch.allclose(conditional[:1], unconditional, atol=1e-5)
        assert all((conditional[i] - conditional[j]).abs().max() > 1e-3 for i in range(4) for j in range(i))
        # The vectors of an image's classes are added up.
        emb = model.type_vectors(labels.float())
        assert torch.allclose(emb[3], emb[1] + emb[2]) and (emb[0] == 0).all()


def test_classes_cost_their_vectors_and_nothing_else():
    assert count_parameters(UNet(UNetConfig(num_types=18))) == 54_195_523 + 18 * 256
    with pytest.raises(ValueError, match="num_types"):
        UNetConfig(num_types=-1)


def test_an_unconditional_network_has_no_class_vectors():
    model = UNet(UNetConfig(width=8, multipliers=(1,), blocks=1, groups=4))
    assert not [name for name in model.state_dict() if "type" in name]
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    assert torch.equal(model(x, t, torch.zeros(2, 0)), model(x, t))


@pytest.mark.parametrize("num_types, columns", [(3, 2), (3, 4), (0, 3)])
def test_labels_of_another_number_of_classes_are_refused(num_types, columns):
    model = UNet(UNetConfig(**SMALL, num_types=num_types))
    with pytest.raises(ValueError, match=f"labels of {columns} classes for a network of {num_types}"):
        model(noise(1, 3, 8, 8), torch.tensor([5]), torch.zeros(1, columns))
