"""Stages from an image to its faces: Read, Decode, Detect, Align, Embed. Each turns an Arrow table into the next."""

from facepipe.stages.align import Align
from facepipe.stages.chain import Chain, Stage, check_chain
from facepipe.stages.decode import Decode
from facepipe.stages.detect import Detect
from facepipe.stages.embed import Embed
from facepipe.stages.read import Read

__all__ = ["Align", "Chain", "Decode", "Detect", "Embed", "Read", "Stage", "check_chain"]
