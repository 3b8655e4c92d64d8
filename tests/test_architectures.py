"""Every causal architecture gives its own probabilities by this project's path, or is refused.

Models are tiny and random. The project's path is a padded batch, the input of the output head, and
the head as :func:`src.models.forward.output_head` has it; the model's own is one row alone.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from src.common.settings import LossSettings
from src.evaluation.scoring import score_proteins
from src.evaluation.variants import variant_nll
from src.loss.fused import StudentStates, fused_distillation_losses
from src.loss.reference import distillation_loss
from src.models.decoding import Decoder, sampling_room
from src.models.forward import (
    NotCausalError,
    final_hidden_states,
    head_form,
    keeps_packed_apart,
    output_head,
    require_packing,
    stated_positions,
)
from src.models.loading import (
    ProteinModel,
    load_causal_lm,
    max_positions,
    model_fingerprint,
    student_positions,
)
from src.models.teacher_cache import capture
from src.proteins.tokenizer import train_tokenizer
from src.trainer.adapter import TrainerAdapter
from tests.conftest import make_proteins

VOCABULARY = 40
HIDDEN = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
COMMON = {
    **HIDDEN,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GPT |= {"initializer_range": 0.2}
D_MODEL = {"vocab_size": VOCABULARY, "d_model": 32}
ARCHITECTURES: dict[str, dict] = {
    "gpt2": GPT,
    "gptj": {**GPT, "rotary_dim": 4},
    "codegen": {**GPT, "rotary_dim": 4},
    "gpt_bigcode": GPT,
    "ctrl": {**GPT, "dff": 48},
    "openai-gpt": GPT,
    "gpt_neo": {
        **HIDDEN,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 64,
        "window_size": 16,
    },
    "mpt": {**D_MODEL, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "bloom": {**HIDDEN, "n_head": 4},
    "rwkv": HIDDEN,
    "mamba": {**HIDDEN, "state_size": 8},
    "mamba2": {
        **HIDDEN,
        "state_size": 8,
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "opt": {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 16},
    "xglm": {
        **D_MODEL,
        "num_layers": 2,
        "attention_heads": 4,
        "ffn_dim": 48,
        "max_position_embeddings": 64,
    },
    "biogpt": COMMON,
    "falcon": COMMON,
    "falcon, alibi": {**COMMON, "alibi": True},
    "bert, decoder": {**COMMON, "is_decoder": True},
    "modernbert-decoder": COMMON,
    "gemma": {**COMMON, "head_dim": 8},
    "gemma2": {**COMMON, "head_dim": 8, "final_logit_softcapping": 3.0, "sliding_window": 16},
    "gemma3_text": {**COMMON, "head_dim": 8, "final_logit_softcapping": 30.0},
    "nanochat": COMMON,
    "cohere": COMMON,
    "cohere2": {**COMMON, "logit_scale": 0.3, "sliding_window": 16},
    "granite": {**COMMON, "logits_scaling": 6.0},
    "falcon_h1": {
        **COMMON,
        "lm_head_multiplier": 0.3,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_state": 8,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
    },
    "mixtral": {**COMMON, "num_local_experts": 4},
    "jamba": {
        **COMMON,
        "mamba_d_state": 8,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 2,
        "use_mamba_kernels": False,
    },
    "gpt_neox": COMMON,
    "llama": COMMON,
    "mistral": {**COMMON, "sliding_window": 16},
    "qwen3": {**COMMON, "head_dim": 8},
    "phi": COMMON,
    "phi3": COMMON,
    "stablelm": COMMON,
    "olmo2": COMMON,
    "starcoder2": COMMON,
    "bert": COMMON,
    "roberta": COMMON,
    "electra": COMMON,
    "xlnet": {**D_MODEL, "n_layer": 2, "n_head": 4, "d_inner": 48},
}
NOT_CAUSAL = {"bert", "roberta", "electra", "xlnet"}
LEAKING = {
    *("opt", "xglm", "openai-gpt", "bloom", "mpt", "biogpt", "bert, decoder"),
    *("rwkv", "mamba", "mamba2", "jamba", "falcon_h1"),
}
"""Models whose packed proteins see each other."""
FORMS = {
    "gemma2": (1.0, 3.0),
    "gemma3_text": (1.0, 30.0),
    "nanochat": (1.0, 15.0),
    "cohere": (0.0625, None),
    "cohere2": (0.3, None),
    "granite": (1 / 6, None),
    "falcon_h1": (0.3, None),
}
"""Scale and cap of the logits, where there are any."""


def build(name: str):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.split(",")[0], **ARCHITECTURES[name])
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases that do something
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def rows(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (len(lengths), max(lengths))
    ids = torch.randint(3, VOCABULARY, shape, generator=generator)
    mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    return ids.masked_fill(mask == 0, 0), mask


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_checkpoint_gives_back_every_weight(name, tmp_path):
    """Also where transformers saves weights under other names, as GPT-NeoX's head."""
    model = build(name)
    trainer: Any = SimpleNamespace(
        model=model, accelerator=SimpleNamespace(unwrap_model=lambda m: m), processing_class=None
    )
    before = {key: value.clone() for key, value in model.state_dict().items()}
    TrainerAdapter.write_model(trainer, tmp_path, as_trained=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    TrainerAdapter.read_model(trainer, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_log_probabilities_are_the_models_own(name):
    model = build(name)
    if name in NOT_CAUSAL:
        with pytest.raises(NotCausalError, match="is not causal"):
            output_head(model)
        return
    form = head_form(model)
    assert form.linear
    scale, cap = FORMS.get(name, (1.0, None))
    assert form.scale == pytest.approx(scale, rel=1e-6)
    assert form.cap == (cap if cap is None else pytest.approx(cap, rel=1e-6))
    ids, mask = rows(21, 9, 14)
    head = output_head(model)
    ours = head.logits(final_hidden_states(model, ids, mask)).log_softmax(-1)
    for row, length in enumerate(mask.sum(1).tolist()):
        own = model(input_ids=ids[row : row + 1, :length]).logits[0].log_softmax(-1)
        assert (ours[row, :length] - own).abs().max() < 1e-5
    assert keeps_packed_apart(model) == (name not in LEAKING)


def test_a_head_of_another_kind_is_run_for_its_logits(tiny_lm, capsys):
    """Column sums to 0: no scale, no cap. The plain form is used, and is right."""
    model = tiny_lm()
    plain = type(model).forward

    def centred(self, *args, **kwargs):
        output = plain(self, *args, **kwargs)
        output.logits = output.logits - output.logits.abs().mean(-1, keepdim=True) * torch.arange(
            output.logits.shape[-1]
        )
        return output

    model.forward = centred.__get__(model)
    assert not head_form(model).linear
    assert "GPT2LMHeadModel: its logits do not follow" in capsys.readouterr().out
    ids, mask = rows(9, 6)
    with torch.no_grad():
        ours = output_head(model).logits(final_hidden_states(model, ids, mask))
        torch.testing.assert_close(ours[0], model(ids[:1]).logits[0], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "cohere2", "modernbert-decoder"])
def test_gradients_are_those_of_the_models_own_logits(name):
    teacher, student = build(name), build(name)
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ids, mask = rows(13, 8)
    settings = LossSettings(use_uncertainty_weighting=True, use_calibration_smoothing=True)
    found = []
    for fused in (True, False):
        student.zero_grad()
        with torch.no_grad():
            taught = final_hidden_states(teacher, ids, mask)
            logits = teacher(input_ids=ids, attention_mask=mask).logits
        if fused:
            states = StudentStates(
                final_hidden_states(student, ids, mask), output_head(student), settings
            )
            (parts,) = fused_distillation_losses(
                [states], taught, output_head(teacher), ids, mask, chunk_tokens=5
            )
        else:
            own = student(input_ids=ids, attention_mask=mask).logits
            parts = distillation_loss(own, logits, ids, mask, settings)
        parts.loss.backward()
        gradients = [p.grad.flatten() for p in student.parameters() if p.grad is not None]
        found.append((parts.loss.item(), torch.cat(gradients)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert (found[0][1] - found[1][1]).norm() < 1e-4 * found[1][1].norm()


def test_a_cache_of_a_capped_teacher_holds_its_own_figures(tmp_path):
    from tests.small_runs import Tokens

    teacher = build("gemma2")
    tokens: Any = Tokens(4)
    tokens.rows = [row % VOCABULARY for row in tokens.rows]
    tokens.fingerprint = "f" * 64  # type: ignore[attr-defined]
    cache = capture(teacher, tokens, tmp_path, announce=lambda line: None)
    assert not cache.folder.name.startswith(model_fingerprint(teacher)[:16])  # those of no cap
    hidden, figures = cache[2]
    with torch.no_grad():
        own = teacher(torch.from_numpy(np.asarray(tokens[2]))[None]).logits[0]
        assert torch.allclose(output_head(teacher).logits(hidden), own, atol=1e-5)
    log_probs = own.log_softmax(-1)
    assert torch.allclose(figures[:, 0], -(log_probs.exp() * log_probs).sum(-1), atol=1e-4)
    assert torch.allclose(figures[:, 1], own.amax(-1), atol=1e-5)


SAMPLED = {"mistral": 16, "llama": 64, "bloom": 30, "gemma2": 16}
"""Most tokens of a sampled row: positions, window, or what is asked for."""


@pytest.mark.parametrize("name", SAMPLED)
@torch.no_grad()
def test_tokens_sampled_one_by_one_follow_the_models_own_logits(name):
    """Rows of different lengths, up to the length at which a window would slide."""
    model = build(name)
    room = sampling_room(model, 30 if name == "bloom" else None)
    assert room == SAMPLED[name]
    ids, _ = rows(room, room)
    decoder = Decoder(model, ids[0, :2], room)
    decoder.begin(2)
    for width in range(2, room):
        logits = decoder.step(ids[:, width - 1] if width > 2 else ids[0, 1].repeat(2))
        own = [model(input_ids=row[None, :width]).logits[0, -1] for row in prompted(ids)]
        assert torch.allclose(logits, torch.stack(own), atol=1e-4)


def prompted(ids: torch.Tensor) -> torch.Tensor:
    """Return rows that begin with the first row's two tokens."""
    return torch.cat([ids[:1, :2].repeat(len(ids), 1), ids[:, 2:]], 1)


@pytest.mark.parametrize("name", ["mamba", "rwkv", "openai-gpt", "jamba"])
def test_what_cannot_be_sampled_says_so(name):
    with pytest.raises(ValueError, match="proteins cannot be sampled from it"):
        sampling_room(build(name), 20)


def test_a_model_without_a_longest_input_asks_for_one():
    model = build("bloom")
    assert stated_positions(model.config) is None
    with pytest.raises(ValueError, match="states no longest input.*--max_length"):
        max_positions(model.config)
    assert max_positions(model.config, 30) == 30
    assert student_positions(model.config, 30) == 30


def test_packing_is_refused_where_proteins_see_each_other():
    require_packing(build("llama"))
    with pytest.raises(ValueError, match="--batching packed: in BloomForCausalLM"):
        require_packing(build("bloom"))


@pytest.mark.parametrize("name", ["rwkv", "openai-gpt", "mamba"])
def test_variants_of_a_model_without_such_a_cache_are_scored_one_by_one(name):
    tokenizer = train_tokenizer(make_proteins(20), 28, n_positions=40)
    loaded = ProteinModel(build(name), tokenizer)
    others = ["MKVLAAGIA", "MKVLACGIA", "MK"]
    found = variant_nll(loaded, "MKVLAAGIA", others)
    np.testing.assert_allclose(found, score_proteins(*loaded, others).nll, rtol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "codegen"])
def test_the_activation_is_fused_and_says_the_same(tmp_path, name):
    config = AutoConfig.for_model(name, **ARCHITECTURES[name])
    assert config.activation_function == "gelu_new"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    loaded = load_causal_lm(tmp_path)
    ids = torch.randint(3, VOCABULARY, (2, 20))
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)
    activations = {type(module) for module in loaded.modules() if "GELU" in type(module).__name__}
    assert activations == {torch.nn.GELU}
    assert model_fingerprint(loaded) == model_fingerprint(model)
    loaded.save_pretrained(tmp_path / "again")
    assert AutoConfig.from_pretrained(tmp_path / "again").activation_function == "gelu_new"
    x = torch.linspace(-30, 30, 999, dtype=torch.float64)
    inner = (2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)
    fused = next(m for m in loaded.modules() if isinstance(m, torch.nn.GELU))
    torch.testing.assert_close(fused(x), 0.5 * x * (1 + torch.tanh(inner)), rtol=1e-12, atol=1e-15)
