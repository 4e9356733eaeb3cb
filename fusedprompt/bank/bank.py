"""`PromptBank`: the prompts of one base model, thousands of them, and the ways in which they are used."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from .attach import Attached
from .bake import bake
from .payload import Payload, payload_of
from .store import PromptStore


class PromptBank(PromptStore):
    """Prompts for one base model: rows of input embeddings, each with an id of its own behind the vocabulary.

    A folder holds the prompts; memory holds those that were used last. Opening a bank reads its index alone. Each
    version of a prompt has a serial number and ids that no other one ever has: what was begun with one version ends
    with it. Threads may read and write the same bank; of several processes that have a folder open, one writes at a
    time, and what it wrote is seen after `refresh`, or one's own next write. docs/bank.md has the format.

    Args:
        folder: where the prompts are; it is made if missing. None for a temporary one, which goes with the bank.
        base_model: the transformers model that the prompts are for. Needed for a new folder; for one that is there, it
            is compared with what the folder says.
        max_bytes: how much memory rows may take that are kept between uses, on all devices together.

    Attributes:
        vocabulary: V, the tokens of the base model's input embedding. width: D.
        skipped: prompts that were left out when the folder was read, with the reason, which names the file; they were
            warned of, too.

    Raises:
        ValueError: the folder is of another base model, or its index is none.
    """

    def attach(self, model: Any) -> Attached:
        """Let a base model's input embedding answer the bank's ids: `generate`, `generate_batch` and whatever else
        takes ids then takes `bank.ids(name) + text`. Parameters, files and outputs for tokens stay what they are.

        Args:
            model: the transformers model. Its instance is changed, and nothing of its class.

        Returns:
            A handle, to be used in `with` or to be given back by `detach()`. Attributes: bank, model, embedding.

        Raises:
            TypeError, ValueError: it is not the bank's base model, has a bank already, or reads ids in its layers.
        """
        return Attached(self, model)

    def bake(
        self,
        base: Any,
        folder: str | os.PathLike[str],
        tokenizer: Any = None,
        names: Sequence[str] | None = None,
    ) -> dict[str, str]:
        """Write a checkpoint that engines load without this package: the base model with prompts as added tokens
        `<prompt:name:0>` ... behind its vocabulary, a head that never chooses them, and tokenizer and configuration to
        match. The chat template is left alone. prompts.json in it has each prompt's text and ids.

        Args:
            base: the transformers decoder, which is copied, or its folder or name, which is loaded.
            folder: a new or an empty one. It is written whole or not at all.
            tokenizer: the base model's, by default the one of its name.
            names: which prompts, all by default.

        Returns:
            Of each prompt the text of its tokens. Ids in PEFT's order are those in prompts.json, then the text's with
            its special tokens; a tokenizer that begins texts with a special token puts that before this text.

        Raises:
            ValueError: the folder is not empty; the base model is none whose rows and head can be added to; the
                tokenizer has more tokens than the base model.
        """
        return bake(self, base, folder, tokenizer, names)

    def payload(self, name: str, text: str | Sequence[Mapping[str, Any]], base_model: Any, tokenizer: Any) -> Payload:
        """A prompt in front of a text, as engines take it that run elsewhere, without ids of the bank.

        Args:
            text: a string, which gets the tokenizer's special tokens, or messages, which get its chat template and the
                beginning of an answer. The prompt's place is PEFT's: in front of all of it.
            base_model: whose input embedding makes the text's rows. tokenizer: its own.

        Raises:
            TypeError, ValueError: text is neither; it is another base model; the tokenizer has no chat template.
        """
        return payload_of(self, name, text, base_model, tokenizer)
