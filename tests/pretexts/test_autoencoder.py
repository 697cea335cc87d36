"""Autoencoders: losses against formulas, corruption, posterior collapse, and refusals."""

import pytest
import torch
from torch.distributions import Normal
from torch.distributions import kl_divergence as reference_kl

from sslrun.backbones import build_backbone
from sslrun.data.examples import Batch, TensorExamples
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.pretexts.autoencoder import Autoencoder, Noise, kl_divergence

SIDE = 16


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def build(backbone="resnet18", side=SIDE, **options):
    torch.manual_seed(0)
    shape = {"channels": 8, "stem": "small"} if backbone == "resnet18" else {"width": 64}
    built = build_backbone(backbone, shape, ImageSpec(side))
    defaults = {"channels": 32, "augmentation": {}}
    return Autoencoder(Autoencoder.Options(**{**defaults, **options}), built)


def disks(count=256, side=SIDE, radius=3.0):
    """White disks at random places on black: two numbers describe an image."""
    centers = radius + torch.rand(count, 2, 1, 1, generator=seeded()) * (side - 2 * radius)
    place = torch.arange(side) + 0.5
    distance = ((place[:, None] - centers[:, 0]) ** 2 + (place - centers[:, 1]) ** 2).sqrt()
    return (radius + 0.5 - distance).clamp(0, 1)[:, None].expand(-1, 3, -1, -1).contiguous()


def examples(images):
    return TensorExamples(images, None, (), ImageSpec(images.shape[-1]))


