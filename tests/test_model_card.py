"""The card says what was done and measured, and nothing else."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from transformers import LlamaConfig

from src.common.settings import LossSettings, StudentSettings, TrainSettings
from src.evaluation.results import REQUIRED
from src.proteins.layouts import TaggedProtein, layout_of, set_layout, spelt_out, stop_token
from src.publishing import model_card as m
from src.publishing.usage import Usage
from tests.test_layouts import KINDS, tokenizer_of

USAGE = Usage(
    kind="GPT-2", shape="4 layers, 4 heads, 256 wide", layout="the text of ProtGPT2", tag=None,
    example_tag=None, prompt='"<|endoftext|>\\n"', text='"<|endoftext|>\\n" + residues', end="",
    stop=0, adds_markers=False, penalty=1.2, n_positions=512,
)  # fmt: skip


def make_record(settings: TrainSettings | None = None) -> dict:
    """A run's record as ``src.training.stages.train`` writes it."""
    settings = settings or TrainSettings()
    return {
        "name": "synergy-tiny",
        "status": "finished",
        "settings": asdict(settings),
        "git": {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": False},
        "versions": {"torch": "2.13.0", "transformers": "5.24.0"},
        "device": {"type": "cuda", "name": "NVIDIA H100"},
        "precision": "bf16",
        "max_length": 512,
        "teacher": {"name": settings.teacher_model, "parameters": 774_030_080},
        "student": {"parameters": 38_866_432, "fingerprint": "f" * 64},
        "compression": 774_030_080 / 38_866_432,
        "data": {"train": {"proteins": 4_321_000, "tokens": 400_000_000}},
        "steps": 12_345,
        "train_seconds": 3600.4,
        "final": {"eval_loss": 2.3456},
    }


def make_results() -> dict:
    return {
        **dict.fromkeys(REQUIRED),
        "schema_version": 1,
        "perplexity_ratio": 1.84,
        "kl_divergence": 0.512,
        "student_perplexity": 37.5,
        "teacher_perplexity": 20.4,
        "student_ece": {"ece": 0.031, "calibration_meaningful": True},
        "teacher_ece": {"ece": 0.012},
        "kl_from_natural": {"student": 0.04, "teacher": None},
        "top1_agreement": 0.625,
        "intervals": {"perplexity_ratio": [1.8, 1.88], "student_ece.ece": [0.029, 0.033]},
        "data": {"proteins": 2000, "clusters": 1500},
        "run": {
            "student": {"fingerprint": "f" * 64},
            "teacher": {"name": "nferruz/ProtGPT2"},
            "data": {"source": "data/proteins", "split": "test"},
        },
    }


def card_of(record=None, results=None, license="apache-2.0") -> str:
    return m.build_card("me/synergy-tiny", record or make_record(), USAGE, license, results)


def test_metadata_of_a_student_of_protgpt2():
    data = ModelCard(card_of()).data.to_dict()
    assert data["base_model"] == "nferruz/ProtGPT2"
    assert data["datasets"] == ["nferruz/UR50_2021_04"]
    assert data["license"] == "apache-2.0"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert {"protein", "distillation", "gpt2"} <= set(data["tags"])
    assert "model-index" not in data


def test_model_index_holds_the_figures_of_the_results():
    card = ModelCard(card_of(results=make_results()))
    found = {r.metric_type: r for r in card.data["eval_results"]}
    assert found["perplexity_ratio"].metric_value == 1.84
    assert found["kl_divergence"].metric_value == 0.512
    assert found["ece"].metric_value == 0.031
    assert found["top1_agreement"].metric_value == 0.625
    assert found["kl_from_natural"].metric_value == 0.04
    assert "perplexity_per_residue" not in found  # was not measured
    assert {r.dataset_name for r in found.values()} == {"data/proteins"}
    assert {r.dataset_type for r in found.values()} == {"data-proteins"}
    assert {r.dataset_split for r in found.values()} == {"test"}
    assert card.data["model_name"] == "synergy-tiny"


def test_the_text_shows_figures_with_intervals_beside_the_teachers():
    text = card_of(results=make_results())
    assert "| perplexity per token | 37.500 | 20.400 | 1.840 [1.800, 1.880] |" in text
    assert "| ECE, 15 equal-width bins | 0.031 [0.029, 0.033] | 0.012 |  |" in text
    assert "2,000 proteins of `data/proteins` (test)" in text
    assert "95 % confidence intervals" in text
    assert "KL(teacher‖student): 0.512 nats per token" in text
    assert "not found meaningful" not in text
    results = make_results()
    results["intervals"] = {}
    assert "No confidence intervals" in card_of(results=results)
    results["student_ece"]["calibration_meaningful"] = False
    assert "not found meaningful" in card_of(results=results)


def test_a_student_below_the_floor_is_called_so():
    results = make_results()
    results["floors"] = {"unigram": {"perplexity_per_residue": 18.0}}
    results["student_perplexity_per_residue"] = 17.9
    assert "no better than their frequencies" not in card_of(results=results)
    results["student_perplexity_per_residue"] = 18.0
    assert "no better than their frequencies" in card_of(results=results)


def test_without_results_the_card_says_that_nothing_is_known():
    text = card_of()
    assert "how close it comes to\nits teacher is not known" in text
    assert "2.3456" in text
    assert "by how much was not measured" in text


def test_training_settings_and_origin():
    settings = TrainSettings(
        student=StudentSettings(4, 4, 512),
        loss=LossSettings(use_uncertainty_weighting=True, use_calibration_smoothing=True),
        batch_size=8,
        gradient_accumulation_steps=4,
        seed=7,
    )
    text = card_of(make_record(settings))
    assert "4 layers, 4 heads, 256 wide" in text  # of the configuration that is sent
    assert "38,866,432 parameters" in text
    assert (
        "distilled from [nferruz/ProtGPT2](https://huggingface.co/nferruz/ProtGPT2), which has "
        "774,030,080 parameters: 19.9 times as many" in text
    )
    assert "0.5 × the cross-entropy of the next token + 0.5 × T² × KL(teacher ‖ student)" in text
    assert "weighted by the teacher's entropy" in text
    assert "mixed with the uniform one, by at most 0.1" in text
    assert "| rows of a step | 32 |" in text
    assert "| rows of a step | 128 |" in card_of(make_record(settings) | {"processes": 4})
    assert "| seed | 7 |" in text
    assert "| device | NVIDIA H100 |" in text
    assert "0123456789abcdef0123456789abcdef01234567" in text


def test_local_teachers_and_data_are_named_but_not_linked():
    record = make_record(TrainSettings(teacher_model="data/small_teacher", data="data/proteins"))
    card = ModelCard(card_of(record))
    assert card.data.get("base_model") is None
    assert card.data.get("datasets") is None
    assert "distilled from `data/small_teacher`" in card.text
    assert "proteins of `data/proteins`" in card.text
    assert "huggingface.co/data" not in card.content


def test_fine_tuning_without_a_teacher_is_not_called_distillation():
    settings = TrainSettings(
        loss=LossSettings(alpha=1.0), teacher_model="me/student", init_from="me/student"
    )
    card = ModelCard(card_of(make_record(settings)))
    assert card.data.get("base_model") == "me/student"
    assert "began with the weights of [me/student]" in card.text
    assert "distilled from" not in card.text
    assert "the teacher had no part" in card.text
    assert "imitates" not in card.text
    scratch = TrainSettings(loss=LossSettings(alpha=1.0))
    card = ModelCard(card_of(make_record(scratch)))
    assert card.data.get("base_model") is None
    assert "trained without a teacher" in card.text


def test_a_model_with_a_tokenizer_and_no_teacher_has_a_card():
    settings = TrainSettings(
        loss=LossSettings(alpha=1.0), teacher_model=None, tokenizer="me/tokenizer"
    )
    record = make_record(settings) | {"teacher": None, "compression": None}
    assert m.chosen_licence(record, "mit") == "mit"
    with pytest.raises(ValueError, match="this model had no teacher.*--license"):
        m.chosen_licence(record, None)
    card = ModelCard(card_of(record, license="mit"))
    assert "with the tokenizer of [me/tokenizer](https://huggingface.co/me/tokenizer)" in card.text
    assert "mit. The training data" in card.text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nferruz/ProtGPT2", "nferruz/ProtGPT2"),
        ("data/small_teacher", None),
        ("models/x", None),
        ("./x/y", None),
        ("x.fasta", None),
        ("a/b/c", None),
        ("", None),
        (None, None),
    ],
)
def test_what_is_a_name_on_the_hub(name, expected):
    assert m.hub_id(name) == expected


