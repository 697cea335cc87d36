"""DINO (Caron et al., ICCV 2021, arXiv:2104.14294) and iBOT (Zhou et al., ICLR 2022)."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from sslrun import distributed
from sslrun.backbones.base import Backbone
from sslrun.backbones.image import patch_attention
from sslrun.backbones.transformer import initialize
from sslrun.data.examples import Batch
from sslrun.data.image.augment import Augmentation, resize, side_of, to_float
from sslrun.errors import UserError
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.blockwise import block_masks
from sslrun.pretexts.heads import mlp
from sslrun.pretexts.views import Crops, MultiView, Teacher, ViewOptions, encode_by_size
from sslrun.training.learner import Output
from sslrun.training.optim import half_cosine

log = logging.getLogger(__name__)

Share = Annotated[float, Field(ge=0, le=1)]
Temperature = Annotated[float, Field(gt=0)]

WIDE_CROP = 0.4
"""Smallest share of the image in global views beside local ones; too large a share without them."""
COPIES = 5
"""The last layer is in memory as weights, teacher, gradient and two moments of AdamW."""
SAME = 0.02
"""An entropy or divergence below this share of ln(outputs) counts as 0 in `diagnose`."""
PICTURED_CROPS = 4
"""Largest number of local views that pictures show."""


def _global_view(smallest: float, second: bool = False) -> Augmentation:
    """Return DINO's augmentation of a global view that shows at least the share `smallest`."""
    policy = Augmentation.byol_second() if second else Augmentation.byol_first()
    return policy.model_copy(update={"crop": (smallest, 1.0)})


