"""Small servers on this machine, and images whose scores are known."""

import base64
import contextlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
import urllib3
import uvicorn

from noisear_rl.rewards.http import png
from noisear_rl.rewards.server import ServeConfig, make_app

JSON, SAFETENSORS = "application/json", "application/x-safetensors"

LOOPBACK = "127.0.0.1"


@contextlib.contextmanager
def answering(respond):
    """A server of the standard library: ``respond(path, headers, body)`` gives status, body and pause in seconds."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status, content, pause = respond(self.path, self.headers, body)
            time.sleep(pause)
            with contextlib.suppress(OSError):  # the client may be gone
                if not status:  # a header that goes on and on
                    self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
                    while True:
                        self.wfile.write(b"a")
                        time.sleep(0.02)
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", content.decode())
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer((LOOPBACK, 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://{LOOPBACK}:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def gray(*levels, size=8):
    """One gray image per level of 255."""
    return (torch.tensor(levels) / 255)[:, None, None, None].expand(-1, 3, size, size).clone()


def encoded(content):
    return base64.b64encode(content).decode()


@contextlib.contextmanager
def serving(reward, **options):
    """A server in a thread; yields its address."""
    app = make_app(reward, ServeConfig(**options))
    listening = socket.create_server((LOOPBACK, 0))
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield f"http://{LOOPBACK}:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        listening.close()


def body_of(images, prompts, **changes):
    texts = [encoded(png(image)) for image in images]
    return json.dumps({"images": texts, "prompts": prompts} | changes).encode()


def post(url, body, content_type=JSON, **headers):
    response = urllib3.request("POST", url, body=body, headers={"Content-Type": content_type, **headers}, timeout=30)
    return response.status, json.loads(response.data) if response.data[:1] == b"{" else response.data
