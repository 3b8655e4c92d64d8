"""An upload from the finished run to the verified revision, against a hub that misbehaves.

The client is the real ``huggingface_hub``; the hub is ``tests/fake_hub.py`` on the loopback
address.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
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


def test_public_only_when_asked(fake, student):
    assert give(student, "--public") == 0
    assert not fake.repos["model", "me/student"].private


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
@pytest.mark.parametrize("every", [3, 4, 5, 7])
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


def test_a_half_uploaded_state_is_completed(fake, student):
    repo = fake.add_repo("me/student")
    config = (student / "config.json").read_bytes()
    repo.commit(repo.files() | {"config.json": File(config, False)}, "main")
    fake.large[hub.sha256_file(student / "model.safetensors")] = (
        student / "model.safetensors"
    ).read_bytes()
    assert give(student) == 0
    assert fake.count("PUT /storage") == 0
    (commit,) = [r for r in fake.requests if "/commit/" in r.path]
    assert b'"config.json"' not in commit.body
    assert set(repo.files()) == EXPECTED | {".gitattributes"}


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


def one_line(capsys) -> str:
    shown = capsys.readouterr().err.strip()
    assert shown.count("\n") == 0
    assert "Traceback" not in shown
    return shown


def test_no_token(fake, student, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert give(student) == 2
    assert "hf auth login" in one_line(capsys)
    assert fake.requests == []


def test_a_refused_token_is_not_shown(fake, student, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf" + "_" + "wrong" * 8)
    assert give(student) == 2
    shown = one_line(capsys)
    assert "does not accept the token" in shown
    assert "wrong" not in shown
    assert len(fake.requests) == 1  # a refusal is not repeated


def test_no_permission(fake, student, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    assert give(student) == 2
    assert "no permission" in one_line(capsys)
    assert ("model", "me/student") not in fake.repos
    fake.add_repo("me/student", private=False)
    assert give(student, "--public") == 2
    shown = one_line(capsys)
    assert "no permission" in shown
    assert "--create_pr" in shown


def test_a_name_that_belongs_to_a_data_set(fake, student, capsys):
    fake.add_repo("me/student", kind="dataset")
    assert give(student) == 2
    assert "me/student is a dataset" in one_line(capsys)
    assert ("model", "me/student") not in fake.repos


def test_private_stays_private_and_public_is_not_published_to_by_chance(fake, student, capsys):
    repo = fake.add_repo("me/student", private=False)
    assert give(student) == 2
    assert "is public: pass --public" in one_line(capsys)
    repo.private = True
    assert give(student, "--public") == 2
    assert "is private" in one_line(capsys)
    assert set(repo.files()) == {".gitattributes"}
    assert fake.count("PUT|commit") == 0


@pytest.mark.parametrize("other", ["pytorch_model.bin", "model-00001-of-00002.safetensors"])
def test_other_weights_are_not_mixed_with_these(other, fake, student, capsys):
    repo = fake.add_repo("me/student")
    repo.commit(repo.files() | {other: File(b"old", True)}, "main")
    assert give(student) == 2
    assert f"holds other weights ({other})" in one_line(capsys)
    assert fake.count("PUT|commit") == 0


def test_a_hub_that_is_not_there(student, capsys, monkeypatch):
    import huggingface_hub.constants as constants

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    assert give(student) == 2
    assert "failed 6 times" in one_line(capsys)


def test_a_hub_without_xet_storage(fake, student, capsys, monkeypatch):
    import huggingface_hub.constants as constants

    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    assert give(student) == 2
    assert "HF_HUB_DISABLE_XET=1" in one_line(capsys)


def test_offline_mode_is_named(student, capsys, monkeypatch):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert give(student) == 2
    assert "HF_HUB_OFFLINE" in one_line(capsys)


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


def test_a_pull_request_needs_a_repository(fake, student, capsys):
    assert give(student, "--create_pr") == 2
    assert "leave out --create_pr" in one_line(capsys)
    assert fake.repos == {}
    fake.add_repo("me/student")
    assert give(student, "--create_pr", "--revision", "v9") == 2
    assert "me/student has no branch v9" in one_line(capsys)


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
    listed = dict(re.findall(r"^ *([\d.]+ k?B)  (\S+)$", shown, re.MULTILINE))
    assert set(listed.values()) | {"model.safetensors"} == EXPECTED
    assert "in 7 files" in shown
    assert "not sent: .lock, checkpoint-1/, checkpoint-2/, metrics.jsonl" in shown
    assert "pipeline_tag: text-generation" in shown
    assert "1.250 [1.200, 1.300]" in shown
    assert "nothing was sent" in shown


def spoil_status(folder):
    edit(folder / "run.json", status="running")


def spoil_nothing_there(folder):
    shutil.rmtree(folder)


def spoil_no_record(folder):
    (folder / "run.json").unlink()


def spoil_pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def spoil_truncated(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def spoil_other_weights(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.wpe.weight"][0, 0] += 1e-3
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def spoil_missing_tensor(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.h.0.mlp.c_fc.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def spoil_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def spoil_nan(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.wte.weight"][:] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def spoil_record(folder):
    (folder / "run.json").write_text('{"status": "finished"')


def spoil_steps(folder):
    record = json.loads((folder / "run.json").read_text())
    del record["steps"]
    (folder / "run.json").write_text(json.dumps(record))


def spoil_settings(folder):
    edit(folder / "run.json", settings={})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_status, "not finished (status 'running')"),
        (spoil_nothing_there, "no such directory"),
        (spoil_no_record, "run.json is missing"),
        (spoil_pickle_only, "no weights in safetensors"),
        (spoil_truncated, "cannot be loaded"),
        (spoil_other_weights, "the weights are not those that run.json records"),
        (spoil_missing_tensor, "the weights hold"),
        (spoil_tokenizer, "tokenizer"),
        (spoil_nan, "no finite number"),
        (spoil_record, "not valid JSON"),
        (spoil_steps, "not the record of a finished run"),
        (spoil_settings, "not the record of a finished run"),
    ],
)
def test_what_is_no_finished_model_is_refused(spoil, message, fake, student, capsys):
    spoil(student)
    assert give(student) == 2
    assert message in one_line(capsys)
    assert fake.requests == []


def test_results_of_another_model_are_refused(fake, student, results_file, capsys):
    edit(results_file, run={"student": {"fingerprint": "0" * 64}})
    assert give(student, "--results", str(results_file)) == 2
    assert "was measured on other weights" in one_line(capsys)
    edit(results_file, run={})
    assert give(student, "--results", str(results_file)) == 2
    assert "names no weights" in one_line(capsys)
    assert fake.requests == []


def test_an_unknown_licence_is_asked_for(fake, student, capsys):
    assert script.main(["--model_dir", str(student), "--repo_id", "me/student"]) == 2
    assert "--license" in one_line(capsys)
    assert fake.requests == []


@pytest.mark.parametrize("name", ["student", "me/stu dent", "a/b/c", "me/--x"])
def test_names_that_no_repository_can_have(name, student, capsys):
    assert script.main(["--model_dir", str(student), "--repo_id", name]) == 2
    assert "--repo_id" in one_line(capsys)


def test_private_and_public_exclude_each_other(student, capsys):
    with pytest.raises(SystemExit) as stop:
        give(student, "--private", "--public")
    assert stop.value.code == 2


# The script as a process of its own, and the student as users load it


@pytest.mark.slow
def test_the_script_with_the_endpoint_of_the_environment(fake, student, tmp_path):
    environment = {
        "HF_ENDPOINT": fake.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
        "PATH": "",
        "OMP_NUM_THREADS": "1",
        **CANARIES,
    }
    done = subprocess.run(
        [sys.executable, "tools/upload_to_hf.py", "--model_dir", str(student)]
        + ["--repo_id", "me/student", "--license", "mit"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert f"revision {fake.repos['model', 'me/student'].refs['main']}" in done.stdout
    for value in (TOKEN, *CANARIES.values()):
        assert value not in done.stdout


def test_help_is_quick_and_needs_no_torch():
    code = (
        "import sys; sys.argv = ['upload_to_hf.py', '--help']\n"
        "import runpy\n"
        "try: runpy.run_path('tools/upload_to_hf.py', run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--dry_run" in done.stdout


def test_a_student_in_the_pipeline_as_on_the_card_of_protgpt2(finished):  # noqa: F811
    from transformers import pipeline

    protgpt2 = pipeline("text-generation", model=str(finished / "student"))
    sequences = protgpt2(
        "<|endoftext|>",
        max_length=100,
        do_sample=True,
        top_k=950,
        repetition_penalty=1.2,
        num_return_sequences=10,
        eos_token_id=0,
    )
    assert len(sequences) == 10
    texts = [sequence["generated_text"] for sequence in sequences]
    assert all(text.startswith("<|endoftext|>") for text in texts)
    assert len(set(texts)) > 1


def test_the_code_on_our_card_runs(student, capsys):
    import torch

    package = hub.pack(student, "me/student", license="mit", known={})
    blocks = re.findall(r"```python\n(.*?)```", package.card, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        assert '"me/student"' in block
        exec(block.replace('"me/student"', repr(str(student))), {})
    likelihood = float(capsys.readouterr().out.split()[-1])
    _, tokens, logits = hub.example_logits(student)
    expected = torch.log_softmax(logits, -1)[0, :-1].gather(-1, tokens[0, 1:, None]).sum().item()
    assert likelihood == pytest.approx(expected, rel=1e-5)
