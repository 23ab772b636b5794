"""The linear layers of a frozen model, held in the dtype that its passes compute in."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


def hold_linear_layers_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast the weights of all linear layers but the head, in place.

    Autocast casts a weight that requires no gradient anew in each pass, and in generation at each
    token. What the passes give has the same bits: embeddings and norms, which autocast does not
    cast, stay as they are.
    """
    head = model.get_output_embeddings()
    for layer in model.modules():
        if not isinstance(layer, (nn.Linear, Conv1D)) or layer is head:
            continue
        weight = cast("nn.Parameter", layer.weight)
        if weight.is_floating_point():
            weight.data = weight.data.to(dtype)
