"""The server of a page: to whom it answers, and with what."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import pytest

from sparse_fcmae import UserError
from sparse_fcmae.report.page import in_page
from sparse_fcmae.report.record import RunReader
from sparse_fcmae.report.watch import Server


@pytest.fixture
def server(run):
    with Server([RunReader(run, in_page)], 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def get(server, path, **headers):
    request = urllib.request.Request(f"http://127.0.0.1:{server.server_port}{path}", headers=headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read(), answer.headers


def test_the_record_is_that_of_now(server, run):
    page, headers = get(server, "/")
    assert b"<script" in page
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    first = json.loads(get(server, "/record.json")[0])
    assert first["live"] is True
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "epoch": 3.25, "loss": 0.01}\n')
    second = json.loads(get(server, "/record.json")[0])
    lengths = [len(found["runs"][0]["charts"][0]["lines"][0]["value"]) for found in (first, second)]
    assert lengths == [12, 13]


def test_pictures_are_served_by_themselves(server, run):
    found = json.loads(get(server, "/record.json")[0])["runs"][0]["reconstructions"]
    data, headers = get(server, found["steps"][0]["source"])
    assert data == (run / "reconstructions" / "step-00000004.png").read_bytes()
    assert headers["Content-Type"] == "image/png"


@pytest.mark.parametrize("path", ["/config.json", "/../config.json", "/pictures/", "/pictures/../../etc/passwd"])
def test_nothing_else_is_served(server, path):
    with pytest.raises(urllib.error.HTTPError) as refused:
        get(server, path)
    assert refused.value.code == 404


def test_another_name_is_refused(server):
    with pytest.raises(urllib.error.HTTPError) as refused:
        get(server, "/", Host=f"evil.example:{server.server_port}")
    assert refused.value.code == 403
    for name in (f"localhost:{server.server_port}", "localhost:8000", "localhost", "127.0.0.1"):  # as through a tunnel
        assert get(server, "/", Host=name)


def test_a_run_that_is_gone_is_said(server, run):
    shutil.rmtree(run)
    with pytest.raises(urllib.error.HTTPError) as refused:
        get(server, "/record.json")
    assert refused.value.code == 410
    assert b"no run in this folder" in refused.value.read()


def test_only_this_machine_is_listened_to(server):
    assert server.socket.getsockname()[0] == "127.0.0.1"


def test_a_port_that_is_taken(server, run):
    with pytest.raises(UserError, match=r"`port` .* choose another"):
        Server([RunReader(run, in_page)], server.server_port)


def test_ctrl_c_ends_it_with_a_page(run):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "sparse_fcmae", "report", str(run), "--watch", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert f"http://127.0.0.1:{port}" in process.stdout.readline()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20) as answer:
            assert b"sparse-fcmae report" in answer.read()
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == f"report: {run / 'report.html'}\n"
    assert process.returncode == 0
