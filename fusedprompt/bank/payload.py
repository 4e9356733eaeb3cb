"""A prompt and a text as embeddings, in the forms in which vLLM, SGLang and transformers take them.

The forms are those of vLLM's documentation (features/prompt_embeds, `EmbedsPrompt`; parts of chats:
vllm-project/vllm#40720) and of SGLang's `/generate` (`input_embeds`).
"""

from __future__ import annotations

import base64
import copy
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..base.facts import BaseFacts

if TYPE_CHECKING:
    from .store import PromptStore

_MARK = "fusedprompt stands here"


@dataclass(frozen=True)
class Payload:
    """A prompt of P rows in front of a text of T tokens.

    name: the prompt's. rows: (P, D), text_embeds: (T, D), both on the CPU, in the dtype of the base model's embeddings.
    ids: the text's. messages: what the text was made of; None of a string.
    opening: what the chat template puts before the first message's content; None where that cannot be told.
    """

    name: str
    rows: Tensor
    text_embeds: Tensor
    ids: tuple[int, ...]
    messages: tuple[Mapping[str, Any], ...] | None
    opening: str | None

    @property
    def embeds(self) -> Tensor:
        """(P + T, D)."""
        return torch.cat((self.rows, self.text_embeds))

    def vllm(self) -> dict[str, Any]:
        """vLLM offline, `LLM.generate`: embeddings of all, (P + T, D)."""
        return {"prompt_embeds": self.embeds}

    def vllm_mixed(self) -> dict[str, Any]:
        """vLLM offline: ids of the text, and embeddings where the mask says that there is no token (0 stands there)."""
        missing = len(self.rows)
        return {
            "prompt_token_ids": [*[0] * missing, *self.ids],
            "prompt_is_token_ids": [*[False] * missing, *[True] * len(self.ids)],
            "prompt_embeds": self.embeds,
        }

    def vllm_completions(self) -> dict[str, str]:
        """vLLM's server, a field of `/v1/completions` (`extra_body` of OpenAI's client): base64 of a saved tensor."""
        return {"prompt_embeds": _base64(self.embeds)}

    def vllm_chat(self) -> dict[str, Any]:
        """vLLM's server, `/v1/chat/completions`: the rows as a part of the first message, whose template the server
        applies. The rows are not in PEFT's place: see `differs`.

        Raises:
            ValueError: the text was a string.
        """
        if self.messages is None:
            raise ValueError("text: expected messages for a chat, got a string; use vllm_completions")
        first, *others = copy.deepcopy([*self.messages])
        content = first["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else [*content]
        part = {"type": "prompt_embeds", "data": _base64(self.rows)}
        return {"messages": [{**first, "content": [part, *parts]}, *others]}

    def sglang(self) -> dict[str, Any]:
        """SGLang's server, `/generate` (with --disable-radix-cache): P + T lists of D numbers."""
        return {"input_embeds": self.embeds.float().tolist()}

    def transformers(self) -> dict[str, Tensor]:
        """`generate` of transformers: a batch of one row."""
        embeds = self.embeds.unsqueeze(0)
        return {"inputs_embeds": embeds, "attention_mask": torch.ones(embeds.shape[:2], dtype=torch.int64)}

    @property
    def differs(self) -> dict[str, str]:
        """Forms in which the model does not see what it was trained on, and how so."""
        if self.messages is None or self.opening == "":
            return {}
        behind = "what the chat template begins with" if self.opening is None else repr(self.opening)
        return {"vllm_chat": f"the rows stand behind {behind}, and not in front of all"}


def payload_of(bank: PromptStore, name: str, text: Any, base_model: Any, tokenizer: Any) -> Payload:
    """See `PromptBank.payload`."""
    bank._check_base(base_model)
    if BaseFacts.of(base_model).placeholder is not None:
        kind = type(base_model).__name__
        raise ValueError(f"base_model: expected layers that read embeddings alone, got {kind}, whose layers read ids")
    messages, opening = None, None
    if isinstance(text, str):
        ids = tokenizer(text)["input_ids"]
    elif isinstance(text, Sequence) and text and all(isinstance(one, Mapping) and "content" in one for one in text):
        messages, opening = tuple(copy.deepcopy([*text])), _opening(text, tokenizer)
        ids = tokenizer(_rendered(text, tokenizer), add_special_tokens=False)["input_ids"]
    else:
        raise TypeError(f"text: expected a string or messages with 'content', got {text!r}")
    embedding, rows = base_model.get_input_embeddings(), bank.rows(name)
    with torch.no_grad():
        embeds = embedding(torch.tensor(ids, dtype=torch.int64, device=embedding.weight.device))
    embeds = embeds.detach().cpu().reshape(len(ids), bank.width)
    return Payload(name, rows.to(embeds.dtype), embeds, tuple(ids), messages, opening)


def _rendered(messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> str:
    text: str = tokenizer.apply_chat_template([*messages], tokenize=False, add_generation_prompt=True)
    return text


def _opening(messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> str | None:
    first, *others = messages
    content = first["content"]
    parts = _MARK + content if isinstance(content, str) else [{"type": "text", "text": _MARK}, *content]
    before, mark, _ = _rendered([{**first, "content": parts}, *others], tokenizer).partition(_MARK)
    return before if mark else None


def _base64(tensor: Tensor) -> str:
    buffer = io.BytesIO()
    torch.save(tensor.detach().clone().contiguous(), buffer)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
