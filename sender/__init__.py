"""The trainer's side: `FP8Sender` and what it returns and raises."""

from sender.export import export_checkpoint
from sender.handle import PushHandle
from sender.report import PushReport
from sender.sender import FP8Sender
from sender.source import Shard
from shared.config import FP8BlockConfig

__all__ = ["FP8BlockConfig", "FP8Sender", "PushHandle", "PushReport", "Shard", "export_checkpoint"]
