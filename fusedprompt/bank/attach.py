"""A base model whose input embedding answers the ids of a bank's rows, until it is detached."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..base.facts import BaseFacts, check_base_model
from ..base.own_forward import own_forward

if TYPE_CHECKING:
    from .store import PromptStore

_PROCESSORS = "_get_logits_processor"
_lock = threading.Lock()


class Attached:
    """A bank on a base model: within `with bank.attach(model):`, or until `detach`.

    The input embedding, with its hooks, runs as ever on ids that are tokens; where an id is a bank's, its output is
    that row, in the embedding's dtype. The output layer stays as it is: there are no logits of rows, so that none is
    ever generated. Processors of logits, which use ids as columns, see the first token of the text in place of rows.

    Attributes:
        bank: the bank. model: the base model.
    """

    def __init__(self, bank: PromptStore, model: Any) -> None:
        check_base_model(model)
        facts = BaseFacts.of(model)
        if facts.placeholder is not None:
            kind = type(model).__name__
            raise ValueError(f"model: expected layers that read embeddings alone, got {kind}, whose layers read ids")
        bank._check_base(model)
        self.bank, self.model = bank, model
        self.embedding: Any = model.get_input_embeddings()
        with _lock:
            if isinstance(vars(self.embedding).get("forward"), Attached):
                raise ValueError("model: expected one without a bank, got one that has another; detach that first")
            self._before, self._own = vars(self.embedding).get("forward"), own_forward(self.embedding)
            self._detached = False
            # The instances' dictionaries, without nn.Module.__setattr__ (which DDP and others watch).
            self.embedding.__dict__["forward"] = self
            if hasattr(model, _PROCESSORS):
                self._make_processors = getattr(model, _PROCESSORS)
                model.__dict__[_PROCESSORS] = self._processors

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: Any) -> None:
        self.detach()

    def detach(self) -> None:
        """Give the model back as it was. A second time does nothing.

        Raises:
            RuntimeError: something else has replaced the embedding's `forward` since, which would be lost.
        """
        with _lock:
            own = vars(self.embedding)
            if self._detached:
                return
            if own.get("forward") is not self:
                raise RuntimeError("detach: expected what came later to the input embedding to be undone first")
            del own["forward"]
            if self._before is not None:
                own["forward"] = self._before
            vars(self.model).pop(_PROCESSORS, None)
            self._detached = True

    def __call__(self, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The input embedding's `forward`.

        Raises:
            IndexError: an id is neither a token's nor a row's.
            ValueError: tokens were added up to the bank's ids.
        """
        virtual = self._virtual(ids)
        if virtual is None:
            result: Tensor = self._own(ids, *args, **kwargs)
            return result
        if self.embedding.weight.shape[0] > self.bank.first_id:
            size = self.embedding.weight.shape[0]
            raise ValueError(f"model: expected at most {self.bank.first_id} tokens beside the bank's ids, got {size}")
        embedded: Tensor = self._own(ids.masked_fill(virtual, 0), *args, **kwargs)
        rows = self.bank._look_up(ids[virtual], embedded.device).to(embedded.dtype)
        return embedded.masked_scatter(virtual.unsqueeze(-1), rows)

    def _virtual(self, ids: Tensor) -> Tensor | None:
        """Which ids are the bank's; None where none is, as in every step after the first (one read from the device)."""
        virtual = ids >= self.bank.first_id
        return virtual if bool(virtual.any()) else None

    def _processors(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' processors of logits, called with ids that are columns of logits."""
        from transformers import LogitsProcessorList

        see = self._seen

        class OfTokens(LogitsProcessorList):  # type: ignore[misc]
            def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
                return super().__call__(see(input_ids), scores, **kwargs)

        if isinstance(kwargs.get("encoder_input_ids"), Tensor):
            kwargs["encoder_input_ids"] = see(kwargs["encoder_input_ids"])
        return OfTokens(self._make_processors(*args, **kwargs))

    def _seen(self, ids: Tensor) -> Tensor:
        """(B, S): the first token of each row's text where its prompt's rows stand."""
        virtual = None if ids.is_floating_point() else self._virtual(ids)
        if virtual is None:
            return ids
        pad = getattr(self.model.generation_config, "pad_token_id", None)
        is_text = ~virtual if pad is None else ~virtual & (ids != pad)
        first = ids.gather(1, is_text.to(torch.int8).argmax(1, keepdim=True))
        return torch.where(virtual, first.masked_fill(first >= self.bank.first_id, 0), ids)
