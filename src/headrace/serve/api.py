"""The endpoints."""

import asyncio
import hashlib
import secrets
import time
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

import headrace
from headrace.base.errors import InvalidRequestError, ModelNotFoundError
from headrace.engine.sampling import SamplingParams
from headrace.serve.access import record_of
from headrace.serve.body import LARGE_BODY, read_json
from headrace.serve.config import ServerConfig
from headrace.serve.errors import ApiError
from headrace.serve.gate import Gate
from headrace.serve.generation import EventStream, Generation, generate_all
from headrace.serve.metrics import ServerMetrics
from headrace.serve.model import AsyncModel, Prompt, TokenTexts
from headrace.serve.openapi import body_of
from headrace.serve.protocol import ChatRequest, CompletionRequest, SamplingFields
from headrace.serve.replies import ChatChoice, Choice, CompletionChoice, EventWriter, ReplyHead, whole_reply
from headrace.serve.weights import weights_router


class Api:
    """What the endpoints share: the model, the limits, and the way from a request to a reply."""

    def __init__(self, llm: AsyncModel, config: ServerConfig) -> None:
        self.llm = llm
        self.config = config
        self.gate = Gate(llm, config.max_queue)
        self.started = int(time.time())
        self.with_versions = config.weight_updates is not None
        identity = f"{headrace.__version__}/{llm.model_name}".encode()
        self.fingerprint = f"fp_{hashlib.sha256(identity).hexdigest()[:10]}"

    def model_card(self) -> dict[str, Any]:
        return {
            "id": self.llm.model_name,
            "object": "model",
            "created": self.started,
            "owned_by": "headrace",
            "max_model_len": self.llm.max_model_len,
        }

    def check_model(self, name: str) -> None:
        if name != self.llm.model_name:
            cause = f"The model {name[:200]!r} is not served here."
            raise ModelNotFoundError(cause, f"Use {self.llm.model_name!r}, the one that is.")

    async def render(self, body: ChatRequest, num_bytes: int) -> list[int]:
        messages = [message.for_template() for message in body.messages]
        if num_bytes < LARGE_BODY:
            return self.llm.render_chat(messages)
        return await asyncio.to_thread(self.llm.render_chat, messages)

    async def reply(
        self,
        request: Request,
        body: SamplingFields,
        params: SamplingParams,
        prompts: list[Prompt],
        choices: list[Choice],
        prefix: str,
    ) -> Response:
        """Run the prompts and answer in the form asked for, streamed or whole; the id begins with `prefix`."""
        record = record_of(request)
        head = ReplyHead(
            id=f"{prefix}-{secrets.token_hex(12)}",
            created=int(time.time()),
            model=self.llm.model_name,
            fingerprint=self.fingerprint,
        )
        generation = Generation(llm=self.llm, prompts=prompts, params=params, request_id=head.id, scoring=body.scoring)
        if body.stream:
            writer = EventWriter(head, choices, include_usage=body.include_usage, with_versions=self.with_versions)
            return EventStream(generation, writer, record)
        outputs = await generate_all(generation, request.receive, record)
        reply = whole_reply(head, choices, outputs, with_versions=self.with_versions)
        return Response(reply, media_type="application/json")


def build_routers(llm: AsyncModel, config: ServerConfig, metrics: ServerMetrics) -> list[APIRouter]:
    """The API, which may ask for a key, and the probes, which never do."""
    api = Api(llm, config)
    updates = [weights_router(llm, config, _key_check(config.api_key))] if config.weight_updates is not None else []
    return [_openai_router(api), *updates, _probe_router(api, metrics)]


def _openai_router(api: Api) -> APIRouter:
    router = APIRouter(prefix="/v1", dependencies=[Depends(_key_check(api.config.api_key))])

    @router.get("/models")
    async def list_models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [api.model_card()]})

    @router.get("/models/{name:path}")
    async def get_model(name: str) -> JSONResponse:
        api.check_model(name)
        return JSONResponse(api.model_card())

    @router.post("/chat/completions", openapi_extra=body_of(ChatRequest))
    async def create_chat_completion(request: Request) -> Response:
        body, num_bytes = await read_json(request, ChatRequest, api.config.max_body_bytes)
        api.check_model(body.model)
        params = body.sampling()
        api.gate.admit(params.n)
        prompt = await api.render(body, num_bytes)
        choices: list[Choice] = [ChatChoice(api.llm.tokenizer) for _ in range(params.n)]
        return await api.reply(request, body, params, [prompt], choices, "chatcmpl")

    @router.post("/completions", openapi_extra=body_of(CompletionRequest))
    async def create_completion(request: Request) -> Response:
        body, _ = await read_json(request, CompletionRequest, api.config.max_body_bytes)
        api.check_model(body.model)
        params = body.sampling()
        api.gate.admit(len(body.prompt) * params.n)
        texts = api.llm.tokenizer
        choices: list[Choice] = [
            CompletionChoice(
                texts,
                _text_of(prompt, texts) if body.echo else "",
                names_ids=bool(body.return_tokens_as_token_ids),
            )
            for prompt in body.prompt
            for _ in range(params.n)
        ]
        return await api.reply(request, body, params, body.prompt, choices, "cmpl")

    return router


def _probe_router(api: Api, metrics: ServerMetrics) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def get_health() -> JSONResponse:
        if not api.llm.is_healthy:
            raise ApiError(
                503, "The engine has stopped.", "Restart the server; its log has the cause.", code="engine_stopped"
            )
        return JSONResponse({"status": "ok"})

    @router.get("/version")
    async def get_version() -> JSONResponse:
        return JSONResponse({"version": headrace.__version__})

    @router.get("/metrics")
    async def get_metrics() -> Response:
        text = metrics.render(api.llm.engine_snapshot())
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def _text_of(prompt: Prompt, texts: TokenTexts) -> str:
    """The prompt as the text to echo."""
    if isinstance(prompt, str):
        return prompt
    for token in prompt:
        if not 0 <= token < texts.vocab_size:
            raise InvalidRequestError(f"Token id {token} is outside the vocabulary of {texts.vocab_size}.")
    return texts.decode(prompt)


def _key_check(key: str | None) -> Any:
    async def check(request: Request) -> None:
        if key is None:
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secrets.compare_digest(token.strip().encode(), key.encode()):
            cause = "The API key is missing or wrong."
            remedy = "Send it as the header Authorization: Bearer KEY."
            raise ApiError(401, cause, remedy, code="invalid_api_key", headers={"www-authenticate": "Bearer"})

    return check
