"""Loads the base model, once, and makes it ready for adapters.

Decides what is loaded (a folder, an architecture, whether a pooler belongs to it), how it is stored
(4 bits, 8 bits, plain) and where; refuses with a typed error what cannot be served. What the layers
then compute is the business of the adapters package, and task heads that of server.heads.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adapters.inject import AdaptedModel, inject
from adapters.signature import BaseSignature, describe
from server.checkpoint_plan import BaseModelError, BasePlan, UnsupportedBase, plan_base
from server.memory import check_memory
from server.options import EngineOptions

logger = logging.getLogger(__name__)
