"""Who reaches the control routes: SGLang's own authentication before our routes, for every message and the info."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pydantic import BaseModel
from starlette.testclient import TestClient

from shared.protocol import CONTROL_PATH, INFO_PATH
from tests.messages import MESSAGES
from tests.replicas import Replicas

pytestmark = pytest.mark.filterwarnings("ignore")  # dozens, of what SGLang itself imports

ADMIN, API = "the-admin-key", "the-api-key"
# What the server was started with (admin key, api key) -> the key that our routes take.
KEYS = {(ADMIN, None): ADMIN, (None, API): API, (ADMIN, API): ADMIN}
REFUSED = (
    "",
    "Bearer",
    "Bearer ",
    "Bearer wrong",
    f"Basic {ADMIN}",
    f"Bearer {ADMIN} ",
    ADMIN,
    f"Bearer {ADMIN.upper()}",
)


class Guarded(Replicas):
    """A server whose routes are added and guarded as in SGLang's process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, admin_key: str | None, api_key: str | None) -> None:
        from fastapi import FastAPI
        from sglang.srt.utils.auth import add_api_key_middleware

        from receiver_plugin import sglang_http
        from receiver_plugin.gate import Gate

        super().__init__()
        app = FastAPI()
        monkeypatch.setattr("receiver_plugin.sglang_http.http_server.app", app)
        app.add_middleware(Gate, control=self.control)
        sglang_http._add_routes(self.control)
        add_api_key_middleware(app, api_key=api_key, admin_api_key=admin_key)
        self.web = TestClient(app)

    def control_with(self, message: BaseModel, authorization: str | None) -> int:
        headers = {} if authorization is None else {"Authorization": authorization}
        return self.web.post(CONTROL_PATH, content=message.model_dump_json(), headers=headers).status_code


@pytest.fixture(params=KEYS, ids=("admin key", "api key", "both"))
def guarded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Guarded, str]]:
    pytest.importorskip("sglang")
    yield Guarded(monkeypatch, *request.param), KEYS[request.param]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.kind)
def test_a_message_without_the_key_goes_nowhere(guarded: tuple[Guarded, str], message: BaseModel) -> None:
    server, key = guarded
    others = {f"Bearer {other}" for other in (ADMIN, API)} - {f"Bearer {key}"}
    for authorization in (None, *REFUSED, *others):
        if authorization != f"Bearer {key}":
            assert server.control_with(message, authorization) == 401, authorization
    assert server.kinds == []
    assert server.control_with(message, f"Bearer {key}") != 401
    assert server.kinds, "with the key it reaches the schedulers"


def test_info_without_the_key_says_nothing(guarded: tuple[Guarded, str]) -> None:
    server, key = guarded
    assert server.web.get(INFO_PATH).status_code == 401
    assert server.web.get(INFO_PATH, headers={"Authorization": "Bearer wrong"}).json() == {"error": "Unauthorized"}
    assert server.kinds == []
    reply = server.web.get(INFO_PATH, headers={"Authorization": f"Bearer {key}"})
    assert reply.status_code == 200 and reply.json()["state"] == "SERVING"


@pytest.mark.parametrize("path", [CONTROL_PATH + "/", "/" + CONTROL_PATH, CONTROL_PATH.upper(), CONTROL_PATH + "?x=1"])
@pytest.mark.parametrize("method", ["POST", "GET", "PUT", "HEAD", "OPTIONS", "PATCH"])
def test_no_other_way_of_asking_reaches_a_receiver(guarded: tuple[Guarded, str], path: str, method: str) -> None:
    server, _ = guarded
    server.web.request(method, path, content=MESSAGES[-1].model_dump_json(), follow_redirects=True)
    assert "probe" not in server.kinds and set(server.kinds) <= {"describe"}  # the gate asks whether it is fenced
