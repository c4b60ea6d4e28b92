"""What a run sends elsewhere: trackio and webhooks."""
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType, SimpleNamespace

import pytest
import tiny_run


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_run.pictures(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture
def server():
    """A server on loopback: address, and the messages it got."""
    got = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield SimpleNamespace(address=f"http://127.0.0.1:{made.server_port}/hook", got=got)
        made.shutdown()


def test_a_webhook_hears_of_the_start_of_validations_and_of_the_end(path, tmp_path, server, monkeypatch):
    monkeypatch.setenv("TINY_HOOK", server.address)
    settings = tiny_run.settings(path, tmp_path / "run", "log.webhook=$TINY_HOOK", "validation.every=3")
    tiny_run.train(settings)
    said = [entry["text"] for entry in sorted(server.got, key=lambda entry: entry["step"])]
    assert said[0] == "run: begins at step 0 of 6." and "run: ended at step 6 of 6." in said
    assert any(text.startswith("run: step 3: ") for text in said)
    assert all(entry["content"] == entry["text"] and entry["run"] == "run" for entry in server.got)
    assert server.address not in (tmp_path / "run/config.json").read_text()


def test_a_webhook_hears_of_an_error(path, tmp_path, server, monkeypatch):
    settings = tiny_run.settings(path, tmp_path / "run", f"log.webhook={server.address}")

    def fail(run, step):
        if step == 2:
            raise ValueError("the disk is gone")

    with pytest.raises(ValueError, match="the disk is gone"):
        tiny_run.train(settings, fail)
    assert "the disk is gone" in " ".join(entry["text"] for entry in server.got)


def test_a_webhook_that_does_not_answer_leaves_the_run_alone(path, tmp_path, capsys):
    tiny_run.train(tiny_run.settings(path, tmp_path / "run", "log.webhook=http://127.0.0.1:9/none"))
    assert (tmp_path / "run/checkpoints/00000006").is_dir()
    assert capsys.readouterr().out.count("The webhook did not take a message") == 1


@pytest.mark.parametrize("word, part", [("file:///etc/passwd", "must be an address"), ("$NOT_THERE", "is not set")])
def test_an_address_that_is_none_is_refused(path, tmp_path, word, part):
    with pytest.raises(ValueError, match=part):
        tiny_run.settings(path, tmp_path / "run", f"log.webhook={word}")


def test_trackio_gets_what_tensorboard_gets(path, tmp_path, monkeypatch):
    logged, run = [], SimpleNamespace(finish=lambda: logged.append("finished"))
    run.log = lambda values, step: logged.append((step, *values))
    stand_in = ModuleType("trackio")
    stand_in.__spec__ = SimpleNamespace(name="trackio")
    stand_in.init = lambda **words: logged.append((words["project"], words["name"])) or run
    stand_in.Image = lambda pixels: pixels
    monkeypatch.setitem(sys.modules, "trackio", stand_in)
    settings = tiny_run.settings(path, tmp_path / "run", "log.trackio=true", "samples.every=6",
                                 samples={"prompts": ["red card"], "steps": 1})
    tiny_run.train(settings)
    assert logged[0] == ("pixstack", "run") and logged[-1] == "finished"
    assert (6, "samples") in logged and [entry[0] for entry in logged if "loss" in entry] == [1, 2, 3, 4, 5, 6]
