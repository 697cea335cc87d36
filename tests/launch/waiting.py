"""A plug-in: a pretext task that waits in every step while a file exists."""

import os
import time
from pathlib import Path

from sslrun.pretexts.base import pretexts
from sslrun.pretexts.rotation import Rotation


@pretexts.register("waiting")
class Waiting(Rotation):
    version = 1

    def views(self, batch, generator):
        path = os.environ.get("SSLRUN_WAIT", "")
        while os.path.exists(path):
            Path(f"{path}-{os.getpid()}").touch()  # says that training has begun
            time.sleep(0.02)
        return super().views(batch, generator)
