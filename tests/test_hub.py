"""An upload from the finished run to the verified revision, against a hub that misbehaves.

The client is the real ``huggingface_hub``; the hub is ``tests/fake_hub.py`` on the loopback
address.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import socket
import time
from pathlib import Path

import pytest

from src.evaluation.results import REQUIRED, write_results
from src.publishing import hub
from tests.fake_hub import READER, SIGNATURE, STRANGER, TOKEN, FakeHub, File
from tests.finished_run import finished  # noqa: F401
from tools import upload_to_hf as script

ROOT = Path(__file__).resolve().parents[1]
EXPECTED = {
    "README.md",
    "run.json",
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
CANARIES = {
    "WANDB_API_KEY": "canary-of-the-tracker-0123456789",
    "AWS_SECRET_ACCESS_KEY": "canary/of/the/cloud+0123456789",
    "MY_DATABASE_PASSWORD": "canary of the database",
}


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    """No token of this machine, no offline mode, no long waits."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "no-tokens"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.002)))


@pytest.fixture
def fake(monkeypatch):
    import huggingface_hub.constants as constants
    from huggingface_hub import close_session

    with FakeHub() as server:
        # What HF_ENDPOINT sets before the client is imported.
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server
    close_session()


@pytest.fixture
def student(finished, tmp_path) -> Path:  # noqa: F811
    """A copy of the finished run that a test may spoil."""
    return Path(shutil.copytree(finished / "student", tmp_path / "student"))


@pytest.fixture
def results_file(student, tmp_path) -> Path:
    record = json.loads((student / "run.json").read_text())
    private = tmp_path / "alice" / "held_out.fasta"
    results = {
        **dict.fromkeys(REQUIRED),
        "perplexity_ratio": 1.25,
        "kl_divergence": 0.5,
        "student_perplexity": 25.0,
        "teacher_perplexity": 20.0,
        "intervals": {"perplexity_ratio": [1.2, 1.3]},
        "run": {
            "student": {"fingerprint": record["student"]["fingerprint"]},
            "data": {"source": str(private), "split": None},
        },
    }
    write_results(tmp_path / "results.json", results)
    return tmp_path / "results.json"


def give(folder: Path, *more: str) -> int:
    """Run the script as typed, with a licence: the tiny teacher states none."""
    arguments = ["--model_dir", str(folder), "--repo_id", "me/student", "--license", "mit", *more]
    return script.main(arguments)


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2))


# What is sent, and how it arrives


def test_an_upload_arrives_whole_and_private(fake, student, results_file, capsys):
    assert give(student, "--results", str(results_file)) == 0
    shown = capsys.readouterr().out
    repo = fake.repos["model", "me/student"]
    assert repo.private
    assert set(repo.files()) == EXPECTED | {".gitattributes"}
    weights = repo.files()["model.safetensors"]
    assert weights.content == (student / "model.safetensors").read_bytes()
    assert shown.rstrip().splitlines()[-1] == f"revision {repo.refs['main']}"
    assert "verified: all hashes equal" in shown
    assert "checkpoint-2/" in shown
    card = repo.files()["README.md"].content.decode()
    assert "perplexity_ratio" in card
    assert "1.250 [1.200, 1.300]" in card
    assert fake.count(r"POST .*/commit/main") == 1


