"""Views for pretext tasks: their number and sizes, passes by size, and mistakes."""

import pytest
import torch

from sslrun.backbones import build_backbone
from sslrun.data.examples import Batch
from sslrun.data.image.augment import Augmentation
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.pretexts.views import Crops, MultiView, ViewOptions, encode_by_size


class Anything(MultiView):
    """Compare any views."""

    name = "anything"
    most_views = None
    takes_crops = True


class Pair(MultiView):
    """Compare two views."""

    name = "pair"


def build(cls, patch=4, **options):
    backbone = build_backbone(
        "vit-tiny", {"patch": patch, "depth": 1, "width": 24, "heads": 3}, ImageSpec(16)
    )
    return cls(ViewOptions(**options), backbone)


def test_views_alternate_policies_and_local_views_come_last():
    plain, mirrored = Augmentation(), Augmentation(flip=1.0)
    crops = Crops(count=2, size=8)
    pretext = build(Anything, views=3, augmentation=plain, second=mirrored, crops=crops)
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    views = pretext.views(Batch(images, None), torch.Generator().manual_seed(1))
    assert [view.shape[-1] for view in views] == [16, 16, 16, 8, 8]
    assert torch.equal(views[0], images)
    assert torch.equal(views[1], images.flip(3))
    assert torch.equal(views[2], images)
    assert not torch.equal(views[3], views[4])


def test_local_views_show_the_share_of_the_image_that_scale_says():
    # An image of a ramp: the range of values in a view is the share of the width that it shows.
    images = torch.linspace(0, 1, 64).expand(200, 3, 64, 64)
    pretext = build(
        Anything, augmentation=Augmentation(), crops={"count": 1, "scale": [0.25, 0.25]}
    )
    *_, local = pretext.views(Batch(images, None), torch.Generator().manual_seed(1))
    shown = (local.amax(dim=(1, 2, 3)) - local.amin(dim=(1, 2, 3))).mean().item()
    assert shown == pytest.approx(0.5, abs=0.05)


def test_views_of_one_size_are_encoded_together():
    passes = []

    def network(images):
        passes.append(tuple(images.shape))
        return images.mean(dim=(1, 2, 3))

    views = [torch.rand(3, 3, side, side) for side in (8, 8, 4, 4, 4)]
    outputs = encode_by_size(network, views)
    assert passes == [(6, 3, 8, 8), (9, 3, 4, 4)]
    for view, output in zip(views, outputs, strict=True):
        torch.testing.assert_close(output, view.mean(dim=(1, 2, 3)))


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (Pair, {"views": 3}, "pretext.views: 'pair' compares 2 views: set views: 2"),
        (Pair, {"crops": {"count": 2}}, "pretext.crops: 'pair' does not compare local views"),
        (Anything, {"crops": {"count": 2, "size": 10}}, "patches of 4: set size: 8"),
    ],
)
def test_views_that_do_not_fit_are_errors(cls, options, message):
    with pytest.raises(UserError, match=message):
        build(cls, **options)
