"""Read -> Decode -> Detect -> Align -> Embed: Arrow table in, Arrow table out. One small module each.

FacesOnDevice stands for the last three on a GPU.
"""

from facepipe.stages.align import Align
from facepipe.stages.chain import Chain, Stage, check_chain
from facepipe.stages.decode import Decode
from facepipe.stages.detect import Detect
from facepipe.stages.embed import Embed
from facepipe.stages.read import Read
from facepipe.stages.resident.stage import FacesOnDevice

__all__ = ["Align", "Chain", "Decode", "Detect", "Embed", "FacesOnDevice", "Read", "Stage", "check_chain"]
