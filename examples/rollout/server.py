"""A small OpenAI-compatible server over transformers, one request at a time: a stand-in for vLLM on a laptop.

python examples/rollout/server.py --policy turbo4 --port 8002
"""

import argparse
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from turboattention.errors import TurboAttentionError
from turboattention.integrations.models import LoadedModel, load_model
from turboattention.serving.local import ORDINARY, encode_request, end_tokens, greedy
from turboattention.serving.prompts import Request


def make_server(loaded: LoadedModel, policy: str, port: int = 0) -> ThreadingHTTPServer:
    """Listens on 127.0.0.1; ``policy``: a preset or ``16-bit``. Call ``serve_forever`` in a thread of its own."""
    busy = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"  # a stream ends with its connection

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._json(200, {"object": "list", "data": [{"id": loaded.name, "object": "model"}]})

        def do_POST(self) -> None:
            try:
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
                messages = tuple(body.get("messages", ()))
                request = Request("request", body.get("prompt", ""), messages, (), int(body.get("max_tokens", 16)))
                tokens = encode_request(loaded, request).shape[1]
            except (ValueError, TypeError, AttributeError, TurboAttentionError) as error:
                self._json(400, {"error": {"message": str(error)}})
                return
            with busy:
                self._stream(request, tokens)

        def _stream(self, request: Request, prompt_tokens: int) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            ids: list[int] = []
            sent, finish = "", "length"
            for token, logprob in greedy(loaded, None if policy == ORDINARY else policy, request):
                ids.append(token)
                if token in end_tokens(loaded.model):
                    finish = "stop"
                    break
                text = str(loaded.tokenizer.decode(ids, skip_special_tokens=True))
                # Half of a character waits for its other half.
                piece = "" if text.endswith("\N{REPLACEMENT CHARACTER}") else text[len(sent) :]
                sent += piece
                self._event(request, piece, (str(loaded.tokenizer.decode([token])), logprob))
            self._event(request, "", None, finish)
            usage = {"prompt_tokens": prompt_tokens, "completion_tokens": len(ids)}
            self._write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n")

        def _event(
            self, request: Request, piece: str, token: tuple[str, float] | None, finish: str | None = None
        ) -> None:
            choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
            if request.messages:
                content = [{"token": token[0], "logprob": token[1]}] if token else None
                choice |= {"delta": {"content": piece}, "logprobs": {"content": content}}
            else:
                logprobs = {"tokens": [token[0]], "token_logprobs": [token[1]]} if token else None
                choice |= {"text": piece, "logprobs": logprobs}
            self._write(f"data: {json.dumps({'choices': [choice]})}\n\n")

        def _json(self, status: int, data: Any) -> None:
            text = json.dumps(data)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self._write(text)

        def _write(self, text: str) -> None:
            self.wfile.write(text.encode())
            self.wfile.flush()

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--policy", default=ORDINARY, help="a preset, or 16-bit")
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    make_server(load_model(arguments.model), arguments.policy, arguments.port).serve_forever()
