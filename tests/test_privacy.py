"""What may not be published is found, and what only looks like it is left alone."""

from __future__ import annotations

import json
import random
import string

import pytest

from src.common.privacy import (
    HIDDEN_PATH,
    find_secrets,
    known_secrets,
    publishable,
    without_private_paths,
    without_secrets,
)

LETTERS = string.ascii_letters + string.digits


def random_text(length: int, alphabet: str = LETTERS, seed: int = 0) -> str:
    return "".join(random.Random(seed).choices(alphabet, k=length))


# Built here from parts, so that this file itself holds nothing that a scanner would report.
SECRETS = {
    "a Hugging Face token": "hf" + "_" + random_text(34),
    "a GitHub token": "ghp" + "_" + random_text(36),
    "a GitLab token": "glpat" + "-" + random_text(20),
    "an AWS access key": "AKIA" + "Z2" + random_text(14, "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"),
    "an AWS secret key": "aws_secret_access_key = '" + random_text(40) + "'",
    "a W&B key": "WANDB_API_KEY=" + random_text(40, "0123456789abcdef"),
    "an API key": "sk" + "-" + random_text(48),
    "a Slack token": "xoxb" + "-" + random_text(24),
    "a private key": "-----BEGIN " + "OPENSSH PRIVATE KEY-----",
    "a password in an address": "https://name:" + "pass" + "@host.example/x",
}


@pytest.mark.parametrize("kind", SECRETS)
def test_every_form_is_found_with_its_line_and_masked_in_place(kind):
    text = json.dumps({"a": [1, 2], "note": f"see {SECRETS[kind]} here"}, indent=2)
    findings = find_secrets("run.json", text, {})
    assert findings == [f"run.json, line 6: {kind}"]
    assert SECRETS[kind] not in findings[0]
    masked = without_secrets(f"curl {SECRETS[kind]} here", {})
    assert find_secrets("x", masked, {}) == []
    assert masked.startswith("curl ")
    assert "(secret)" in masked


def test_other_forms_of_the_same_services():
    for text in (
        "github_pat_" + random_text(60),
        "wandb_v1_" + random_text(40),
        '"api_key": "' + random_text(40, "0123456789abcdef") + '"',
        "-----BEGIN " + "PRIVATE KEY-----",
        "-----BEGIN " + "PGP PRIVATE KEY BLOCK-----",
    ):
        assert len(find_secrets("x", text, {})) == 1, text


def test_values_are_masked_line_by_line_and_the_longest_first():
    known = {"first-line-of-it\nsecond-line-of-it": "", "canary-1": "", "canary-1-and-more": ""}
    record = {"a": ["x canary-1-and-more y"], "canary-1": 'z "second-line-of-it"'}
    assert without_secrets(record, known) == {"a": ["x (secret) y"], "(secret)": 'z "(secret)"'}


def test_what_is_publishable_names_neither_secrets_nor_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOME_TOKEN", "canary/of/the/token")
    typed = [f"--data={tmp_path}/data/x", "--cache_dir", "/tmp/x/alice/home/cache", "-k"]
    typed += ["canary/of/the/token", "../../alice/v2/run", "nferruz/ProtGPT2", tmp_path / "y"]
    assert publishable([*typed, 3, None]) == [
        "--data=data/x", "--cache_dir", "cache", "-k", "(secret)", "run", "nferruz/ProtGPT2", "y",
        3, None,
    ]  # fmt: skip


def test_commits_hashes_proteins_and_addresses_are_no_secrets():
    hexadecimal = "0123456789abcdef"
    residues = "ACDEFGHIKLMNPQRSTVWY"
    for text in (
        json.dumps({"git": {"commit": random_text(40, hexadecimal), "dirty": False}}),
        json.dumps({"report_to": "wandb", "fingerprint": random_text(64, hexadecimal)}),
        "AKIA" + random_text(16, residues),
        "MAKIA" + random_text(300, residues),
        "https://huggingface.co/nferruz/ProtGPT2",
        "<|endoftext|>",
        "hf_model hf-tiny sk-learn",
    ):
        assert find_secrets("x", text, {}) == [], text


def test_values_of_the_environment_are_found_also_when_escaped():
    canary = 'canary"\\' + random_text(12)
    known = known_secrets({"SOME_SECRET": canary, "LANG": "en_GB.UTF-8"})
    assert known == {canary: "the value of SOME_SECRET"}
    assert find_secrets("c", f"one\ntwo {canary}", known) == ["c, line 2: the value of SOME_SECRET"]
    assert find_secrets("c", json.dumps({"a": canary}), known) == [
        "c, line 1: the value of SOME_SECRET"
    ]