def test_an_existing_directory_is_no_name_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert m.hub_id("owner/name") == "owner/name"
    monkeypatch.chdir(tmp_path)
    assert m.hub_id("owner/name") is None
    assert (
        m.hub_id("src/publishing/templates") is None
    )  # of the project, wherever the command is given


def test_licence_of_the_teacher_or_as_asked_or_refused(tmp_path):
    assert m.chosen_licence(make_record(), None) == "apache-2.0"
    assert m.chosen_licence(make_record(), "mit") == "mit"
    unknown = make_record(TrainSettings(teacher_model="some/body"))
    with pytest.raises(ValueError, match=r"some/body.*--license"):
        m.chosen_licence(unknown, None)
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# A teacher\n")
    local = make_record(TrainSettings(teacher_model=str(tmp_path)))
    assert m.chosen_licence(local, None) == "cc-by-4.0"
    (tmp_path / "README.md").write_text("no metadata")
    with pytest.raises(ValueError, match="--license"):
        m.chosen_licence(local, None)


def test_odd_names_break_neither_tables_nor_metadata():
    record = make_record(TrainSettings(data="odd | name\n# Title <script>"))
    record["name"] = "x: [y] <script>\n---\nlicense: none"
    card = ModelCard(card_of(record))
    assert card.data["license"] == "apache-2.0"
    assert "<script>" not in card.text
    assert "\n# Title" not in card.text
    assert r"odd \| name # Title" in card.text


