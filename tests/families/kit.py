"""What the checks of a family share: its batch, what is right by hand, and what counts as a fault.

By hand means without this package: the prompt's rows and the text's embeddings of one unpadded row, joined by
`torch.cat`, through the base model's own `forward`. A family that wants the ids themselves gets ids, and its embedding
is told what to answer in the prompt's place.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fusedprompt

from .tiny import BOS, HEADS, PAD, VOCABULARY, build

ROWS, LENGTH, PROMPT, SHORT = 4, 14, 30, 11
TOLERANCE = 2e-4  # of the largest value, in fp32, with weights four times as large as transformers draws them
GRADIENTS = 2e-3  # of the largest entry
MASKS: dict[str, list[tuple[int, int, int]]] = {  # row, first and last column of padding
    "no": [],
    "right": [(1, 8, 14), (3, 11, 14)],
    "left": [(1, 0, 6), (2, 0, 3)],
    "mixed": [(0, 0, 4), (1, 9, 14), (2, 0, 2), (2, 12, 14)],
}
_PACKAGE = str(Path(fusedprompt.__file__).parent)


class Difference(AssertionError):
    """A number that is not what it must be."""


class NoOracle(Exception):
    """The base model cannot do by itself what the prompt is to be added to, or PEFT cannot."""


def is_ours(error: BaseException) -> bool:
    """Whether an error is a refusal of the package's, and not one that fell out of the base model."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return frame.filename.startswith(_PACKAGE) and isinstance(
        error, (ValueError, TypeError, NotImplementedError, fusedprompt.BackendUnavailable)
    )


