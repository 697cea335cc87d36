"""A plug-in: a pretext task that waits in every step while a file exists."""

import os
import time

from sslrun.pretexts.base import pretexts
from sslrun.pretexts.rotation import Rotation


@pretexts.register("waiting")
class Waiting(Rotation):
    version = 1

    def views(self, batch, generator):
        while os.path.exists(os.environ.get("SSLRUN_WAIT", "")):
            time.sleep(0.02)
        return super().views(batch, generator)