def test_nothing_is_left_unfilled_and_tables_are_whole():
    for results in (None, make_results()):
        text = card_of(results=results)
        assert "{{ " not in text
        assert "{%" not in text
        assert "None" not in re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        assert "undefined" not in text.lower()
        for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            lines = block.splitlines()
            columns = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
            assert len(columns) == 1, block
            assert set(lines[1]) <= set("|-")
        assert "\n\n\n" not in text


def test_citations_are_whole_bibtex_entries():
    text = card_of()
    entries = text[text.index("```bibtex") :]
    assert entries.count("{") == entries.count("}")
    assert "10.1038/s41467-022-32007-7" in entries
    assert "protein-lm-distill" in entries


def test_sampling_advice_suits_the_tokens():
    """Where tokens are single residues, a penalty would only flatten the distribution."""
    letters = m.build_card("me/x", make_record(), replace(USAGE, penalty=1.0), "mit")
    assert "repetition_penalty" not in letters
    assert "top_k=0" in letters
    assert "repetition_penalty=1.2" in card_of()


# The code of a card lays proteins out as the project does, whatever the layout


PROTEIN = "MKVLAAGIAVWHERE".replace("WHERE", "QFT") * 9
CONFIG = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, hidden_size=64)


def usage_of(kind: str, layout: str | None = None):
    tokenizer = tokenizer_of(kind)
    set_layout(tokenizer, spelt_out(layout or kind, tokenizer))
    return tokenizer, Usage.of(tokenizer, CONFIG)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        *((kind, None) for kind in KINDS),
        ("plain", "spaced"),
        ("plain", "{begin}\\n{lines}{end}"),
        ("zymctrl", "<start>{EC}<sep>{residues}<end>"),
    ],
)
def test_the_code_on_a_card_gives_the_layout(kind, layout):
    tokenizer, usage = usage_of(kind, layout)
    known = {"residues": PROTEIN, "tag": usage.example_tag}
    protein = TaggedProtein(PROTEIN, str(usage.example_tag))
    assert eval(usage.text, known) == layout_of(tokenizer).text(protein)
    assert eval(usage.prompt, known) == layout_of(tokenizer).prompt(protein[:0])
    assert usage.stop == stop_token(tokenizer)
    assert (usage.tag is None) == ("EC" not in layout_of(tokenizer).template)


def test_protgpt2_is_named_and_others_are_shown(tiny_tokenizer):
    gpt2 = SimpleNamespace(model_type="gpt2", n_positions=256, max_position_embeddings=256)
    usage = Usage.of(tiny_tokenizer, gpt2)
    assert usage.kind == "GPT-2"
    assert usage.layout.startswith("the text of ProtGPT2")
    assert usage.prompt == '"<|endoftext|>\\n"'
    _, other = usage_of("progen")
    assert other.kind == "llama model"
    assert other.shape == "2 layers, 4 heads, 64 wide"
    assert "`1{residues}2`" in other.layout


def test_markers_that_a_tokenizer_adds_by_itself_are_not_added_twice():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_of("plain")
    assert not Usage.of(tokenizer, CONFIG).adds_markers
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 2)])
    assert Usage.of(tokenizer, CONFIG).adds_markers


def test_a_layout_that_nothing_ends_is_refused():
    with pytest.raises(ValueError, match="nothing ends a protein: write its marker behind"):
        usage_of("progen", "1{residues}")
