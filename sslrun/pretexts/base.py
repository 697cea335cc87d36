"""The base class of pretext tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from sslrun.backbones.base import Backbone
from sslrun.backbones.transformer import Block
from sslrun.data.examples import Batch, Examples
from sslrun.data.image.augment import Augmentation, check_colors
from sslrun.data.specs import ImageSpec, InputSpec
from sslrun.errors import UserError
from sslrun.registry import Options, Registry
from sslrun.training.learner import Learner

if TYPE_CHECKING:
    from sslrun.pretexts.guesses import MaskedText


class PretextOptions(Options):
    """Options that all pretext tasks share."""


class NormOptions(PretextOptions):
    """Options of pretext tasks whose networks may have batch norm."""

    sync_norm: bool = True
    """Compute batch norm's statistics over the batches of all devices together. Otherwise each
    device uses its own, and the first device's running statistics are kept. With `accumulate`,
    batch norm sees a part of the batch. One device computes the same either way."""


def is_random_or_unsynchronized(
    options: NormOptions,
    policies: Iterable[Augmentation],
    backbone: type[Backbone],
    backbone_options: Any,
) -> bool:
    """Whether views or the network are random, or each device has its own batch norm."""
    is_random = any(policy.is_random for policy in policies) or backbone.draws(backbone_options)
    return is_random or not options.sync_norm


class Pretext(Learner):
    """A self-supervised objective, with its heads and teachers, that makes targets from the data.

    See `Learner` for when the loop calls `views`, `forward`, `before_step` and `after_step`.
    """

    Options: ClassVar[type[PretextOptions]] = PretextOptions
    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Increase it when the same options lead to another objective."""
    reads: ClassVar[type[InputSpec]]
    """Type of the inputs that views are made from."""
    gives: ClassVar[type[InputSpec] | None] = None
    """Type of the inputs that the backbone gets; None: the same as `reads`."""
    needs_color: ClassVar[bool] = False
    """Whether images must have the three channels of color."""
    needs_square: ClassVar[bool] = False
    """Whether images must be square."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Capabilities that the backbone must have; names of `Backbone.offers`."""
    can_score: ClassVar[bool] = False
    """Whether it gives texts a log-likelihood, with what it keeps: see `score_texts`."""
    keeps: ClassVar[tuple[str, ...]] = ()
    """Modules to save beside the backbone, such as a decoder: names of attributes, which may be
    None; see `sslrun.pretexts.weights`."""

    def __init__(self, options: Any, backbone: Backbone) -> None:
        """Raises UserError for images without the colors or the shape that the task needs."""
        super().__init__()
        self.options = options
        self.backbone = backbone
        spec = backbone.spec
        if isinstance(spec, ImageSpec):
            check_colors(options, spec.channels, "pretext")
            if self.needs_color and spec.channels != 3:
                raise UserError(
                    f"pretext '{self.name}' needs color images of 3 channels, and these have "
                    f"{spec.channels}: set data.channels: 3, or choose another task"
                )
            if self.needs_square and not spec.is_square:
                raise UserError(
                    f"pretext '{self.name}' takes square images, and these are {spec.shape[1]}x"
                    f"{spec.shape[0]}: set data.size to one number, as in size: {min(spec.shape)}"
                )

    @classmethod
    def depends_on_devices(
        cls, options: Any, backbone: type[Backbone], backbone_options: Any
    ) -> bool:
        """Whether training on several devices gives another result than on one, beyond rounding.

        If so, the number of devices is part of a run's identity. True unless a task knows better:
        each device draws its own views and dropout.
        """
        return True

    @property
    def sync_norm(self) -> bool:
        return isinstance(self.options, NormOptions) and self.options.sync_norm

    @classmethod
    def backbone_spec(cls, options: Any, spec: InputSpec) -> InputSpec:
        """The spec to build the backbone for, an instance of `gives`; by default the data's."""
        return spec

    @property
    def kept(self) -> Backbone:
        """The backbone to save, watch and evaluate: the teacher's if the paper evaluates that."""
        return self.backbone

    @property
    def kept_modules(self) -> dict[str, nn.Module]:
        """The modules in `keeps` that the task has as configured, by name."""
        modules = {name: attrgetter(name)(self) for name in self.keeps}
        return {name: module for name, module in modules.items() if module is not None}

    def layers(self) -> list[list[nn.Parameter]]:
        return self.backbone.layers()

    def blocks(self) -> list[nn.Module]:
        """The residual blocks of ResNets and the blocks of Transformers, including a teacher's."""
        from torchvision.models.resnet import BasicBlock, Bottleneck

        kinds = (Block, BasicBlock, Bottleneck)
        return [module for module in self.modules() if isinstance(module, kinds)]

    def arrange(self, examples: Examples, seed: int) -> Examples:
        """Arrange the examples for the task, as pairs of text for example; by default unchanged."""
        return examples

    def fit(self, examples: Examples) -> None:
        """Compute what the task needs from the training examples, such as a histogram of colors.

        Called once, before pretraining. Keep the result in buffers, so that checkpoints have it.
        """

    def positives(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Random views of each image, each (B, C, H, W), which the task should represent alike.

        LiDAR compares them. None by default.
        """
        return ()

    def watched_inputs(self, inputs: Any) -> Any:
        """Convert a task's inputs for the backbone, at feature checks, to those it is trained on.

        By default unchanged.
        """
        return inputs

    def pictures(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Pictures of what the task does to a few held-out images, such as reconstructions.

        Title -> images (B, 3, H, W) in [0, 1], drawn as columns with one row per example. Called at
        every feature check, in eval mode without gradients. None by default.
        """
        return {}

    def samples(self, batch: Batch, generator: torch.Generator) -> list[str]:
        """Lines of text on what the task does to a few held-out texts, such as the gaps it fills.

        Called as `pictures` is. None by default.
        """
        return []

    def guesses(self, batch: Batch, generator: torch.Generator) -> list[MaskedText]:
        """Guesses at tokens hidden in a few held-out texts, for masked language models.

        Called as `pictures` is. None by default.
        """
        return []

    def score_texts(self, inputs: Any) -> Tensor:
        """Log-likelihood or pseudo-log-likelihood (B,) of texts, the sum over their tokens.

        Special tokens are not counted. Called in eval mode, if `can_score`.
        """
        raise NotImplementedError

    def diagnose(self, metrics: Mapping[str, float]) -> str | None:
        """Name a failure that the task's own metrics show, such as a kind of collapse.

        `metrics` holds those of the last step, and the record of the feature check. None: healthy.
        """
        return None

    def held_out(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Metrics on held-out examples, including `held_out_loss`, in eval mode without gradients.

        None by default, because a loss that compares views says little about the features.
        """
        return {}

    @classmethod
    def measures(cls, diagnostic: str) -> bool:
        """Whether feature checks of this task can compute a diagnostic; data may lack labels."""
        if diagnostic == "lidar":
            return cls.positives is not Pretext.positives
        return diagnostic != "held_out_loss" or cls.held_out is not Pretext.held_out

    def floor(self, examples: Examples) -> float | None:
        """Held-out loss of a model without context, to detect stuck training; None: undefined."""
        return None


pretexts: Registry[Pretext] = Registry("pretext")
