"""What the tests share: the repository on the path, a tiny tokenizer and tiny models."""

from __future__ import annotations

import errno
import gzip
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# No test may wait for a model hub or report to an account.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Without a GPU our kernels run in Triton's interpreter, a switch that it reads when imported.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

TINY_VOCABULARY = 64


def _has_mmseqs() -> bool:
    from src.proteins.homology import find_mmseqs

    try:
        return bool(find_mmseqs())
    except ValueError:
        return False


needs_mmseqs = pytest.mark.skipif(not _has_mmseqs(), reason="needs MMseqs2")


def run_python(
    *arguments, cwd: Path = ROOT, variables: Mapping[str, str | None] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own; a variable that is None is not in its environment."""
    wanted = {**os.environ, **(variables or {})}
    environment = {name: value for name, value in wanted.items() if value is not None}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


def make_proteins(count: int, low: int = 20, high: int = 120, seed: int = 0) -> list[str]:
    """Return random proteins of the 20 standard residues."""
    rng = random.Random(seed)
    return [
        "".join(rng.choices("ACDEFGHIKLMNPQRSTVWY", k=rng.randint(low, high))) for _ in range(count)
    ]


def write_parts(folder: Path, parts: dict[str, list[str]]) -> None:
    """Write proteins as the parts of a data directory; those of ``test`` are test0, test1, ..."""
    folder.mkdir(parents=True)
    for part, proteins in parts.items():
        text = "".join(f">{part}{i}\n{residues}\n" for i, residues in enumerate(proteins))
        (folder / f"{part}.fasta.gz").write_bytes(gzip.compress(text.encode()))


LONG = (
    "specialist", "student_experiment", "ablation", "distributed", "train_script", "fuzz",
    "signals", "data", "security", "secrets", "early_stopping", "pipeline", "checkpoints", "fused",
    "kernels", "generation", "evaluation", "cohort", "hub", "comparison", "cli",
)  # fmt: skip
"""Files that take longest, which two processes must not begin last."""


def pytest_collection_modifyitems(items) -> None:
    """Run long files first; the order within a file stays."""
    place = {f"test_{name}.py": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONG)))


@pytest.fixture
def refusal(capsys) -> Callable[[int | Callable[[], int]], str]:
    """Return a function that checks a script's refusal and returns its one line.

    It takes the exit status, or a function without arguments where argparse may exit.
    """

    def line(status: int | Callable[[], int]) -> str:
        code: object
        try:
            code = status() if callable(status) else status
        except SystemExit as stop:
            code = stop.code
        assert code == 2
        error = capsys.readouterr().err.strip()
        assert error.count("\n") == 0
        assert "Traceback" not in error
        return error

    return line


@pytest.fixture
def full_disk(monkeypatch) -> Callable[[str], None]:
    """Return a function after which what it names raises the error of a full disk."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    return lambda name: monkeypatch.setattr(name, full)


@pytest.fixture(autouse=True)
def launcher_precision(monkeypatch):
    """Undo what a run in another precision leaves in the environment for accelerate."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


@pytest.fixture(scope="session")
def random_proteins() -> Callable[..., list[str]]:
    return make_proteins


@pytest.fixture(scope="session")
def tiny_tokenizer():
    from src.proteins.tokenizer import train_tokenizer

    return train_tokenizer(make_proteins(200, seed=1), TINY_VOCABULARY, n_positions=256)


@pytest.fixture(scope="session")
def tiny_lm():
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    def build(n_layer: int = 2, n_head: int = 2, n_embd: int = 16, seed: int = 0, **config):
        torch.manual_seed(seed)
        settings = {
            "vocab_size": TINY_VOCABULARY,
            "n_positions": 256,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            # Wide enough that distributions differ visibly between positions.
            "initializer_range": 0.4,
        }
        settings.update(config)
        return GPT2LMHeadModel(
            GPT2Config(n_layer=n_layer, n_head=n_head, n_embd=n_embd, **settings)
        ).eval()

    return build


@pytest.fixture(scope="session")
def tiny_llama():
    """As ``tiny_lm``: rotary positions, and fewer heads of keys than of queries."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def build(**config):
        torch.manual_seed(0)
        settings = {
            "vocab_size": TINY_VOCABULARY,
            "max_position_embeddings": 256,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
            "initializer_range": 0.4,
        }
        return LlamaForCausalLM(LlamaConfig(**(settings | config))).eval()

    return build


@pytest.fixture(scope="session")
def saved_model(tiny_lm, tiny_tokenizer):
    """Return a function that writes a model, or a ``tiny_lm``, with the tiny tokenizer."""

    def save(folder: Path, model=None) -> Path:
        (model or tiny_lm()).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_lm):
    """Return a function that makes a Trainer and trains it, once for each choice of options."""
    trained = {}

    def train(make, **options):
        key = f"{make.__name__} {options}"
        if key not in trained:
            trained[key] = make(tiny_lm, tmp_path_factory.mktemp("whole"), **options)
            trained[key].train()
        return trained[key]

    return train


@pytest.fixture(scope="session")
def small_teacher_dir() -> Path:
    return ROOT / "data" / "small_teacher"


@pytest.fixture(scope="session")
def proteins_dir() -> Path:
    return ROOT / "data" / "proteins"


@pytest.fixture
def profiles(tmp_path, random_proteins):
    """Write an HMM file of one family, without and with gathering thresholds."""
    pyhmmer = pytest.importorskip("pyhmmer")

    protein = random_proteins(1, 90, 90, seed=9)[0]
    alphabet = pyhmmer.easel.Alphabet.amino()
    sequence = pyhmmer.easel.TextSequence(name="family", sequence=protein).digitize(alphabet)
    builder = pyhmmer.plan7.Builder(alphabet)
    hmm, _, _ = builder.build(sequence, pyhmmer.plan7.Background(alphabet))
    with (tmp_path / "plain.hmm").open("wb") as handle:
        hmm.write(handle)
    hmm.cutoffs.gathering = 25.0, 25.0
    with (tmp_path / "gathering.hmm").open("wb") as handle:
        hmm.write(handle)
    return protein, tmp_path