def train(pretext, images, steps, lr=0.003, batch=32):
    optimizer = torch.optim.Adam(pretext.parameters(), lr=lr)
    generator = seeded(1)
    for _ in range(steps):
        chosen = images[torch.randint(len(images), (batch,), generator=generator)]
        pretext(pretext.views(Batch(chosen, None), generator)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return pretext.eval()


@torch.no_grad()
def record(pretext, images):
    metrics = pretext.held_out(Batch(images, None), seeded())
    return {name: value.item() for name, value in metrics.items()}


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_the_plain_loss_is_a_mean_over_values(likelihood):
    images, pretext = disks(5), build(likelihood=likelihood).eval()
    outputs = pretext.decoder(pretext.backbone(images).pooled)
    if likelihood == "gaussian":
        naive = sum(((outputs[i] - images[i]) ** 2).mean() for i in range(5)) / 5
    else:
        p = outputs.sigmoid().double()
        naive = -(images * p.log() + (1 - images) * (1 - p).log()).mean()
    loss = pretext(pretext.views(Batch(images, None), seeded())).loss
    assert loss.item() == pytest.approx(naive.item(), rel=1e-5)


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_the_variational_loss_is_a_sum_over_values_and_dimensions(likelihood):
    images = disks(5)
    pretext = build(latent=6, beta=2.5, likelihood=likelihood).eval()
    views = pretext.views(Batch(images, None), seeded())
    mean, log_variance = pretext.to_code(pretext.backbone(images).pooled).chunk(2, dim=1)
    deviation = (0.5 * log_variance).exp()
    outputs = pretext.decoder(mean + deviation * views.noise)
    if likelihood == "gaussian":
        constant = 0.5 * torch.tensor(2 * torch.pi).log() * images[0].numel()
        nll = -Normal(outputs, 1.0).log_prob(images).sum() / 5 - constant
    else:
        nll = -torch.distributions.Bernoulli(logits=outputs, validate_args=False).log_prob(images)
        nll = nll.sum() / 5
    kl = reference_kl(Normal(mean, deviation), Normal(0.0, 1.0)).sum() / 5
    output = pretext(views)
    assert output.loss.item() == pytest.approx((nll + 2.5 * kl).item(), rel=1e-5)
    assert output.metrics["kl"].item() == pytest.approx(kl.item(), rel=1e-5)


def test_kl_equals_torchs():
    mean, log_variance = torch.randn(2, 7, 5, generator=seeded(), dtype=torch.float64)
    reference = reference_kl(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).sum(dim=1)
    torch.testing.assert_close(kl_divergence(mean, log_variance), reference, atol=1e-6, rtol=0)


def test_without_beta_and_variance_it_is_the_autoencoder():
    images = disks(5)
    plain, variational = build(latent=6).eval(), build(latent=6, beta=0.0).eval()
    with torch.no_grad():
        variational.backbone.load_state_dict(plain.backbone.state_dict())
        variational.decoder.load_state_dict(plain.decoder.state_dict())
        variational.to_code.weight.zero_()
        variational.to_code.weight[:6] = plain.to_code.weight
        variational.to_code.bias[:6] = plain.to_code.bias
        variational.to_code.bias[6:] = -80.0
    losses = [
        pretext(pretext.views(Batch(images, None), seeded())).loss.item()
        for pretext in (plain, variational)
    ]
    # Half of the sum against the mean.
    assert losses[1] == pytest.approx(losses[0] * images[0].numel() / 2, rel=1e-5)


def test_kl_gives_the_decoder_no_gradient():
    images = disks(5)
    gradients = []
    for beta in (0.0, 10.0):
        pretext = build(latent=6, beta=beta)
        pretext(pretext.views(Batch(images, None), seeded())).loss.backward()
        gradients.append([parameter.grad for parameter in pretext.decoder.parameters()])
        encoder = pretext.to_code.weight.grad
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert encoder.any()


# ---------------------------------------------------------------- corruption


@pytest.mark.parametrize("kind", ["mask", "salt", "gaussian"])
def test_no_noise_is_the_plain_loss_bit_for_bit(kind):
    images = disks(5)
    losses = []
    for noise in ({}, {"kind": kind, "amount": 0}):
        pretext = build(noise=noise, augmentation={"flip": 0.5, "crop": [0.5, 1.0]})
        losses.append(pretext(pretext.views(Batch(images, None), seeded())).loss)
    assert torch.equal(*losses)


@pytest.mark.parametrize("amount", [0.1, 0.25, 0.4])
def test_the_share_of_corrupted_pixels_is_the_amount(amount):
    images = torch.full((50, 3, SIDE, SIDE), 0.5)
    count = 50 * SIDE**2
    deviation = (amount * (1 - amount) / count) ** 0.5
    for kind in ("mask", "salt"):
        noisy = Noise(kind=kind, amount=amount)(images, seeded())
        changed = (noisy != images)[:, 0]
        assert abs(changed.float().mean().item() - amount) < 3 * deviation
        assert torch.equal(noisy[:, 0], noisy[:, 1])
        values = noisy[:, 0][changed].unique().tolist()
        assert values == ([0.0] if kind == "mask" else [0.0, 1.0])
    whites = (noisy == 1).float().mean() / (noisy != images).float().mean()
    assert whites == pytest.approx(0.5, abs=0.05)
    added = Noise(kind="gaussian", amount=amount)(images, seeded()) - images
    assert added.std().item() == pytest.approx(amount, rel=0.02)
    assert abs(added.mean().item()) < 4 * amount / added.numel() ** 0.5


def test_the_target_of_denoising_is_clean():
    images = disks(5)
    pretext = build(noise={"kind": "mask", "amount": 0.4})
    views = pretext.views(Batch(images, None), seeded())
    assert torch.equal(views.targets, images)
    assert not torch.equal(views.inputs, images)
    drawn = pretext.eval().pictures(Batch(images, None), seeded())
    assert list(drawn) == ["original", "corrupted", "reconstruction"]


# ---------------------------------------------------------------- training and records


def test_the_floor_is_the_error_of_the_mean_image():
    images = disks(100)
    mean = images.mean(dim=0)
    naive = ((images - mean) ** 2).mean().item()
    assert build().floor(examples(images)) == pytest.approx(naive, rel=1e-5)


@pytest.mark.parametrize("noise", [{}, {"kind": "mask", "amount": 0.25}])
def test_it_learns_to_reconstruct(noise):
    images, pretext = disks(), build("mlp", channels=16, noise=noise)
    train(pretext, images, 120)
    assert record(pretext, images)["held_out_loss"] < 0.5 * pretext.floor(examples(images))


def test_a_small_beta_keeps_all_units_and_a_large_one_collapses():
    images = disks()
    good = train(build("mlp", channels=16, latent=4, beta=0.1), images, 160)
    found = record(good, images)
    assert found["held_out_loss"] < 0.5 * good.floor(examples(images))
    assert found["active_units"] == 4
    assert good.diagnose(found) is None
    collapsed = train(build("mlp", channels=16, latent=4, beta=30.0), images, 60)
    found = record(collapsed, images)
    assert found["active_units"] == 0
    assert found["held_out_loss"] > 0.9 * collapsed.floor(examples(images))
    assert collapsed.diagnose(found).startswith("posterior collapse")
    assert "pretext.beta (30)" in collapsed.diagnose(found)


def test_pictures_of_a_variational_autoencoder_have_samples_of_the_prior():
    images = disks(3)
    drawn = (
        build(latent=4, beta=1.0, likelihood="bernoulli")
        .eval()
        .pictures(Batch(images, None), seeded())
    )
    assert list(drawn) == ["original", "reconstruction", "from the prior"]
    for column in drawn.values():
        assert column.shape == images.shape
        assert 0 <= column.min() <= column.max() <= 1


@pytest.mark.parametrize("side", [7, 24, 33])
def test_reconstructions_have_the_side_of_the_images(side):
    pretext = build("mlp", side)
    assert pretext.decoder(torch.randn(2, pretext.backbone.width)).shape == (2, 3, side, side)


# ---------------------------------------------------------------- refusals


def test_values_outside_0_to_1_have_no_bernoulli_likelihood():
    pretext = build(likelihood="bernoulli")
    pretext.fit(examples(disks(20)))
    pretext.fit(examples((disks(20) * 255).byte()))
    with pytest.raises(UserError, match=r"values from 0 to 2: set likelihood: gaussian"):
        pretext.fit(examples(2 * disks(20)))
    build().fit(examples(2 * disks(20)))


def test_a_code_as_large_as_the_image_is_an_error():
    with pytest.raises(UserError, match=r"pretext.latent: a code of 768 .* set latent: 48 or less"):
        build(latent=3 * SIDE**2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": 1.0}, "beta needs latent"),
        ({"noise": {"amount": 0.2}}, "amount needs a kind"),
        ({"noise": {"kind": "mask", "amount": 1.5}}, "not a share of the pixels"),
    ],
)
def test_options_that_contradict_each_other_are_errors(options, words):
    with pytest.raises(ValueError, match=words):
        Autoencoder.Options(**options)
