"""Training steps never make the host wait for the device.

Tensors on the meta device have shapes and no values: whatever asks for a value, as `item` or a
boolean index does, fails there, and so does what mixes devices.
"""

from contextlib import nullcontext

import pytest
import torch
from torch.overrides import TorchFunctionMode

from sslrun.backbones import build_backbone
from sslrun.data.examples import TensorExamples
from sslrun.data.specs import ImageSpec, TextSpec
from sslrun.data.text.sequences import IGNORED, Documents, Sequences, build_labeled
from sslrun.data.text.tokenizer import blank_tokenizer
from sslrun.pretexts.base import pretexts
from sslrun.tasks.base import TaskLearner, tasks

META = torch.device("meta")
SPEC = TextSpec(blank_tokenizer(100), 16)  # an LSTM on the meta device is slow


def corpus():
    tokens = torch.randint(5, 100, (2000,), generator=torch.Generator().manual_seed(0)).int()
    return Documents(tokens, torch.arange(0, 2001, 10), torch.arange(0, 201, 10), SPEC)


def backbone(name):
    shape = {"width": 16} if name == "lstm" else {"width": 16, "depth": 1, "positions": 32}
    return build_backbone(name, shape, SPEC)


def step(learner, examples, generator=None):
    learner.to(META)
    learner.before_step(0.1)
    (batch,) = examples.to(META).batches([torch.arange(len(examples))], META)
    learner(learner.views(batch, generator or torch.Generator())).loss.backward()
    learner.after_step(0.5)
    assert all(
        parameter.grad.device == META
        for parameter in learner.parameters()
        if parameter.grad is not None
    )


@pytest.mark.parametrize(
    ("name", "on", "options"),
    [
        ("mlm", "bert-tiny", {"pairs": "drop"}),
        ("mlm", "bert-tiny", {"pairs": "drop", "cross_documents": True}),
        ("mlm", "bert-tiny", {"nsp": True}),
        ("mlm", "bert-tiny", {"whole_words": True}),
        ("mlm", "bert-tiny", {"masking": "static"}),
        ("ltr", "gpt-tiny", {}),
        ("ltr", "lstm", {}),
        ("denoise", "bert-tiny", {}),
    ],
)
def test_pretraining_on_text_never_waits(name, on, options):
    pretext = pretexts[name](pretexts[name].Options(**options), backbone(on))
    step(pretext, pretext.arrange(corpus(), 0))


@pytest.mark.parametrize("on", ["bert-tiny", "gpt-tiny", "lstm"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sentences", {}),
        ("sentences", {"pool": "mean"}),
        ("sentences", {"bilstm": 1}),
        ("span", {}),
        ("tagging", {}),
    ],
)
def test_fine_tuning_on_text_never_waits(name, options, on):
    task = tasks[name](tasks[name].Options(**options), SPEC, ("O", "B-A", "I-A"))
    texts = [list(range(5, 5 + size)) for size in (2, 4, 3, 4)]
    examples = build_labeled(texts, texts, torch.tensor([0, 1, 2, 0]), task.classes, SPEC)
    if name == "span":
        examples = Sequences(examples.tokens, examples.ranges, torch.tensor([[1, 2]] * 4), (), SPEC)
    if name == "tagging":
        tags = torch.where(examples.tokens % 2 == 0, IGNORED, 1)
        examples = Sequences(examples.tokens, examples.ranges, None, task.classes, SPEC, tags)
    step(TaskLearner(backbone(on), task), examples)


class MetaGenerator(torch.Generator):
    """A generator that says that it is on the meta device."""

    device = META


class OnMeta(TorchFunctionMode):
    """Draw without a generator, which the meta device lacks, and refuse copies that wait.

    `torch.tensor(..., device="cuda")` and `new_tensor` copy from memory that is not pinned.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = {key: value for key, value in (kwargs or {}).items() if key != "generator"}
        if function is torch.tensor:
            assert "device" not in kwargs, "a copy to the device that waits: use to_device"
        if function is torch.Tensor.new_tensor:
            assert args[0].device != META, "a copy to the device that waits: use to_device"
        return function(*args, **kwargs)


@pytest.mark.parametrize("name", ["rotation", "position", "simclr", "dino"])
def test_pretraining_on_images_never_waits(name, monkeypatch):
    # torch.autocast does not know the meta device.
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())
    cls, spec = pretexts[name], ImageSpec(36)
    options = cls.Options()
    network = build_backbone(
        "vit-tiny",
        {"patch": 4, "depth": 1, "width": 16, "heads": 2},
        cls.backbone_spec(options, spec),
    )
    images = torch.randint(0, 256, (4, 3, 36, 36), dtype=torch.uint8)
    examples = TensorExamples(images, None, (), spec)
    pretext = cls(options, network)
    pretext.fit(examples)
    with OnMeta():
        step(pretext, examples, MetaGenerator())