def test_what_was_pushed_loads_for_a_user_of_transformers(fake, student, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert give(student) == 0
    options = {"cache_dir": str(tmp_path / "cache"), "token": TOKEN, "trust_remote_code": False}
    theirs = AutoModelForCausalLM.from_pretrained("me/student", **options).eval()
    tokenizer = AutoTokenizer.from_pretrained("me/student", **options)
    ours = AutoModelForCausalLM.from_pretrained(student).eval()
    ids = tokenizer("<|endoftext|>\nMKV", return_tensors="pt").input_ids
    with torch.inference_mode():
        assert torch.equal(theirs(ids).logits, ours(ids).logits)


def test_neither_secret_nor_private_path_nor_pickle_leaves(
    fake, student, results_file, capsys, monkeypatch
):
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    for name in ("optimizer.pt", "pytorch_model.bin", "training_args.bin", "notes.txt", ".env"):
        (student / name).write_text(f"private {CANARIES['WANDB_API_KEY']}")
    (student / "wandb").mkdir()
    (student / "wandb" / "debug.log").write_text(CANARIES["WANDB_API_KEY"])
    home = student.parent / "alice"
    edit(student / "run.json", command=["train.py", "--cache_dir", f"{home}/cache/tokens"])
    edit(student / "config.json", _name_or_path=f"{home}/runs/student")
    fake.fail_every = 4
    assert give(student, "--results", str(results_file)) == 0
    sent = b"\n".join(request.body for request in fake.requests)
    files = b"\n".join(f.content for f in fake.repos["model", "me/student"].files().values())
    shown = "".join(capsys.readouterr())
    for value in (*CANARIES.values(), TOKEN, "alice", str(student.parent)):
        assert value.encode() not in sent, value
        assert value.encode() not in files, value
    for value in (*CANARIES.values(), TOKEN, "X-Amz"):
        assert value not in shown, value
    for request in fake.requests:
        if request.path.startswith("/storage/"):
            assert SIGNATURE in request.path
            assert "authorization" not in request.headers
        assert TOKEN not in request.path
    assert set(fake.repos["model", "me/student"].files()) == EXPECTED | {".gitattributes"}
    record = json.loads(fake.repos["model", "me/student"].files()["run.json"].content)
    assert record["command"] == ["train.py", "--cache_dir", "tokens"]
    assert record["settings"]["teacher_model"] == "teacher"
    config = json.loads(fake.repos["model", "me/student"].files()["config.json"].content)
    assert config["_name_or_path"] == "student"


@pytest.mark.parametrize("name", ["run.json", "tokenizer_config.json", "config.json"])
def test_a_secret_in_a_text_stops_everything(name, fake, student, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", CANARIES["WANDB_API_KEY"])
    edit(student / name, note=f"key {CANARIES['WANDB_API_KEY']}")
    assert give(student) == 2
    shown = capsys.readouterr().err
    line = (student / name).read_text().splitlines().index(
        f'  "note": "key {CANARIES["WANDB_API_KEY"]}"'
    ) + 1
    assert f"{name}, line {line}: the value of WANDB_API_KEY" in shown
    assert CANARIES["WANDB_API_KEY"] not in shown
    assert shown.strip().count("\n") == 0
    assert fake.requests == []


def test_a_secret_in_the_header_of_the_weights_or_in_the_token_itself(student, capsys):
    from safetensors.torch import load_file, save_file

    tensors = load_file(student / "model.safetensors")
    save_file(tensors, student / "model.safetensors", {"format": "pt", "who": TOKEN})
    assert give(student, "--dry_run") == 2
    shown = capsys.readouterr().err
    assert "model.safetensors, line 1: a Hugging Face token" in shown
    assert TOKEN not in shown


def test_shards_go_with_their_index(fake, student):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(student)
    (student / "model.safetensors").unlink()
    model.save_pretrained(student, max_shard_size="15KB")
    shards = {p.name for p in student.glob("model-*.safetensors")}
    assert len(shards) > 1
    assert give(student) == 0
    there = set(fake.repos["model", "me/student"].files())
    assert shards | {"model.safetensors.index.json"} <= there
    next(student.glob("model-*.safetensors")).unlink()
    with pytest.raises(ValueError, match="no shard here"):
        hub.read_student(student)


# A hub that misbehaves


# Of every second request failing the client would never see the end: a commit is two requests in a
# row that it does not repeat by itself.
@pytest.mark.parametrize("every", [3, 5])
def test_every_nth_request_may_fail(every, fake, student):
    fake.fail_every = every
    assert give(student) == 0
    assert set(fake.repos["model", "me/student"].files()) == EXPECTED | {".gitattributes"}
    assert len(fake.repos["model", "me/student"].commits) == 2  # its first one and ours


def test_a_broken_upload_goes_on_without_sending_the_weights_again(fake, student, capsys):
    fake.fail["POST /api/models/me/student/commit"] = 503
    assert give(student) == 2
    shown = capsys.readouterr()
    assert "failed 6 times (the hub answers 503)" in shown.err
    assert "same command" in shown.err
    assert shown.err.strip().count("\n") == 0
    assert "trying again" in shown.out
    assert set(fake.repos["model", "me/student"].files()) == {".gitattributes"}  # nothing by halves
    assert fake.count("PUT /storage") == 1
    fake.fail.clear()
    assert give(student) == 0
    assert fake.count("PUT /storage") == 1


def test_weights_that_were_cut_off_are_sent_again(fake, student):
    fake.uploads_cut = 2
    assert give(student) == 0
    assert fake.count("PUT /storage") == 3
    weights = fake.repos["model", "me/student"].files()["model.safetensors"].content
    assert weights == (student / "model.safetensors").read_bytes()


def test_a_lost_answer_makes_no_second_commit(fake, student):
    fake.answers_lost = 1
    assert give(student) == 0
    assert len(fake.repos["model", "me/student"].commits) == 2


def test_only_what_changed_is_sent_again(fake, student, results_file, capsys):
    assert give(student) == 0
    first = fake.repos["model", "me/student"].refs["main"]
    commits = fake.count("POST .*/commit/")
    assert give(student) == 0
    assert "files are there already" in capsys.readouterr().out
    assert fake.count("POST .*/commit/") == commits
    assert fake.repos["model", "me/student"].refs["main"] == first
    fake.requests.clear()
    assert give(student, "--results", str(results_file)) == 0
    assert "sending 1 of 7 files" in capsys.readouterr().out
    (commit,) = [r for r in fake.requests if "/commit/" in r.path]
    lines = [json.loads(line) for line in commit.body.splitlines()]
    assert [line["value"]["path"] for line in lines[1:]] == ["README.md"]
    assert fake.count("PUT /storage") == 0


def test_somebody_commits_in_between(fake, student):
    repo = fake.add_repo("me/student")
    original = hub.Repository._send_once

    def send_once(self, files, title):
        if len(repo.commits) == 1:
            commit = self.api.create_commit

            def late(*arguments, **options):
                self.api.create_commit = commit
                repo.commit(repo.files() | {"NOTICE": File(b"hello", False)}, "main")
                return commit(*arguments, **options)

            self.api.create_commit = late
        return original(self, files, title)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub.Repository, "_send_once", send_once)
        assert give(student) == 0
    assert set(repo.files()) == EXPECTED | {".gitattributes", "NOTICE"}
    assert fake.count("POST .*/commit/") == 2  # the first was refused: the repository had moved on


@pytest.mark.parametrize("name", ["large", "config.json"])
def test_altered_bytes_are_noticed(name, fake, student, capsys):
    def alter(which, content):
        return content[:-1] + bytes([content[-1] ^ 1]) if which == name else content

    fake.alter = alter
    assert give(student) == 2
    file = "model.safetensors" if name == "large" else name
    assert f"{file} came back with other bytes" in capsys.readouterr().err


def test_other_logits_are_noticed(fake, student, capsys, monkeypatch):
    original = hub.example_logits
    calls = []

    def example_logits(folder):
        calls.append(folder)
        model, tokens, logits = original(folder)
        return model, tokens, logits + (1e-6 if len(calls) > 1 else 0)

    monkeypatch.setattr(hub, "example_logits", example_logits)
    assert give(student) == 2
    assert "other logits" in capsys.readouterr().err
    assert len(calls) == 2
    assert calls[0] == student
    assert not calls[1].exists()  # the download does not stay


# Refusals of the hub


def test_no_token(fake, student, refusal, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in refusal(give(student))
    assert fake.requests == []


def test_a_refused_token_is_not_shown(fake, student, refusal, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf" + "_" + "wrong" * 8)
    shown = refusal(give(student))
    assert "does not accept the token" in shown
    assert "wrong" not in shown
    assert len(fake.requests) == 1  # a refusal is not repeated


def test_no_permission(fake, student, refusal, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    assert "no permission" in refusal(give(student))
    assert ("model", "me/student") not in fake.repos
    fake.add_repo("me/student", private=False)
    shown = refusal(give(student, "--public"))
    assert "no permission" in shown
    assert "--create_pr" in shown


def test_a_name_that_belongs_to_a_data_set(fake, student, refusal):
    fake.add_repo("me/student", kind="dataset")
    assert "me/student is a dataset" in refusal(give(student))
    assert ("model", "me/student") not in fake.repos


def test_private_stays_private_and_public_is_not_published_to_by_chance(fake, student, refusal):
    repo = fake.add_repo("me/student", private=False)
    assert "is public: pass --public" in refusal(give(student))
    repo.private = True
    assert "is private" in refusal(give(student, "--public"))
    assert set(repo.files()) == {".gitattributes"}
    assert fake.count("PUT|commit") == 0
    fake.repos.clear()
    assert give(student, "--public") == 0
    assert not fake.repos["model", "me/student"].private


@pytest.mark.parametrize("other", ["pytorch_model.bin", "model-00001-of-00002.safetensors"])
def test_other_weights_are_not_mixed_with_these(other, fake, student, refusal):
    repo = fake.add_repo("me/student")
    repo.commit(repo.files() | {other: File(b"old", True)}, "main")
    assert f"holds other weights ({other})" in refusal(give(student))
    assert fake.count("PUT|commit") == 0


def test_a_hub_that_is_not_there(student, refusal, monkeypatch):
    import huggingface_hub.constants as constants

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    assert "failed 6 times" in refusal(give(student))


def test_a_hub_without_xet_storage(fake, student, refusal, monkeypatch):
    import huggingface_hub.constants as constants

    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    assert "HF_HUB_DISABLE_XET=1" in refusal(give(student))


def test_offline_mode_is_named(student, refusal, monkeypatch):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal(give(student))


# Branches and pull requests


def test_a_branch_is_made_and_main_stays(fake, student):
    repo = fake.add_repo("me/student")
    assert give(student, "--revision", "v2") == 0
    assert set(repo.files("v2")) == EXPECTED | {".gitattributes"}
    assert set(repo.files("main")) == {".gitattributes"}
    assert give(student, "--revision", "v2") == 0


@pytest.mark.parametrize("lost", [0, 1])
def test_one_pull_request_however_often_it_is_asked_for(
    lost, fake, student, results_file, capsys, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", READER)  # may propose, may not write
    repo = fake.add_repo("me/student", private=False)
    fake.answers_lost = lost
    assert give(student, "--public", "--create_pr") == 0
    shown = capsys.readouterr().out
    assert f"{fake.url}/me/student/discussions/1" in shown
    assert f"revision {repo.refs['refs/pr/1']}" in shown
    assert set(repo.files("main")) == {".gitattributes"}
    assert set(repo.files("refs/pr/1")) == EXPECTED | {".gitattributes"}
    assert give(student, "--public", "--create_pr") == 0
    assert give(student, "--public", "--create_pr", "--results", str(results_file)) == 0
    assert len(repo.pull_requests) == 1
    assert b"1.250 [1.200, 1.300]" in repo.files("refs/pr/1")["README.md"].content
    assert fake.count("PUT /storage") == 1


def test_a_pull_request_needs_a_repository(fake, student, refusal):
    assert "leave out --create_pr" in refusal(give(student, "--create_pr"))
    assert fake.repos == {}
    fake.add_repo("me/student")
    assert "me/student has no branch v9" in refusal(
        give(student, "--create_pr", "--revision", "v9")
    )


# Before anything is sent


def test_dry_run_touches_no_network(student, results_file, capsys, monkeypatch):
    asked = []

    def refuse(self, address, *rest):
        asked.append(address)
        raise OSError("no network in a dry run")

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: asked.append(a) or [])
    assert give(student, "--dry_run", "--results", str(results_file)) == 0
    assert asked == []
    shown = capsys.readouterr().out
    listed = re.findall(r"^ *[\d.]+ k?B  (\S+)$", shown, re.MULTILINE)
    assert set(listed) | {"model.safetensors"} == EXPECTED
    assert "in 7 files" in shown
    assert "not sent: .lock, checkpoint-1/, checkpoint-2/, metrics.jsonl" in shown
    assert "pipeline_tag: text-generation" in shown
    assert "1.250 [1.200, 1.300]" in shown
    assert "nothing was sent" in shown


def edit_weights(change):
    """Return a function that changes the tensors of a folder's weights in place."""
    from safetensors.torch import load_file, save_file

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return spoil


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def without_steps(folder: Path) -> None:
    record = json.loads((folder / "run.json").read_text())
    del record["steps"]
    (folder / "run.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: edit(f / "run.json", status="running"), "not finished (status 'running')"),
        (shutil.rmtree, "no such directory"),
        (lambda f: (f / "run.json").unlink(), "run.json is missing"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            "no weights in safetensors",
        ),
        (truncate, "cannot be loaded"),
        (
            edit_weights(lambda t: t["transformer.wpe.weight"][0, 0].add_(1e-3)),
            "the weights are not those that run.json records",
        ),
        (edit_weights(lambda t: t.pop("transformer.h.0.mlp.c_fc.weight")), "the weights hold"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer"),
        (edit_weights(lambda t: t["transformer.wte.weight"].fill_(math.nan)), "no finite number"),
        (lambda f: (f / "run.json").write_text('{"status": "finished"'), "not valid JSON"),
        (without_steps, "not the record of a finished run"),
        (lambda f: edit(f / "run.json", settings={}), "not the record of a finished run"),
    ],
)
def test_what_is_no_finished_model_is_refused(spoil, message, fake, student, refusal):
    spoil(student)
    assert message in refusal(give(student))
    assert fake.requests == []


def test_results_of_another_model_are_refused(fake, student, results_file, refusal):
    edit(results_file, run={"student": {"fingerprint": "0" * 64}})
    assert "was measured on other weights" in refusal(give(student, "--results", str(results_file)))
    edit(results_file, run={})
    assert "names no weights" in refusal(give(student, "--results", str(results_file)))
    assert fake.requests == []


def test_an_unknown_licence_is_asked_for(fake, student, refusal):
    assert "--license" in refusal(
        script.main(["--model_dir", str(student), "--repo_id", "me/student"])
    )
    assert fake.requests == []


@pytest.mark.parametrize("name", ["student", "me/stu dent", "a/b/c", "me/--x"])
def test_names_that_no_repository_can_have(name, student, refusal):
    assert "--repo_id" in refusal(script.main(["--model_dir", str(student), "--repo_id", name]))


# The student as users load it


@pytest.fixture
def of_another_class(student, tiny_llama) -> Path:
    """A Llama of another layout, as `train.py --init_from LLAMA` leaves it."""
    from src.models.loading import load_tokenizer, model_fingerprint
    from src.proteins.layouts import set_layout, spelt_out

    tokenizer = load_tokenizer(student)
    set_layout(tokenizer, spelt_out("plain", tokenizer))
    tokenizer.save_pretrained(student)
    model = tiny_llama()
    model.save_pretrained(student)
    run = json.loads((student / "run.json").read_text())
    run["student"]["fingerprint"] = model_fingerprint(model)
    run["settings"]["student"] = None
    edit(student / "run.json", **run)
    return student


def test_the_card_of_another_class_and_layout(of_another_class, capsys):
    package = hub.pack(of_another_class, "me/student", license="mit")
    assert "A llama model of" in package.card
    assert "`<|endoftext|>{residues}<|endoftext|>`" in package.card
    assert "gpt2" not in package.card.split("---")[1].replace("protgpt2", "")
    test_the_code_on_our_card_runs(of_another_class, capsys)


def test_a_model_that_states_no_longest_input_is_packed(student):
    from transformers import BloomConfig, BloomForCausalLM

    from src.models.loading import load_tokenizer, model_fingerprint

    size = len(load_tokenizer(student))
    config = BloomConfig(vocab_size=size, hidden_size=16, n_layer=1, n_head=2, eos_token_id=0)
    model = BloomForCausalLM(config)
    model.save_pretrained(student)
    run = json.loads((student / "run.json").read_text())
    run["student"]["fingerprint"] = model_fingerprint(model)
    run["settings"]["student"] = None
    edit(student / "run.json", **run)
    package = hub.pack(student, "me/student", license="mit")
    assert "A bloom model of" in package.card
    assert package.student.logits.shape[:2] == package.student.tokens.shape


def test_the_code_on_our_card_runs(student, capsys):
    import torch

    package = hub.pack(student, "me/student", license="mit")
    blocks = re.findall(r"```python\n(.*?)```", package.card, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        assert '"me/student"' in block
        exec(block.replace('"me/student"', repr(str(student))), {})
    likelihood = float(capsys.readouterr().out.split()[-1])
    _, tokens, logits = hub.example_logits(student)
    expected = torch.log_softmax(logits, -1)[0, :-1].gather(-1, tokens[0, 1:, None]).sum().item()
    assert likelihood == pytest.approx(expected, rel=1e-5)
