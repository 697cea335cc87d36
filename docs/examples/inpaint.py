"""A pretext task: fill in a square that was cut out of the image."""

from pydantic import Field
from torch import nn

from sslrun.data.image.augment import to_float
from sslrun.data.specs import ImageSpec
from sslrun.pretexts.base import Pretext, PretextOptions, pretexts
from sslrun.training.learner import Output


@pretexts.register("inpaint")
class Inpaint(Pretext):
    """Reconstruct the middle of an image from its border. Pathak et al., CVPR 2016.

    Deviation: no adversarial loss, and the decoder is an MLP on the pooled features.
    """

    reads = ImageSpec

    class Options(PretextOptions):
        hole: int = Field(default=6, ge=1)
        """Side of the square that is cut out of the image, in pixels."""

    def __init__(self, options, backbone):
        super().__init__(options, backbone)
        pixels = 3 * options.hole**2
        self.decoder = nn.Sequential(
            nn.Linear(backbone.width, 256), nn.ReLU(), nn.Linear(256, pixels)
        )

    def views(self, batch, generator):
        """Cut a gray square out of the middle of each image.

        Returns the images (B, 3, H, W) and the pixels that were cut out (B, 3 * hole**2).
        """
        images = to_float(batch.inputs).clone()
        start = (images.shape[-1] - self.options.hole) // 2
        square = images[..., start : start + self.options.hole, start : start + self.options.hole]
        target = square.flatten(1).clone()
        square.fill_(0.5)
        return images, target

    def forward(self, views):
        images, target = views
        predicted = self.decoder(self.backbone(images).pooled)
        return Output(nn.functional.mse_loss(predicted, target))
