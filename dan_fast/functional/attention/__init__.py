"""NL-CBAM, the attention adversary and the head that combines them, for a whole batch.

The operators keep the layout of the map: a channels_last map is read as it lies. float16 and bfloat16 are computed in
float32 and returned in their own dtype. Under autocast such arguments are converted to float32, as autocast itself does
for softmax and losses, and the results are float32; even then `attention_head` reads its map as it is.
"""

from dan_fast.functional.attention.adversary import attention_adversary
from dan_fast.functional.attention.head import attention_head
from dan_fast.functional.attention.refine import nl_cbam
from dan_fast.functional.attention.variants import attention_variant, attention_variant_head

__all__ = ["attention_adversary", "attention_head", "attention_variant", "attention_variant_head", "nl_cbam"]
