"""Classes of clips: features of frames joined over time, and augmentation that a clip shares."""

import pytest
import torch

from sslrun.backbones import build_backbone
from sslrun.backbones.base import Features
from sslrun.data.examples import Batch
from sslrun.data.image.augment import Augmentation
from sslrun.data.specs import ImageSpec, VideoSpec
from sslrun.errors import UserError
from sslrun.protocols.base import unsupported
from sslrun.tasks.base import TaskLearner
from sslrun.tasks.clips import Clips

CLASSES = ("still", "moving")


def task(frames=3, size=8, **options):
    return Clips(Clips.Options(**options), VideoSpec(size, frames), CLASSES)


def clips(count=6, frames=3, size=8):
    generator = torch.Generator().manual_seed(1)
    shape = (count, frames, 3, size, size)
    inputs = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return Batch(inputs, torch.arange(count) % 2)


def test_features_of_frames_are_averaged_or_put_side_by_side():
    pooled, tokens = torch.randn(6, 5), torch.randn(6, 4, 5)
    mean = task().join(Features(pooled, tokens))
    torch.testing.assert_close(mean.pooled, pooled.view(2, 3, 5).mean(dim=1))
    assert torch.equal(mean.tokens[1, 4:8], tokens[4])
    side_by_side = task(pool="concat").join(Features(pooled))
    assert torch.equal(side_by_side.pooled[1], torch.cat([pooled[3], pooled[4], pooled[5]]))


def test_only_concatenation_sees_the_order_of_frames():
    backbone = build_backbone("mlp", {"width": 6, "depth": 1}, ImageSpec(8)).eval()
    forward = clips()
    backward = Batch(forward.inputs.flip(1), None)
    vectors = {}
    for pool in ("mean", "concat"):
        chosen = task(pool=pool)
        vectors[pool] = [
            chosen.vector(backbone(chosen.inputs(batch))) for batch in (forward, backward)
        ]
    torch.testing.assert_close(*vectors["mean"])
    assert not torch.allclose(*vectors["concat"])
    assert vectors["concat"][0].shape == (6, 18)


@pytest.mark.parametrize("pool", ["mean", "concat"])
def test_a_learner_trains_and_predicts_whole_clips(pool):
    chosen = task(pool=pool, init="random")
    learner = TaskLearner(build_backbone("mlp", {"width": 6, "depth": 1}, ImageSpec(8)), chosen)
    loss = learner(learner.views(clips(), torch.Generator().manual_seed(0))).loss
    loss.backward()
    assert learner.head.weight.grad.abs().sum() > 0
    assert learner.eval().predict(clips()).shape == (6, 2)


@pytest.mark.parametrize(
    "options",
    [
        {"augmentation": Augmentation.simclr()},
        {"augmentation": Augmentation(padding=2, flip=0.5, cutout=3)},
        {"augmentation": Augmentation(flip=0.5), "mixup": 0.4, "cutmix": 1.0},
    ],
)
def test_all_frames_of_a_clip_are_augmented_alike(options):
    still = clips(frames=1).inputs.expand(-1, 3, -1, -1, -1)
    chosen = task(**options)
    batch = Batch(still, clips().labels)
    images, targets = chosen.views(batch, torch.Generator().manual_seed(0))
    frames = images.unflatten(0, (6, 3))
    assert torch.equal(frames, frames[:, :1].expand_as(frames))
    assert len(targets) == 6
    other, _ = chosen.views(batch, torch.Generator().manual_seed(1))
    assert not torch.equal(images, other)
    assert not torch.equal(frames[0, 0], frames[2, 0])


def test_draws_go_on_after_a_clip():
    generator = torch.Generator().manual_seed(0)
    first, _ = task().views(clips(), generator)
    second, _ = task().views(clips(), generator)
    assert not torch.equal(first, second)


def test_clips_of_another_length_are_refused():
    with pytest.raises(UserError, match=r"4 frames and those of training 3: set data\.test_frames"):
        task().inputs(clips(frames=4))


def test_attentive_probing_needs_the_mean():
    assert unsupported("attentive", Clips, Clips.Options()) is None
    assert "take pool: mean" in unsupported("attentive", Clips, Clips.Options(pool="concat"))
