"""sample_seeds: an image is the same to the last bit whatever the batch around it."""

import pytest
import torch

from forward_diffusion import NoiseScheduler
from reverse_diffusion import SAMPLERS, sample, sample_seeds, seeded_noise, slerp
from unet import UNet, UNetConfig

CPU, SIZE = torch.device("cpu"), 8
SCHEDULER = NoiseScheduler(schedule="cosine")
SEEDS = list(range(40, 40 + 65))
TYPES = (torch.rand(65, 3, generator=torch.Generator().manual_seed(0)) < 0.5).float()


class Network(torch.nn.Module):
    """A small UNet of random weights, all of them (a fresh one answers 0), that takes types by a map of their own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.unet = UNet(UNetConfig(width=32, multipliers=(1, 2), blocks=1))
        self.of_types = torch.nn.Linear(3, 3)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.05)

    def forward(self, x_t, t, types=None):
        output = self.unet(x_t, t)
        return output if types is None else output + self.of_types(types)[:, :, None, None]


@pytest.fixture(scope="module")
def network():
    return Network().eval()


def draw(network, seeds, precision="fp32", **options):
    return sample_seeds(network, SCHEDULER, seeds, SIZE, CPU, precision, steps=3, prediction="v", **options)


@pytest.mark.parametrize("precision, guidance", [("fp32", None), ("fp32", 2.0), ("bf16", 2.0)])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_bit_is_the_same_in_any_batch(network, sampler, precision, guidance):
    """Batches of 1, 7, 64 and 65's lone last one, in another order too. Without the padding float32 fails here."""
    def images(which: list[int], batch_size: int) -> torch.Tensor:
        types = {} if guidance is None else dict(types=TYPES[which], guidance=guidance)
        seeds = [SEEDS[i] for i in which]
        return draw(network, seeds, precision, sampler=sampler, eta=0.5, batch_size=batch_size, **types)

    company = images(list(range(65)), 64)
    assert company.shape == (65, 3, SIZE, SIZE) and company.dtype == torch.float32
    assert company.isfinite().all() and company.std() > 0.05 and not company[0].equal(company[1])
    assert company[:14].equal(images(list(range(14)), 7))
    assert company[[64, 3]].equal(images([64, 3], 1))
    assert company[[9, 33, 64]].equal(images([9, 33, 64], 64))


def test_types_and_x_T_go_with_their_images(network):
    """Each image's own, across the boundaries of batches."""
    x_T = seeded_noise(range(9), (3, SIZE, SIZE))
    together = draw(network, SEEDS[:9], types=TYPES[:9], x_T=x_T, batch_size=4)
    for i in (0, 4, 8):
        alone = draw(network, SEEDS[i : i + 1], types=TYPES[i : i + 1], x_T=x_T[i : i + 1])
        assert alone[0].equal(together[i])
    assert not together[0].equal(draw(network, SEEDS[:1], x_T=x_T[:1])[0])
    assert not together[0].equal(draw(network, SEEDS[:1], types=TYPES[:1])[0])


def test_without_x_T_the_seeds_make_it(network):
    own = seeded_noise(SEEDS[:3], (3, SIZE, SIZE))
    assert draw(network, SEEDS[:3]).equal(draw(network, SEEDS[:3], x_T=own))
    assert not draw(network, SEEDS[:3], x_T=own).equal(draw(network, SEEDS[3:6], x_T=own))  # ddpm's steps draw as well
    ddim = dict(sampler="ddim", x_T=slerp(own[:1], own[1:2], 0.5))
    assert draw(network, [1], **ddim).equal(draw(network, [2], **ddim))


def test_a_padded_batch_is_not_another_result(network):
    """The same pictures as `sample` draws without padding, but for rounding."""
    seeds = SEEDS[:3]
    plain = sample(network, SCHEDULER, seeded_noise(seeds, (3, SIZE, SIZE)), seeds=seeds, steps=3, prediction="v",
                   types=TYPES[:3], guidance=2.0)
    torch.testing.assert_close(draw(network, seeds, types=TYPES[:3], guidance=2.0), plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("wrong, message", [
    (dict(types=TYPES[:2]), "2 rows of types for 3 seeds"),
    (dict(types=TYPES[:4], batch_size=1), "4 rows of types for 3 seeds"),
    (dict(x_T=torch.zeros(1, 3, SIZE, SIZE)), "1 rows of x_T for 3 seeds"),
])
def test_wrong_lengths_are_refused(network, wrong, message):
    with pytest.raises(ValueError) as error:
        draw(network, SEEDS[:3], **wrong)
    assert str(error.value) == message


def test_a_batch_too_large_for_the_memory_is_halved_until_it_fits(network, capsys):
    class Cramped(torch.nn.Module):
        def forward(self, x_t, t, *types):
            if len(x_t) > 16:  # with what they are padded to
                raise torch.OutOfMemoryError("CUDA out of memory")
            return network(x_t, t, *types)

    seeds = SEEDS[:50]
    assert draw(Cramped(), seeds, batch_size=50).equal(draw(network, seeds, batch_size=50))
    said = capsys.readouterr().out
    assert "50 images at a time; going on with 25" in said and "25 images at a time; going on with 12" in said
    Cramped.forward = lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        draw(Cramped(), seeds)
