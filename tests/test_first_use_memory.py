"""How it is found out what a base model does: once, without a trace, and of what can tell."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import transformers

from by_hand import LENGTH, ROWS, batch, llama, prompt_model, relative, why
from families.tiny import build
from fusedprompt.base import first_use
from fusedprompt.base.first_use import remembered
from fusedprompt.base.shortened import shortened


def forget() -> None:
    first_use._of_kind.clear()
    first_use._of_model.clear()


def test_it_is_remembered_for_a_class_and_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    forget()
    made: list[Any] = []
    original = first_use._Trial.__init__

    def count(self: Any, *args: Any, **options: Any) -> None:
        made.append(self)
        original(self, *args, **options)

    monkeypatch.setattr(first_use._Trial, "__init__", count)
    for _ in range(2):
        model = prompt_model(llama())
        for _ in range(2):
            model(**batch("none"))
    assert len(made) == 1
    prompt_model(llama(rope_theta=100.0))(**batch("none"))
    assert len(made) == 2
    model.set_attn_implementation("eager")
    model(**batch("none"))
    assert len(made) == 3


def test_a_line_says_what_was_found_and_a_switch_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    forget()
    model = prompt_model(build("MptForCausalLM"))
    assert "first use" not in model.explain()
    assert model.explain(**batch("none")).splitlines()[-1].startswith("first use: gap: it counts padding")
    assert model.explain().splitlines()[-1].startswith("first use: gap")
    forget()
    monkeypatch.setenv("FUSEDPROMPT_FIRST_USE", "0")
    assert why(model, **batch("left")) == "route shared"
    assert "first use" not in model.explain(**batch("none")) and not first_use._of_kind


def test_it_leaves_no_trace_on_the_model() -> None:
    forget()
    model = prompt_model(llama())
    seen: list[Any] = []
    for part in model.base_model.modules():
        part.register_forward_hook(lambda *_: seen.append(_))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    given = batch("none")
    random = torch.get_rng_state()
    model.explain(**given, labels=given["input_ids"])
    assert remembered(model.base_model).milliseconds is not None
    assert torch.equal(torch.get_rng_state(), random)
    assert not seen
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.base_model.config.num_hidden_layers == 3 and len(model.base_model.model.layers) == 3


def test_the_first_layers_are_enough_until_every_kind_has_occurred() -> None:
    base = llama()
    short = shortened(base)
    assert len(short.model.layers) == 2
    assert short.model.layers[1].mlp.up_proj.weight is base.model.layers[1].mlp.up_proj.weight
    assert short.config.num_hidden_layers == 2 and base.config.num_hidden_layers == 3
    base.model.layers[2].self_attn.sliding_window = 8
    assert len(shortened(base).model.layers) == 3


def test_threads_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import ThreadPoolExecutor

    forget()
    model, given = prompt_model(build("MptForCausalLM")), batch("left")
    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(lambda _: why(model, **given), range(16)))
    assert len(set(said)) == 1 and "counts padding" in said[0]


def test_weights_that_tell_nothing_are_no_others() -> None:
    forget()
    blank = build("MptForCausalLM")
    with torch.no_grad():
        for parameter in blank.parameters():
            parameter.zero_()
    assert why(prompt_model(blank), **batch("left")) == "route shared"
    assert "counts padding" in why(prompt_model(build("MptForCausalLM")), **batch("left"))


def test_what_is_put_into_an_instance_is_no_others() -> None:
    forget()
    assert why(prompt_model(llama()), **batch("none")) == "route shared"
    base = llama()
    inner, original = base.model, base.model.forward

    def mix(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state.cumsum(1)
        return output

    inner.forward = mix
    model, given = prompt_model(base), batch("none")
    assert why(model, **given).startswith("route splice")
    with torch.no_grad():
        assert torch.equal(model(**given).logits, model(**given, route="splice").logits)
    forget()
    assert why(model, **given).startswith("route splice")
    assert why(prompt_model(llama()), **given) == "route shared"


def test_attention_that_is_turned_after_wrapping() -> None:
    model, given = prompt_model(llama()), batch("none")
    assert why(model, **given) == "route shared"
    for layer in model.base_model.model.layers:
        layer.self_attn.is_causal = False
    assert "is_causal=False" in why(model, **given)
    other = prompt_model(llama())
    other.base_model.model.layers[1].self_attn.is_causal = False
    assert "is_causal=False" in why(other, **given)


def test_a_vocabulary_of_a_few_tokens() -> None:
    forget()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = prompt_model(transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=6, **sizes)).eval())
    ids = torch.randint(0, 6, (ROWS, LENGTH))
    assert why(model, input_ids=ids) == "route shared"
    assert torch.isfinite(model(input_ids=ids, labels=ids).loss)


def test_a_compiled_base_model_is_looked_at() -> None:
    compiled = torch.compile(llama(), backend="eager")
    model, given = prompt_model(compiled), batch("none")
    plain = prompt_model(compiled._orig_mod)
    with torch.no_grad():
        plain.prompt_encoder["default"].embedding.weight.copy_(model.prompt_rows())
        assert relative(model(**given).logits, plain(**given).logits) < 2e-4


class Trained(transformers.LlamaForCausalLM):
    """A term of the loss for training alone."""

    def forward(
        self,
        input_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        use_cache: Any = None,
        **kwargs: Any,
    ) -> Any:  # type: ignore[override]
        given = {"past_key_values": past_key_values, "inputs_embeds": inputs_embeds, "use_cache": use_cache}
        output = super().forward(input_ids, **given, **kwargs)
        if self.training and kwargs.get("labels") is not None:
            self.loss_function  # noqa: B018
            output.loss = output.loss + output.logits.square().mean()
        return output


def test_a_term_of_the_loss_for_training_alone() -> None:
    base = llama()
    base.__class__ = Trained
    model, given = prompt_model(base), batch("none")
    for training in (False, True, False):
        model.train(training)
        one, other = (model(**given, labels=given["input_ids"], route=route).loss for route in ("auto", "splice"))
        assert one.item() == pytest.approx(other.item(), rel=1e-5)


@pytest.mark.parametrize("others", ["live on", "are gone while it is compiled"])
def test_a_compiled_model_depends_on_no_other_model(others: str) -> None:
    """What is remembered of other models is neither a reason to compile again, nor missed when it goes."""
    forget()
    held: list[Any] = [prompt_model(llama(rope_theta=float(count + 2))) for count in range(5)]
    for each in held:
        each(**batch("none"))
    model, compiled = prompt_model(llama()), []
    inputs = batch("none")
    expected = model(**inputs).logits

    def backend(module: Any, _: Any) -> Any:
        compiled.append(module)
        if others != "live on":
            held.clear()
            gc.collect()
        return module

    call = torch.compile(model, backend=backend)
    torch.testing.assert_close(call(**inputs).logits, expected)
    before = len(compiled)
    prompt_model(llama(rope_theta=50.0))(**batch("none"))
    torch.testing.assert_close(call(**inputs).logits, expected)
    assert len(compiled) == before > 0
