"""Examples in a template as batches of a DataLoader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .rendering import RenderedBatch
from .template import Template


@dataclass
class TemplateCollator:
    """Examples to batches, for a DataLoader or transformers' Trainer (with remove_unused_columns=False).

    An example is a mapping with a text, or ids, for each field of the template, and with "mask_label", "label" or
    "labels" as far as it has any: see `mask_labels` and `labels` of `render`.

    Args:
        template, tokenizer, loss: as in `render`.
        options: further arguments of `render`.
    """

    template: Template
    tokenizer: Any = None
    loss: Sequence[str] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> RenderedBatch:
        """A batch of these examples."""
        fields = {name: [example[name] for example in examples] for name in self.template.fields}
        options = {"slots": not self.template.is_plain_prefix, **self.options}
        for given, option in (("mask_label", "mask_labels"), ("label", "labels"), ("labels", "labels")):
            if given in examples[0]:
                values = [example[given] for example in examples]
                by_field = isinstance(values[0], Mapping)
                options[option] = {n: [value[n] for value in values] for n in values[0]} if by_field else values
        batch: RenderedBatch = self.template.render(fields, self.tokenizer, loss=self.loss, **options)
        return batch