SECRET_NAMES = """
HF_TOKEN GITHUB_TOKEN WANDB_API_KEY AWS_SECRET_ACCESS_KEY DB_PASSWORD PGPASSWORD MY_PASS
OPENAI_API_KEY client_secret GH_PAT STORAGE_ACCOUNT_KEY
"""
OTHER_VARIABLES = """
TOKENIZERS_PARALLELISM=definitely PATH=/usr/bin:/bin PWD=/usr/share/proteins
COMPASS=north-by-northwest HF_TOKEN= SHORT_TOKEN=abc SSH_AUTH_SOCK=/tmp/agent.sock
"""


def test_names_of_variables_tell_secrets_from_others():
    for name in SECRET_NAMES.split():
        assert known_secrets({name: "value-of-the-canary"}), name
    others = {name: value for name, _, value in (w.partition("=") for w in OTHER_VARIABLES.split())}
    assert known_secrets(others) == {}


def test_a_credentials_file_is_no_secret_but_its_absence_is_taken_for_one(tmp_path):
    file = tmp_path / "credentials.json"
    file.write_text("{}")
    assert known_secrets({"GOOGLE_APPLICATION_CREDENTIALS": str(file)}) == {}


ROOT = "/home/alice/protein-lm-distill"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (f"{ROOT}/data/small_teacher", "data/small_teacher"),
        (f"{ROOT}/data/../models/x", "models/x"),
        (ROOT, "."),
        ("/home/alice/protein-lm-distill-2/x.fasta", "x.fasta"),
        ("/scratch/alice/runs/proteins.fasta.gz", "proteins.fasta.gz"),
        ("/scratch/alice", HIDDEN_PATH),
        ("/home/alice", HIDDEN_PATH),
        ("/home/alice smith/my data/proteins.fasta", "proteins.fasta"),
        ("--data=/home/alice smith/proteins.fasta", "--data=proteins.fasta"),
        (f"--data={ROOT}/data/proteins", "--data=data/proteins"),
        ("../../alice/proteins.fasta", "proteins.fasta"),
        ("data/../../alice/sets/proteins.fasta", "proteins.fasta"),
        ("--data=data/../../alice/sets/v2", "--data=v2"),
        ("file:///home/alice/sets/proteins.fasta", "proteins.fasta"),
        (r"C:\Users\alice\sets\proteins.fasta", "proteins.fasta"),
        (r"C:\Users\alice", HIDDEN_PATH),
        (r"\\server\share\sets\proteins.fasta", "proteins.fasta"),
        (
            "teacher (/mnt/disk/alice/teacher/v2): fine, 12 tokens/s",
            "teacher (v2): fine, 12 tokens/s",
        ),
        ('read "/home/alice/sets/a.fasta"', 'read "a.fasta"'),
    ],
)
def test_private_paths_become_relative_or_go(before, after):
    assert without_private_paths(before, [ROOT]) == after


NOT_PRIVATE = r"""
data/small_teacher
nferruz/ProtGPT2
https://huggingface.co/nferruz/ProtGPT2
student / teacher, 3/4 of 12 tokens/s
2026-01-02T03:04:05+0000
./models/x
a\b
"""


def test_what_is_no_private_path_stays():
    for text in NOT_PRIVATE.split("\n"):
        assert without_private_paths(text, [ROOT]) == text


def test_every_depth_of_a_record_is_cleaned_and_other_values_stay():
    record = {
        "command": ["train.py", "--data", "/home/alice/sets/p.fasta", 3],
        "nested": {"/home/alice/sets/p.fasta": [{"path": f"{ROOT}/x", "none": None, "n": 1.5}]},
        "flag": True,
    }
    assert without_private_paths(record, [ROOT]) == {
        "command": ["train.py", "--data", "p.fasta", 3],
        "nested": {"p.fasta": [{"path": "x", "none": None, "n": 1.5}]},
        "flag": True,
    }


def test_random_paths_never_show_a_persons_directory():
    rng = random.Random(0)
    pieces = ["home", "alice", "data", "my runs", "x.fasta", "v2", "mnt"]
    for _ in range(500):
        path = "/" + "/".join(rng.choices(pieces, k=rng.randint(1, 6)))
        frame = rng.choice(["{}", "--data={}", "read ({}): done", 'a "{}" b', "'{}'"])
        cleaned = without_private_paths(frame.format(path), [ROOT])
        assert "/alice" not in cleaned, (path, cleaned)
        assert "alice/" not in cleaned, (path, cleaned)
