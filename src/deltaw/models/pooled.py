"""A classifier on the mean of an encoder's outputs, for encoders that were trained to be averaged.

transformers' own `…ForSequenceClassification` reads the first token. Sentence encoders (all-MiniLM and its kin)
were trained on the mean over tokens, and their first token says much less. The model here is the same encoder
under the same tensor names, so that plain `AutoModel` reads its folder; the classifier is the tensor pair `head.weight`
[classes, hidden] and `head.bias`, applied to the mean over the unmasked tokens.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor, nn

from deltaw.errors import OptionError

#: key of config.json that asks for this class
POOLING_KEY = "deltaw_pooling"


def mean_pooled_class(config: Any) -> type[nn.Module]:
    """The mean-pooled classifier of the architecture of `config`, built once per architecture.

    Raises:
        OptionError: the architecture has no encoder in transformers.
    """
    import transformers

    try:
        encoder = transformers.MODEL_MAPPING[type(config)]
    except KeyError:
        raise OptionError(f"pooling='mean' needs an encoder; {config.model_type!r} has none in transformers") from None
    return _build(encoder)


@functools.cache
def _build(encoder: Any) -> type[nn.Module]:
    from transformers.modeling_outputs import SequenceClassifierOutput

    # Without the pooler: nothing reads it here, and an unused parameter would be trained, merged and compressed.
    bare = {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(encoder.__init__).parameters else {}

    class MeanPooled(encoder.__base__):  # type: ignore[misc, name-defined]
        def __init__(self, config: Any):
            super().__init__(config)
            setattr(self, self.base_model_prefix, encoder(config, **bare))
            self.head = nn.Linear(config.hidden_size, config.num_labels)
            self.post_init()

        def forward(
            self,
            input_ids: Tensor | None = None,
            attention_mask: Tensor | None = None,
            labels: Tensor | None = None,
            **inputs: Any,
        ) -> Any:
            hidden = getattr(self, self.base_model_prefix)(
                input_ids=input_ids, attention_mask=attention_mask, **inputs
            ).last_hidden_state
            if attention_mask is None:
                pooled = hidden.mean(1)
            else:
                mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
                pooled = (hidden * mask).sum(1) / mask.sum(1).clamp_min(1)
            logits = self.head(pooled)
            loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
            return SequenceClassifierOutput(loss=loss, logits=logits)

    name = f"{encoder.__name__.removesuffix('Model')}MeanPooledForSequenceClassification"
    MeanPooled.__name__ = MeanPooled.__qualname__ = name
    return MeanPooled
