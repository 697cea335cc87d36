"""The task `objects`: Jaccard index against set arithmetic, void pixels, baselines, refusals."""

import pytest
import torch

from sslrun.data.examples import TensorExamples
from sslrun.data.image.masks import VOID, MaskedImages
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.tasks.base import tasks
from sslrun.tasks.objects import centered_box, jaccard


def draw(*shape, high):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(0))


def pixels_of(mask):
    return set(mask.flatten().nonzero()[:, 0].tolist())


def test_the_jaccard_index_is_that_of_sets_of_pixels():
    labels = draw(12, 10, high=4).byte()
    labels[2:4] = VOID
    masks = draw(3, 12, 10, high=2).bool()
    found = jaccard(masks, labels)
    real = pixels_of(labels != VOID)
    for index, mask in enumerate(masks):
        for number in (1, 2, 3):
            ours, truth = pixels_of(mask) & real, pixels_of(labels == number)
            expected = len(ours & truth) / len(ours | truth)
            assert found[index, number - 1].item() == pytest.approx(expected, abs=1e-6)


def test_void_pixels_count_neither_as_overlap_nor_as_error():
    labels = torch.zeros(8, 8, dtype=torch.uint8)
    labels[2:6, 2:6] = 1
    labels[1] = VOID
    exact = (labels == 1)[None]
    assert jaccard(exact, labels).tolist() == [[1.0]]
    assert jaccard(exact | (labels == VOID), labels).tolist() == [[1.0]]
    wider = exact.clone()
    wider[0, 0] = True  # the row above is background
    assert jaccard(wider, labels).item() == pytest.approx(16 / 24)


def make(labels, size=8):
    images = torch.zeros(len(labels), 3, size, size, dtype=torch.uint8)
    return MaskedImages(images, labels, (), ImageSpec(size))


def objects(**options):
    cls = tasks["objects"]
    return cls(cls.Options(**options), ImageSpec(8), ())


def test_each_object_counts_its_best_mask_and_images_without_objects_are_left_out():
    labels = torch.zeros(3, 8, 8, dtype=torch.uint8)
    labels[0, :2, :2], labels[0, 4:6, 4:6] = 1, 2  # two objects, one patch each
    labels[1, :4, :4] = 7
    labels[1, :4, 4:] = VOID
    masks = torch.zeros(3, 2, 4, 4, dtype=torch.bool)  # patches of 2 pixels
    masks[0, 0, 0, 0] = masks[0, 1, 2, 2] = True  # one head finds one, the other the other
    masks[1, 0, 0, 0] = True  # a quarter of the object
    scores = objects().score(masks, make(labels))
    assert scores["jaccard"] == pytest.approx(100 * (1 + 0.25) / 2)
    everything = 100 * (4 / 64 + 16 / 48) / 2
    assert scores["everything"] == pytest.approx(everything)
    assert scores["gain"] == pytest.approx(scores["jaccard"] - everything)
    # The box covers rows and columns 2 to 5: none of the first object, all of the second, and 2x2
    # pixels of the third (16 + 16 - 4 - 4 of the box on void).
    box = 100 * ((0 + 4 / 16) / 2 + 4 / (16 + 16 - 4 - 4)) / 2
    assert scores["centered_box"] == pytest.approx(box)
    with pytest.raises(UserError, match="none of the 1 images has objects"):
        objects().score(masks[2:], make(labels[2:]))


def test_the_box_is_centered_and_a_quarter_of_the_image():
    box = centered_box(96, 64)
    assert box.sum() == 96 * 64 / 4
    assert torch.equal(box, box.flip(0))
    assert torch.equal(box, box.flip(1))


def test_masks_are_scored_at_the_resolution_of_the_data():
    labels = torch.zeros(1, 8, 8, dtype=torch.uint8)
    labels[0, :2, :2] = 1
    task = objects(size=16)  # larger inputs
    assert task.backbone_spec == ImageSpec(16)
    (batch,) = make(labels).batches([torch.tensor([0])], torch.device("cpu"))
    assert task.inputs(batch).shape == (1, 3, 16, 16)
    masks = torch.zeros(1, 1, 8, 8)
    masks[0, 0, :2, :2] = 1
    assert task.score(masks, make(labels))["jaccard"] == 100


def test_labels_that_are_classes_are_refused():
    examples = TensorExamples(
        torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]), ("a", "b"), ImageSpec(8)
    )
    with pytest.raises(UserError, match="needs a mask of each image's objects"):
        objects().score(torch.zeros(2, 1, 2, 2), examples)