@pretexts.register("dino")
class DINO(MultiView):
    """Predict a momentum teacher's distribution over outputs for the other views of an image.

    Self-distillation without labels: Caron et al., ICCV 2021 (arXiv:2104.14294). The teacher sees
    the global views only; the student sees all views. Two measures prevent collapse: centering
    subtracts the mean of the teacher's outputs, so that no output dominates, and sharpening gives
    the teacher a lower temperature, so that its distribution is not uniform. The metrics show both:
    `teacher_entropy` goes to 0 without centering and to ln(outputs) without sharpening, and `kl`,
    the divergence of the student from the teacher, goes to 0 in both cases (Figure 7 of the paper).

    The backbone that is watched, saved and evaluated is the teacher's, as in the authors'
    evaluation. The teacher drops no units and no paths, even if the student does. The paper's
    other settings are options of `pretrain`: `freeze_last`, `clip_each`, `weight_decay_end`,
    `lr_end`. For small data sets, lower `outputs` to 1,024 to 8,192 and `momentum` to 0.99. If the
    loss stays at ln(outputs), the targets are uniform. Near that point a difference between images
    grows only if its correlation between views is above the ratio of teacher's to student's
    temperature, 0.4 by default. Small networks may start below it, and then need hundreds of steps
    or more at a `teacher_temperature` of 0.02.

    With `ibot`, the student also predicts the teacher's distribution for each masked patch: iBOT
    (Zhou et al., ICLR 2022, arXiv:2111.07832). Blocks of patches are replaced by a mask token in a
    part of the student's global views. [CLS] and patches share the head, as in the runs of the
    authors' README.

    Deviations from the authors' code:

    - The momentum of a step is that of the schedule's next step, so that it ends at 1.
    - With ResNets, batch norm is synchronized over devices, as for all pretext tasks here.
    - `koleo`, the regularizer of DINOv2 (Oquab et al. 2023, arXiv:2304.07193), compares the images
      of all devices; DINOv2's compares those of one.
    - With `ibot`, the number of masked views in a batch is exact, not random, and patches have the
      temperature of [CLS].
    """

    class Options(ViewOptions):
        augmentation: Augmentation = _global_view(0.14)
        """Augmentation of the first global view; default: always blurred, with crops from 0.14 of
        the image's area, or from 0.4 if there are `crops`."""
        second: Augmentation | None = _global_view(0.14, second=True)
        """Augmentation of the second global view; default: rarely blurred and sometimes solarized,
        with crops from 0.14 of the image's area, or from 0.4 if there are `crops`."""
        outputs: int = Field(default=65536, ge=2)
        """Number of outputs of the head, over which teacher and student have distributions."""
        hidden: int = Field(default=2048, ge=2)
        """Width of the head's two hidden layers."""
        bottleneck: int = Field(default=256, ge=2)
        """Width of the unit vectors that the head's last layer compares with its outputs."""
        free_gain: bool = False
        """Learn the length of each output's weights in the last layer, as in the paper's runs of
        ViT-S; otherwise it is 1, which is more stable."""
        student_temperature: Temperature = 0.1
        """Temperature of the student's softmax."""
        teacher_temperature: tuple[Temperature, Temperature] = (0.04, 0.07)
        """Temperature of the teacher's softmax: the first, and that after `warmup`."""
        warmup: Share = 0.3
        """Share of the training in which the teacher's temperature goes linearly from its first to
        its second value; 30 of 100 epochs in the paper."""
        momentum: Share = 0.996
        """Initial momentum of the teacher; it rises to 1 along half a cosine."""
        center: Annotated[float, Field(ge=0, lt=1)] | None = 0.9
        """Momentum of the center, the moving mean of the teacher's outputs; null: no centering."""
        koleo: float = Field(default=0.0, ge=0)
        """Weight of the KoLeo regularizer, which spreads the features of a batch; 0.1 in DINOv2."""
        ibot: bool = False
        """Also predict the teacher's distribution for masked patches, as iBOT does."""
        mask_ratio: tuple[Share, Share] = (0.1, 0.5)
        """With `ibot`: smallest and largest share of the patches that are masked in a view."""
        unmasked: Share = 0.5
        """With `ibot`: share of the global views in which no patch is masked."""
        patch_weight: float = Field(default=1.0, ge=0)
        """With `ibot`: weight of the loss on masked patches."""

        @model_validator(mode="before")
        @classmethod
        def _crop_less_beside_local_views(cls, values: Any) -> Any:
            """Give global views larger crops if there are local views, unless they are set."""
            if not isinstance(values, dict) or values.get("crops") is None:
                return values
            first, second = _global_view(WIDE_CROP), _global_view(WIDE_CROP, second=True)
            return {"augmentation": first, "second": second, **values}

        @model_validator(mode="after")
        def _order_mask_ratio(self) -> DINO.Options:
            if self.mask_ratio[0] > self.mask_ratio[1]:
                raise ValueError("mask_ratio: give the smallest value first, then the largest")
            return self

    options: Options
    most_views = None
    takes_crops = True
    center: Tensor
    """(K,): moving mean of the teacher's outputs; 0 without centering."""
    patch_center: Tensor
    """(K,): the same of its outputs for patches, with `ibot`."""
    teacher_temperature: Tensor
    """0-d: the current temperature."""
    momentum: Tensor
    """0-d: the last step's momentum of the teacher."""

    def __init__(self, options: Options, backbone: Backbone) -> None:
        """Raises UserError for a backbone that cannot mask patches, or too many outputs."""
        super().__init__(options, backbone)
        _check_memory(options)
        _warn_of_large_crops(options)
        self.head = Head(backbone.width, options)
        self.teacher = Teacher(backbone, self.head, drops=False)
        self.register_buffer("center", torch.zeros(options.outputs))
        self.register_buffer("teacher_temperature", torch.tensor(options.teacher_temperature[0]))
        self.register_buffer("momentum", torch.tensor(options.momentum))
        if options.ibot:
            for capability in ("tokens", "encode"):
                backbone.require(capability, f"'{self.name}' with ibot: true")
            self.mask_token = nn.Parameter(torch.zeros(backbone.width))
            self.register_buffer("patch_center", torch.zeros(options.outputs))

    @classmethod
    def depends_on_devices(
        cls, options: ViewOptions, backbone: type[Backbone], backbone_options: Any
    ) -> bool:
        """Also true if masks are random."""
        masks = isinstance(options, DINO.Options) and options.ibot
        return masks or super().depends_on_devices(options, backbone, backbone_options)

    @property
    def kept(self) -> Backbone:
        return self.teacher.backbone

    def local_augmentation(self, crops: Crops) -> Augmentation:
        """By default that of the first global view, with smaller crops and half as often blurred.

        The paper's local views are blurred with probability 0.5.
        """
        policy = super().local_augmentation(crops)
        if crops.augmentation is not None:
            return policy
        return policy.model_copy(update={"blur": policy.blur / 2})

    def views(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, ...]:
        """The global views (B, 3, size, size), then the local ones; with `ibot`, then the masks.

        Masks (G * B, N) bool are those of the patches of the G global views.
        """
        views = super().views(batch, generator)
        return (*views, self._draw_masks(views[0], generator)) if self.options.ibot else views

    def forward(self, views: tuple[Tensor, ...]) -> Output:
        """Compute the loss, and move the centers if in training mode, as batch norm does."""
        if self.options.ibot:
            return self._forward_masked(views[:-1], views[-1])
        globals_ = views[: self.options.views]
        features = torch.stack(encode_by_size(lambda images: self.backbone(images).pooled, views))
        outputs = torch.stack(encode_by_size(self.teacher, globals_))
        loss, metrics = self._compare(features, outputs)
        return Output(loss, metrics)

    def before_step(self, progress: float) -> None:
        """Set the teacher's temperature."""
        first, last = self.options.teacher_temperature
        share = min(1.0, progress / self.options.warmup) if self.options.warmup else 1.0
        self.teacher_temperature.fill_(first + share * (last - first))

    def after_step(self, progress: float) -> None:
        """Move the teacher toward the student."""
        momentum = half_cosine(self.options.momentum, 1.0, progress)
        self.momentum.fill_(momentum)
        self.teacher.follow(self.backbone, self.head, momentum)

    def last_layer(self) -> list[nn.Parameter]:
        return list(self.head.last.parameters())

    def diagnose(self, metrics: Mapping[str, float]) -> str | None:
        """Name the two kinds of collapse: one output dominates, or all are equally likely."""
        if "teacher_entropy" not in metrics:
            return None
        entropy, kl = metrics["teacher_entropy"], metrics["kl"]
        largest = math.log(self.options.outputs)
        if kl > SAME * largest:
            return None
        if entropy < SAME * largest:
            return (
                f"collapse: one output dominates (the teacher's entropy is {entropy:.2g}, near 0): "
                "set center: 0.9, lower lr or raise teacher_temperature"
            )
        if entropy > (1 - SAME) * largest:
            return (
                f"collapse: the teacher's targets are uniform (entropy {entropy:.4g} of at most "
                f"{largest:.4g}): lower teacher_temperature, outputs or momentum, or raise lr"
            )
        return None

    def pictures(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Images with the teacher's attention, and their views, with masked patches in gray."""
        size = self.options.size or side_of(batch.inputs)
        images = resize(to_float(batch.inputs), size)
        columns = {"image": images}
        if "attention" in self.kept.offers and "attention" not in self.kept.disabled():
            columns["attention"] = attention_maps(self.kept, images)
        views = self.views(batch, generator)
        count = self.options.views
        for index, view in enumerate(views[:count], 1):
            columns[f"global {index}"] = view
        if self.options.ibot:
            for index, mask in enumerate(views[-1].chunk(count), 1):
                view = views[index - 1]
                columns[f"masked {index}"] = torch.where(self._on_pixels(mask, view), 0.5, view)
        crops = 0 if self.options.crops is None else min(self.options.crops.count, PICTURED_CROPS)
        for index, view in enumerate(views[count : count + crops], 1):
            columns[f"local {index}"] = view
        return columns

    def _compare(self, features: Tensor, outputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss on whole images, and metrics.

        `features` (V, B, D) are the student's of all views, and `outputs` (G, B, K) the teacher's
        of the global views.
        """
        options = self.options
        targets = soften(outputs, self.center, self.teacher_temperature)
        self._move_center(self.center, outputs.flatten(0, 1).float().mean(dim=0))
        loss = dino_loss(self.head(features), targets, options.student_temperature)
        entropy = -torch.special.xlogy(targets, targets).sum(dim=-1).mean()
        metrics = {
            "teacher_entropy": entropy,
            "kl": loss.detach() - entropy,
            "center_std": self.center.std(),
            "teacher_temperature": self.teacher_temperature.clone(),
            "momentum": self.momentum.clone(),
        }
        if options.koleo:
            spread = sum((koleo(view) for view in features[: options.views]), loss.new_zeros(()))
            metrics["koleo"] = spread.detach()
            loss = loss + options.koleo * spread
        return loss, metrics

    def _forward_masked(self, views: tuple[Tensor, ...], masks: Tensor) -> Output:
        """Compute iBOT's loss; `masks` (G * B, N) bool are those of the global views' patches."""
        count = self.options.views
        images = torch.cat(views[:count])
        with torch.no_grad():
            cls_token, patches = _encode(self.teacher.backbone, images)
            outputs = self.teacher.head(cls_token).unflatten(0, (count, -1))
        embedded = self.backbone.embed(images)
        positions = self.backbone.positions(*_grid_of(self.backbone, images))
        hidden = (self.mask_token + positions).to(embedded.dtype)
        student = self.backbone.encode(torch.where(masks[:, :, None], hidden, embedded))
        student_patches = student[:, -masks.shape[1] :]
        local = encode_by_size(lambda crops: _encode(self.backbone, crops)[0], views[count:])
        features = torch.stack([*student[:, 0].chunk(count), *local])
        loss, metrics = self._compare(features, outputs)
        patch_loss = self._compare_patches(student_patches, patches, masks)
        metrics["patch_loss"] = patch_loss.detach()
        return Output(loss + self.options.patch_weight * patch_loss, metrics)

    def _compare_patches(self, student: Tensor, teacher: Tensor, masks: Tensor) -> Tensor:
        """Return the loss on masked patches: their mean over each view, then over the batch.

        `student` and `teacher` (G * B, N, D) are tokens of patches. To compute outputs for masked
        patches only, and yet a fixed number of them, as many patches are chosen as can be masked;
        those that are not masked have the weight 0.
        """
        chosen = masks.flatten().int().argsort(descending=True, stable=True)
        chosen = chosen[: self._most_masked(*masks.shape)]
        weights = masks / masks.sum(dim=1, keepdim=True).clamp_min(1) / len(masks)
        head = self.teacher.head
        assert isinstance(head, Head)
        with torch.no_grad():
            units = head.embed(teacher)
            outputs = head.last(units.flatten(0, 1)[chosen])
            targets = soften(outputs, self.patch_center, self.teacher_temperature)
            # The last layer is linear: the mean over all patches of what it returns.
            self._move_center(self.patch_center, head.last(units.mean(dim=(0, 1))))
        scores = self.head(student.flatten(0, 1)[chosen])
        losses = cross_entropy(scores, targets, self.options.student_temperature)
        return (weights.flatten()[chosen] * losses).sum()

    def _move_center(self, center: Tensor, mean: Tensor) -> None:
        """Move a center (K,) toward the batch's mean output (K,), in training mode."""
        if not self.training or self.options.center is None:
            return
        mean = mean.float().clone()
        distributed.add_up(mean)
        center.lerp_(mean / distributed.world_size(), 1 - self.options.center)

    def _draw_masks(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Draw masks (G * B, N) for G global views like `images` (B, 3, H, W)."""
        rows, columns = _grid_of(self.backbone, images)
        count = self.options.views * len(images)
        low, high = self.options.mask_ratio
        draws = torch.rand(2, count, generator=generator, device=images.device)
        ratios = low + (high - low) * draws[0]
        targets = (ratios * rows * columns).long().clamp_max(int(high * rows * columns))
        is_masked = draws[1].argsort().argsort() < self._masked_views(count)
        return block_masks(targets * is_masked, rows, columns, generator).flatten(1)

    def _masked_views(self, count: int) -> int:
        """Number of views with masked patches, of `count` global views."""
        return round(count * (1 - self.options.unmasked))

    def _most_masked(self, count: int, patches: int) -> int:
        """The largest number of patches that can be masked in `count` global views."""
        return self._masked_views(count) * int(self.options.mask_ratio[1] * patches)

    def _on_pixels(self, mask: Tensor, images: Tensor) -> Tensor:
        """Enlarge masks of patches (B, N) to masks (B, 1, H, W) of pixels."""
        grid = mask.float().unflatten(1, (1, _grid_of(self.backbone, images)[0], -1))
        return F.interpolate(grid, images.shape[-2:]) > 0


class Head(nn.Module):
    """DINO's head: three linear maps to unit vectors, which the last layer compares with outputs.

    Maps (..., D) to (..., K).
    """

    def __init__(self, width: int, options: DINO.Options) -> None:
        super().__init__()
        widths = [width, options.hidden, options.hidden, options.bottleneck]
        self.mlp = mlp(widths, norm=False, activation=nn.GELU)
        initialize(self.mlp)
        self.last = NormedLinear(options.bottleneck, options.outputs, options.free_gain)

    def embed(self, features: Tensor) -> Tensor:
        """Map features (..., D) to unit vectors, in float32."""
        return F.normalize(self.mlp(features).float(), dim=-1)

    def forward(self, features: Tensor) -> Tensor:
        return self.last(self.embed(features))


class NormedLinear(nn.Module):
    """A linear map without bias whose rows have a length of 1, or one that is learned.

    Weight normalization (Salimans & Kingma, NeurIPS 2016, arXiv:1602.07868).
    """

    def __init__(self, width: int, outputs: int, free_gain: bool) -> None:
        super().__init__()
        self.weight = nn.Linear(width, outputs, bias=False).weight
        self.gain = nn.Parameter(torch.ones(outputs, 1)) if free_gain else None

    def forward(self, vectors: Tensor) -> Tensor:
        rows = F.normalize(self.weight, dim=1)
        return F.linear(vectors, rows if self.gain is None else self.gain * rows)


@torch.no_grad()
def soften(outputs: Tensor, center: Tensor, temperature: Tensor) -> Tensor:
    """The teacher's targets softmax((t - c) / T), in float32: outputs (..., K), center (K,)."""
    with torch.autocast(outputs.device.type, enabled=False):
        return ((_wide(outputs) - center) / temperature).softmax(dim=-1)


def cross_entropy(scores: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """- sum_k q_k log softmax(s / T)_k for scores and targets (..., K), in float32: (...)."""
    with torch.autocast(scores.device.type, enabled=False):
        return -(targets * (_wide(scores) / temperature).log_softmax(dim=-1)).sum(dim=-1)


def dino_loss(scores: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy over all pairs of a teacher's view and another view of the student.

    `scores` (V, B, K) are the student's outputs of all views and `targets` (G, B, K) the teacher's
    distributions of the first G. For a view v, the sum over teachers q != v is
    - (sum of q) s_v / T + (number of q) logsumexp(s_v / T), so that no pair is computed by itself.
    """
    with torch.autocast(scores.device.type, enabled=False):
        views, count = len(scores), len(targets)
        scaled = _wide(scores) / temperature
        log_sums = scaled.logsumexp(dim=-1)
        others = targets.sum(dim=0)
        products = (others * scaled.sum(dim=0)).sum() - (targets * scaled[:count]).sum()
        total = count * log_sums.sum() - log_sums[:count].sum() - products
        return total / (count * (views - 1) * scores.shape[1])


def koleo(features: Tensor) -> Tensor:
    """KoLeo regularizer of features (B, D): - mean_i ln(n min_j ||z_i - z_j||), as a 0-d tensor.

    z are the features with unit length, of the n images of all devices. It estimates the negative
    entropy of the features (Sablayrolles et al., ICLR 2019, arXiv:1806.03198).
    """
    with torch.autocast(features.device.type, enabled=False):
        units = distributed.gather(F.normalize(_wide(features), dim=1))
        with torch.no_grad():
            nearest = (units @ units.T).fill_diagonal_(-1).argmax(dim=1)
        distances = F.pairwise_distance(units, units[nearest], eps=1e-8)
        return -(len(units) * distances + 1e-8).log().mean()


def attention_maps(backbone: Backbone, images: Tensor) -> Tensor:
    """The last block's attention of [CLS] to patches, mean over heads, as gray images.

    Returns images of the shape of `images` (B, 3, H, W), each with a largest value of 1.
    """
    maps = patch_attention(backbone, images).mean(dim=1, keepdim=True)
    maps = maps / maps.amax(dim=(2, 3), keepdim=True)
    return F.interpolate(maps, images.shape[-2:]).expand(-1, 3, -1, -1)


def _encode(backbone: Backbone, images: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens of [CLS] (B, D) and of patches (B, N, D)."""
    embedded = backbone.embed(images)
    tokens = backbone.encode(embedded)
    return tokens[:, 0], tokens[:, -embedded.shape[1] :]


def _grid_of(backbone: Backbone, images: Tensor) -> tuple[int, int]:
    """Number of rows and columns of patches in images (B, 3, H, W)."""
    return images.shape[-2] // backbone.patch, images.shape[-1] // backbone.patch


def _wide(values: Tensor) -> Tensor:
    """Convert to float32, except float64."""
    return values if values.dtype == torch.float64 else values.float()


def _check_memory(options: DINO.Options) -> None:
    """Raise UserError if the head's last layer cannot fit into the machine's memory."""
    needed = COPIES * 4 * options.outputs * options.bottleneck
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        fitting = 2 ** ((memory // (COPIES * 4 * options.bottleneck)).bit_length() - 1)
        raise UserError(
            f"pretext.outputs: the last layer of {options.outputs:,} outputs, its teacher and its "
            f"optimizer need {needed / 2**30:,.0f} GiB of memory, and this machine has "
            f"{memory / 2**30:,.0f}: lower it, to {fitting} at most"
        )


def _warn_of_large_crops(options: DINO.Options) -> None:
    """Warn, as the authors do, of global views that show too much if there are no local views."""
    crop = options.augmentation.crop
    if options.crops is None and crop is not None and crop[0] >= WIDE_CROP:
        log.warning(
            "pretext.augmentation.crop: global views show at least %g of the image, which is meant "
            "for training with local views: set crops, or lower it to 0.14",
            crop[0],
        )
