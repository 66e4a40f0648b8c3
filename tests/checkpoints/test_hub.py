"""Model cards, as the hub's own parser reads them, and pushing, against a stub of the hub on this machine."""

import base64
import http.server
import json
import threading

import pytest

from experiments import merge, sft
from experiments.cli import cards, flags
from jaxft import checkpoints
from jaxft.checkpoints import CheckpointError, hub_id, license_of, model_card
from jaxft.checkpoints.packages import PACKAGES

hub = pytest.importorskip("huggingface_hub", reason="pip install 'jaxft[text]'")

COMMON = dict(
    base_model="smollm2",
    data=["openai/gsm8k?split=train", "/home/me/secret/chats.jsonl", "rg:chain_sum?size=8"],
    settings={"adapter": "lora", "rank": 4, "stop": "a|b\nc"},
    metrics={"eval_loss": 0.5, "interval": (0, 1), "kl": None},
    command="python experiments/sft.py --rank 4",
    commit="abc123",
    tags=["lora"],
)


@pytest.mark.parametrize(
    "kind, library, relation",
    [
        ("adapter", "peft", "adapter"),
        ("native", "jaxft", "adapter"),
        ("model", "transformers", "finetune"),
    ],
)
def test_the_hub_reads_our_card(kind, library, relation):
    text = model_card('a "title": with marks', kind=kind, **COMMON)
    data = hub.ModelCard(text).data  # YAML, and its keys, by the hub's own code.
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data.library_name == library and data.to_dict()["base_model_relation"] == relation
    assert data.license == PACKAGES["smollm2"].license
    assert data.datasets == ["openai/gsm8k"] and data.tags == ["jaxft", "lora"]
    assert data.pipeline_tag == "text-generation"
    for part in (
        "experiments/sft.py --rank 4",
        "abc123",
        "| eval_loss | 0.5 |",
        r"a\|b c",
        "rg:chain_sum",
    ):
        assert part in text
    assert "secret" not in text and "interval" not in text and "| kl" not in text


def test_what_is_not_known_is_left_out(tmp_path):
    text = model_card(
        "t", kind="model", **COMMON | dict(base_model=str(tmp_path), data=[]), classifier=True
    )
    data = hub.ModelCard(text).data.to_dict()
    assert data["pipeline_tag"] == "text-classification"
    assert (
        not {"base_model", "license", "datasets"} & data.keys() and str(tmp_path.parent) not in text
    )
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags:\n- x\n---\nlicense: no\n")
    assert license_of(tmp_path) == "mit" and license_of("some/where") is None
    assert hub_id("org/name?split=train") == "org/name" and hub_id(tmp_path) is None


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers what huggingface_hub asks for when it makes a repository and uploads small files."""

    def do_GET(self):
        known = self.headers["Authorization"] == "Bearer hf_good"
        self.answer(
            {"name": "me", "type": "user"} if known else {"error": "bad"}, 200 if known else 401
        )

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.seen.append((self.path, body))
        if self.path == "/api/repos/create":
            return self.answer({"url": f"{self.server.address}/me/it", "id": "me/it"})
        if "/preupload/" in self.path:
            files = [
                f | {"uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        self.answer({"commitUrl": f"{self.server.address}/me/it/commit/1", "commitOid": "1"})

    def answer(self, value, status=200):
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen, server.address = [], f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)  # It is on for all tests.
    yield server
    server.shutdown()
    server.server_close()


def run(path, **given):
    """A run of sft.py as it ends: an adapter in its output directory."""
    (path / "adapter").mkdir(exist_ok=True)
    (path / "adapter" / "adapter_config.json").write_text('{"task_type": "CAUSAL_LM"}')
    return flags.replace(sft.Config(), output_dir=str(path), rank=4, **given)


@pytest.mark.parametrize("public", [False, True])
def test_a_run_is_pushed_with_its_card(server, public, tmp_path, capsys):
    config = run(tmp_path, push_to_hub="it", public=public)
    cards.check(config)
    assert cards.publish(config, {"eval_loss": 1.25}, tmp_path) == {"eval_loss": 1.25}
    assert f"pushed to {server.address}/me/it" in capsys.readouterr().out
    created = json.loads(server.seen[0][1])
    private = created.get("private") or created.get("visibility") == "private"  # By version.
    assert created["name"] == "it" and private is not public
    lines = [json.loads(line) for line in server.seen[-1][1].splitlines()]
    sent = {x["value"]["path"]: x["value"]["content"] for x in lines if x["key"] == "file"}
    assert sent.keys() == {"README.md", "adapter_config.json"}
    card = base64.b64decode(sent["README.md"]).decode()
    assert "python experiments/sft.py --rank 4" in card and "| eval_loss | 1.25 |" in card
    assert str(tmp_path.parent) not in card


def test_the_command_of_a_card_is_what_a_shell_takes():
    config = flags.replace(
        sft.Config(), accuracy=False, smoke=True, data=("/me/a b.jsonl", "rg:x?a=1&b=2")
    )
    typed = "--data 'a b.jsonl' 'rg:x?a=1&b=2' --no-accuracy --smoke"
    assert cards.command(config) == f"python experiments/sft.py {typed}"


def test_a_run_without_the_flag_has_a_card_and_asks_nobody(server, tmp_path):
    cards.publish(run(tmp_path), {}, tmp_path)
    assert hub.ModelCard.load(tmp_path / "adapter" / "README.md").data.library_name == "peft"
    assert not server.seen


def test_pushing_is_refused_before_training(server, tmp_path, monkeypatch):
    for name in ("a/b/c", "-x", "a b"):
        with pytest.raises(CheckpointError, match="no name of a repository"):
            checkpoints.check_push(name)
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    with pytest.raises(CheckpointError, match="--push-to-hub me/it: .*(401|oken)"):
        cards.check(run(tmp_path, push_to_hub="me/it"))
    monkeypatch.setattr(hub, "get_token", lambda: None)
    message = "--push-to-hub me/it: no token; set HF_TOKEN"
    hub_flags = flags.Hub("me/it")
    with pytest.raises(CheckpointError, match=message):  # Before anything is loaded.
        merge.main(merge.Config(adapter="none", output_dir=str(tmp_path), hub=hub_flags))


def test_a_hub_that_fails_leaves_the_files_and_says_how_to_push_them(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        CheckpointError, match="was not pushed to me/it: .*push them with `hf upload"
    ):
        checkpoints.push(tmp_path, "me/it")