def one_line(error: BaseException, length: int = 160) -> str:
    """An error's kind and the beginning of what it says."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:length]}".rstrip(": ")


@contextlib.contextmanager
def oracle(whose: str = "the base model") -> Iterator[None]:
    """An error in here says that there is nothing to compare with."""
    try:
        yield
    except (Difference, NoOracle, TimeoutError):
        raise
    except Exception as error:
        raise NoOracle(f"{whose} fails: {one_line(error)}") from error


def same(what: str, found: Tensor, right: Tensor, tolerance: float = TOLERANCE) -> None:
    """Refuse values that are further apart than rounding."""
    if found.shape != right.shape:
        raise Difference(f"{what} has shape {tuple(found.shape)} where {tuple(right.shape)} is right")
    if not right.numel():
        return
    found, right = found.detach().float(), right.detach().float()
    error = float((found - right).abs().max() / right.abs().max().clamp(min=1e-6))
    if not error <= tolerance:
        raise Difference(f"{what} off by {error:.1e}")


def mask_of(kind: str) -> Tensor:
    """(ROWS, LENGTH): which tokens are not padding."""
    mask = torch.ones(ROWS, LENGTH, dtype=torch.int64)
    for row, first, last in MASKS[kind]:
        mask[row, first:last] = 0
    return mask


def text_of(mask: Tensor, row: int) -> Tensor:
    """The columns of a row that are not padding."""
    return mask[row].nonzero().flatten()


class Family:
    """A tiny model of a class, and what is asked of it."""

    def __init__(
        self, name: str, task: str, seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any
    ) -> None:
        self.name, self.task, self.seed, self.dtype = name, task, seed, dtype
        self.base = build(name, seed, **fields).to(dtype)
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=generator)
        self._answers: dict[tuple[int, ...], Tensor] = {}

    @property
    def task_type(self) -> str:
        """The task of a configuration that serves the mapping."""
        return "CAUSAL_LM" if self.task == "MASKED_LM" else self.task

    def settings(self, rows: int = PROMPT) -> dict[str, Any]:
        """Fields of a prompt's configuration that a composed base model does not always tell."""
        return {
            "task_type": self.task_type,
            "num_virtual_tokens": rows,
            "num_attention_heads": HEADS,
            "num_layers": 2,
        }

    @cached_property
    def model(self) -> Any:
        """The package's model, with a long prompt and a short one."""
        torch.manual_seed(self.seed + 1)
        model = fusedprompt.get_prompt_model(self.base, fusedprompt.PromptTuningConfig(**self.settings()))
        model.add_adapter("short", fusedprompt.PromptTuningConfig(**self.settings(SHORT)))
        model.set_adapter("default")
        return model.eval()

    def rows(self, adapter: str = "default") -> Tensor:
        """(P, D): an adapter's rows."""
        weight: Tensor = self.model.prompt_encoder[adapter].embedding.weight.detach()
        return weight

    def batch(self, kind: str) -> dict[str, Tensor]:
        """The batch with padding of a kind."""
        mask = mask_of(kind)
        ids = self.ids.masked_fill(mask == 0, PAD)
        return {"input_ids": ids, "attention_mask": mask}

    def step_batch(self, kind: str) -> dict[str, Tensor]:
        """The same with labels, where PEFT takes them."""
        given = self.batch(kind)
        if self.task_type == "CAUSAL_LM":
            given["labels"] = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
        elif self.task == "SEQ_CLS":
            given["labels"] = torch.arange(ROWS) % 2
        elif self.task == "SEQ_2_SEQ_LM":
            given["labels"] = self.labels
        return given

    # By hand

    @cached_property
    def wants_ids(self) -> bool:
        """Whether embeddings alone are not what the base model makes of ids."""
        ids = self.ids[:1]
        try:
            with torch.no_grad():
                by_ids = self.base(input_ids=ids, **self.decoder(1))
                by_rows = self.base(inputs_embeds=self.base.get_input_embeddings()(ids), **self.decoder(1))
                return not torch.allclose(first_of(by_ids), first_of(by_rows), rtol=1e-3, atol=1e-4)
        except Exception:
            return True

    def decoder(self, size: int) -> dict[str, Tensor]:
        """What an encoder-decoder is given for its decoder."""
        if self.task != "SEQ_2_SEQ_LM":
            return {}
        return {"labels": self.labels[:size]}

    @cached_property
    def labels(self) -> Tensor:
        """(ROWS, 5): what an encoder-decoder is to say."""
        return torch.randint(3, VOCABULARY, (ROWS, 5), generator=torch.Generator().manual_seed(9))

    def alone(self, ids: Tensor, rows: Tensor | None = None, **others: Any) -> Any:
        """The base model's output for one row's text (t,) behind a prompt."""
        rows = self.rows() if rows is None else rows
        with oracle(), torch.no_grad():
            if not self.wants_ids:
                text = self.base.get_input_embeddings()(ids.unsqueeze(0))
                joined = torch.cat((rows.unsqueeze(0).to(text.dtype), text), 1)
                return self.base(inputs_embeds=joined, **others)
            with self.answering(rows) as dummy:
                wide = torch.cat((dummy, ids)).unsqueeze(0)
                return self.base(input_ids=wide, **others)

    @contextlib.contextmanager
    def answering(self, rows: Tensor) -> Iterator[Tensor]:
        """The embedding answers with a prompt's rows for the first ids of what is longer than they are: those ids."""
        per_layer = "per_layer" in str(self.base.config)
        if getattr(self.base.config, "is_encoder_decoder", False):
            raise NoOracle("encoder and decoder share an embedding, and embeddings are not taken")

        def answer(_: Any, args: Any, output: Tensor) -> Tensor:
            if not isinstance(output, Tensor):
                raise NoOracle("the embedding does not answer with a tensor")
            if output.dim() != 3 or output.shape[1] <= len(rows):
                return output
            expanded = rows.to(output.dtype).expand(len(output), -1, -1)
            return torch.cat((expanded, output[:, len(rows) :]), 1)

        hook = self.base.get_input_embeddings().register_forward_hook(answer)
        try:
            yield torch.full((len(rows),), PAD if per_layer else BOS)
        finally:
            hook.remove()

    def text_logits(self, ids: Tensor, rows: Tensor | None = None) -> Tensor:
        """(t, V): a language model's logits of one row's text (t,) behind a prompt."""
        key = tuple(ids.tolist())
        if rows is None and key in self._answers:
            return self._answers[key]
        found: Tensor = self.alone(ids, rows).logits[0, -len(ids) :]
        if rows is None:
            self._answers[key] = found
        return found


def first_of(output: Any) -> Tensor:
    """The values that an output is about."""
    for name in ("logits", "start_logits"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    raise NoOracle(f"an output of {sorted(output)}")
