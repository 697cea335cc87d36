"""What a recipe will cost, without training: parameters, FLOPs, memory and time."""

from __future__ import annotations

import time
from typing import Any

import torch
from rich.table import Table as RichTable
from torch.utils.flop_counter import FlopCounterMode

from sslrun.backbones import build_backbone
from sslrun.data.examples import Batch
from sslrun.data.sources import sources
from sslrun.errors import UserError
from sslrun.pretexts.base import Pretext, pretexts
from sslrun.recipe import Recipe
from sslrun.stages.evaluate import cells
from sslrun.training.device import Compute
