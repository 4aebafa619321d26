"""Vector quantisation with the classes, arguments and state dicts of vector-quantize-pytorch.

What differs on purpose:

- A residual quantiser walks its levels in one op, in float32 at least, whatever x is.
- The forward value is the chosen codes' sum itself, also with the rotation trick.
- Once the codebooks are initialised nothing waits for the device in training, and one step compiles
  to one graph: the level at which quantiser dropout starts and the vectors that replace dead codes
  are drawn on the device, by torch's generator. Codes are replaced after the batch that
  initialised them, not by it, and a fresh code counts as if it had an even share of the vectors.
- Codes that k-means finds no vector for start dead, as zeros, where there are repeated ones.
- The averages stay in float32 under `.half()`, and processes share them also if
  torch.distributed was initialised after the module.
- `fit` fits all codebooks to a data set. `ResidualVQ` reads images, masks and layouts in all
  combinations, decodes fewer levels without quantiser dropout, and hears `freeze_codebook`.
- Given indices, each level of a `ResidualVQ` sees what x's own codes left over, not x itself.
- Options that are not here raise ValueError. There is no module for each level.
"""

from musiclm_engine.quantize.codebook_stack import Batches
from musiclm_engine.quantize.grouped_residual_vq import GroupedResidualVQ
from musiclm_engine.quantize.residual_vq import ResidualVQ
from musiclm_engine.quantize.vector_quantize import VectorQuantize

__all__ = ["Batches", "GroupedResidualVQ", "ResidualVQ", "VectorQuantize"]
