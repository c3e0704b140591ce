"""The server: what OpenAI's clients and curl get, how requests share rows and do not, what is refused, how it ends."""

import asyncio
import copy
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import openai
import pytest
import torch
import transformers
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hf import tiny

from dbattn import RetrievalConfig
from dbattn.cli import main
from dbattn.cli._parser import make_parser
from dbattn.hf import load_model, wrap
from dbattn.serve.app import Gate, Limits, make_app
from dbattn.serve.contexts import Served, named, twin_of, wrapped
from dbattn.serve.conversations import Conversations
from dbattn.serve.engine import Engine, Generation
from dbattn.serve.text import TextUntil
from dbattn.text.haystack import read_haystack
from dbattn.text.prompt import question_ids

# The tiny model of random weights says something else after every token: equal answers mean equal rows.
TOKENS = 6
QUESTION = "What is a module?"
LIMITS = Limits(tokens=2000, body=50_000, requests=12)


@pytest.fixture(scope="module")
def context(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    (folder / "book.txt").write_text(read_haystack()[:3000])
    out = folder / "book.dbattn"
    assert main(["ingest", str(folder / "book.txt"), "--out", str(out), "--model", str(model_folder), "--quiet"]) == 0
    return out


@pytest.fixture(scope="module")
def model(model_folder):
    return load_model(model_folder)


@pytest.fixture(scope="module")
def dense(model):
    """The model as it is, not wrapped."""
    return twin_of(model[0])


@pytest.fixture(scope="module")
def served(model, context, dense):
    """With a budget of all rows: answers are the model's own, whatever was asked before."""
    with wrapped(*model, "tiny", {"book": context}, k=4096) as served:
        yield served


class Running:
    """A server in a thread of this process."""

    def __init__(self, served, limits=LIMITS, memory=1 << 28, batch=8):
        self.engine = Engine(Conversations(memory), batch=batch)
        self.server = uvicorn.Server(
            uvicorn.Config(make_app(served, self.engine, limits), port=0, lifespan="on", log_level="warning")
        )
        self.server.capture_signals = contextmanager(lambda: iter([None]))  # signals are the main thread's
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve()))
        self.thread.start()
        wait_for(lambda: self.server.started)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def client(self, key="somebody", **options):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, **options)

    def metric(self, name):
        return float(re.search(rf"^{re.escape(name)} (\S+)$", self.get("/metrics"), re.MULTILINE)[1])

    def get(self, path):
        return curl(self.url + path)[1]

    def stop(self):
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()


@pytest.fixture(scope="module")
def server(served):
    running = Running(served)
    yield running
    running.stop()
    assert not running.engine.is_alive


def curl(*words):
    """Status and body."""
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    done = subprocess.run(["curl", "-sS", "-w", "\n%{http_code}", *words], capture_output=True, text=True, timeout=60)
    assert not done.returncode, done.stderr
    body, _, status = done.stdout.rpartition("\n")
    return int(status), body


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def chat(client, *said, model="tiny@book", **options):
    """Ask after a conversation: question, answer, question, ..."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    options.setdefault("max_tokens", TOKENS)
    return client.chat.completions.create(model=model, messages=messages, **options)


def text_of(answer):
    return answer.choices[0].message.content


def expected(served, dense, ids, tokens=TOKENS):
    """What the model itself says next, densely and from the start, cut as an answer is."""
    ids = torch.tensor([ids])
    said = dense.generate(ids, do_sample=False, max_new_tokens=tokens, pad_token_id=0)[0, ids.shape[1] :]
    return served.tokenizer.decode(said, skip_special_tokens=True).lstrip().partition("\n\n")[0]


def conversation_ids(served, *said):
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    return served.ids + served.tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]


def test_a_chat_about_a_context_says_what_the_model_says_streamed_or_not_with_usage(server, served, dense):
    book, client = served["tiny@book"], server.client("plain")
    ids = conversation_ids(book, QUESTION)
    assert ids == book.ids + question_ids(QUESTION, book.tokenizer)[0].tolist()  # as dbattn ask puts it
    whole = chat(client, QUESTION)
    assert text_of(whole) == expected(book, dense, ids)
    assert whole.model == "tiny@book"
    assert whole.choices[0].finish_reason == "length"
    usage = whole.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(ids), TOKENS)
    assert usage.total_tokens == len(ids) + TOKENS
    assert usage.prompt_tokens_details.cached_tokens == len(book.ids)

    *parts, last = chat(client, QUESTION, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == text_of(whole)
    assert len(parts) > 2
    assert last.choices[0].finish_reason == "length"
    assert last.usage.total_tokens == usage.total_tokens


def test_completions_go_on_after_a_context_or_a_prompt(server, served, dense):
    client = server.client("completions")
    for name in ("tiny", "tiny@book"):
        ids = served[name].ids + served[name].tokenizer(" the module is")["input_ids"]
        wanted = dense.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=4, pad_token_id=0)[0, len(ids) :]
        options = {"model": name, "prompt": " the module is", "max_tokens": 4}
        whole = client.completions.create(**options)
        assert whole.choices[0].text == served[name].tokenizer.decode(wanted)
        assert whole.usage.prompt_tokens == len(ids)
        parts = list(client.completions.create(**options, stream=True))
        assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text


def test_contexts_are_models_and_can_be_named_in_a_request_but_never_as_paths(server, served, context):
    client = server.client()
    assert [model.id for model in client.models.list()] == ["tiny", "tiny@book"]
    assert client.models.retrieve("tiny@book").context_tokens == len(served["tiny@book"].ids) > 500
    for model in ("tiny", "tiny@book", openai.omit):
        named_so = chat(client, QUESTION, model=model, extra_body={"context": "book"})
        assert (named_so.model, text_of(named_so)) == ("tiny@book", text_of(chat(client, QUESTION)))
    for wrong in (str(context), "../book", "book.dbattn", 3, ""):
        with pytest.raises(openai.NotFoundError) as refused:
            chat(client, QUESTION, extra_body={"context": wrong})
        assert refused.value.code == "model_not_found"


def test_curl_sees_the_stream_end_health_and_metrics(server):
    body = {"model": "tiny@book", "messages": [{"role": "user", "content": "?"}], "max_tokens": 2, "stream": True}
    words = ["-N", "-H", "Content-Type: application/json", "-d", json.dumps(body)]
    status, said = curl(f"{server.url}/v1/chat/completions", *words)
    assert status == 200
    events = [line for line in said.splitlines() if line]
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["usage"]["completion_tokens"] == 2
    assert json.loads(server.get("/health")) == {"status": "ok"}
    text = server.get("/metrics")
    sample = r'[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? [0-9.e+]+'
    assert all(line.startswith("# ") or re.fullmatch(sample, line) for line in text.splitlines())
    assert server.metric('dbattn_requests_total{path="/v1/chat/completions",status="200"}') >= 1
    assert server.metric('dbattn_first_token_seconds_bucket{le="+Inf"}') >= 1


def test_the_next_turn_reads_only_what_is_new_and_answers_as_if_all_were_read(server, served, dense):
    book = served["tiny@book"]
    first = chat(server.client("turns"), QUESTION)
    said = (QUESTION, text_of(first), "And what is a class?")
    second = chat(server.client("turns"), *said)
    ids = conversation_ids(book, *said)
    assert text_of(second) == expected(book, dense, ids) == text_of(chat(server.client("another"), *said))
    reused = second.usage.prompt_tokens_details.cached_tokens
    assert first.usage.prompt_tokens <= reused < second.usage.prompt_tokens == len(ids)
    # Asked again, and from the beginning: what followed is dropped.
    again = chat(server.client("turns"), *said)
    assert text_of(again) == text_of(second)
    assert again.usage.prompt_tokens_details.cached_tokens == len(ids) - 1


@contextmanager
def watched(monkeypatch):
    """Every cache that is lent out is checked: its owner's, of equal tokens, and lent once; yields batch sizes."""
    take, keep, together = Conversations.take, Conversations.keep, Generation.read_together
    owners, lent, sizes = {}, set(), []

    def checked_take(self, owner, served, ids):
        cache = take(self, owner, served, ids)
        rows = cache.get_seq_length()
        if rows > len(served.ids):
            assert owners[id(cache)] == (owner, served)
            assert cache.layers[0].token_ids[0, :rows].tolist() == ids[:rows]
        assert id(cache) not in lent
        lent.add(id(cache))
        return cache

    def checked_keep(self, owner, served, ids, asked, cache):
        lent.remove(id(cache))
        owners[id(cache)] = (owner, served)
        assert cache.layers[0].token_ids[0, : len(ids)].tolist() == ids
        keep(self, owner, served, ids, asked, cache)

    def counted(several):
        sizes.append(len(several))
        together(several)

    with monkeypatch.context() as patched:
        patched.setattr(Conversations, "take", checked_take)
        patched.setattr(Conversations, "keep", checked_keep)
        patched.setattr(Generation, "read_together", staticmethod(counted))
        yield sizes


def test_eight_clients_at_once_get_what_each_would_get_alone_and_share_steps(server, served, dense, monkeypatch):
    book = served["tiny@book"]
    questions = [f"What is {word}?" for word in ("a", "the name", "one", "it", "self", "None", "an int", "not")]

    def two_turns(question):
        client = server.client(question)
        first = text_of(chat(client, question))
        return first, chat(client, question, first, "Why?")

    with watched(monkeypatch) as sizes, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(two_turns, questions))
    for question, (first, second) in zip(questions, answers, strict=True):
        assert first == expected(book, dense, conversation_ids(book, question))
        assert text_of(second) == expected(book, dense, conversation_ids(book, question, first, "Why?"))
        assert second.usage.prompt_tokens_details.cached_tokens > len(book.ids)
    assert max(sizes) > 2


def test_rows_of_one_api_key_or_user_never_serve_another_under_load(server, served, monkeypatch):
    book = served["tiny@book"]
    words = ["one", "two"]
    wanted = {word: text_of(chat(server.client("first"), word)) for word in words}

    def ask(number):
        key, user = ("red", "blue")[number % 2], ("ann", "bob")[number // 2 % 2]
        answer = chat(server.client(key), words[number // 4 % 2], user=user)
        return text_of(answer), words[number // 4 % 2]

    with watched(monkeypatch), ThreadPoolExecutor(8) as pool:
        assert all(wanted[word] == text for text, word in pool.map(ask, range(16)))
    for key, user in (("green", "ann"), ("red", "eve"), ("re", "dann")):
        new = chat(server.client(key), "one", user=user)
        assert new.usage.prompt_tokens_details.cached_tokens == len(book.ids)
    old = chat(server.client("red"), "one", user="ann")
    assert old.usage.prompt_tokens_details.cached_tokens == old.usage.prompt_tokens - 1


def test_an_answer_can_carry_its_sources(server, served):
    plain = chat(server.client("sources"), QUESTION)
    assert not hasattr(plain, "dbattn")
    wish = {"dbattn": {"sources": True}}
    answer = chat(server.client("sources"), QUESTION, extra_body=wish)
    *_, last = chat(server.client("sources"), QUESTION, extra_body=wish, stream=True)
    assert text_of(answer) == text_of(plain)
    for found in (answer.dbattn, last.dbattn):
        assert 0 < found["rows_read"] <= found["of"]
        assert found["of"] >= len(served["tiny@book"].ids)
        assert found["error_estimate"] == pytest.approx(0, abs=1e-3)  # the budget is all rows
        assert 1 <= len(found["sources"]) <= 3
        for source in found["sources"]:
            ids = served["tiny@book"].ids[source["start"] : source["end"]]
            assert source["text"] == served["tiny@book"].tokenizer.decode(ids).strip()
            assert 0 < source["share"] < 1
    without = chat(server.client("sources"), QUESTION, model="tiny", extra_body=wish)
    assert without.dbattn["sources"] == []


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        ({"model": "gpt-4"}, 404, "these are: tiny, tiny@book"),
        ({"n": 2}, 400, "n=2 is not served"),
        ({"max_tokens": 2001}, 400, "expected 1 to 2000"),
        ({"max_tokens": 0}, 400, "expected 1 to 2000"),
        ({"max_tokens": 2000, "messages": [{"role": "user", "content": "so " * 1500}]}, 400, "maximum context length"),
        ({"temperature": -1}, 400, "temperature"),
        ({"stop": [3]}, 400, "stop"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"content": "?"}]}, 400, "role"),
        ({"extra_body": {"dbattn": {"source": 1}}}, 400, "dbattn"),
        ({"extra_body": {"generation_config": '{"num_beams": 4}'}}, 400, "beam"),
        ({"extra_body": {"colour": "red"}}, 400, "colour"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 400, "image"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}, 400, "takes no tools"),
        ({"extra_body": {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}}, 400, "chat_template_kwargs"),
        ({"extra_body": {"generation_config": "3"}}, 400, "cannot be answered"),
        ({"messages": [{"role": "user", "content": "so " * 20_000}]}, 413, "larger than 50000 bytes"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_openais_form(server, options, status, said):
    options = {"model": "tiny@book", "messages": [{"role": "user", "content": "?"}], "max_tokens": 2, **options}
    with pytest.raises(openai.APIStatusError) as refused:
        server.client().chat.completions.create(**options)
    assert refused.value.status_code == status
    assert said in refused.value.body["message"]
    assert refused.value.body.keys() == {"message", "type", "param", "code"}


def test_what_is_no_request_is_refused_too_and_routes_that_load_models_are_not_there(server):
    for path, status in (("/v1/chat/completions", 405), ("/nowhere", 404), ("/docs", 404)):
        found, body = curl(server.url + path)
        assert (found, set(json.loads(body)["error"])) == (status, {"message", "type", "param", "code"})
    for path, body, status in (
        ("/v1/chat/completions", "{", 400),
        ("/v1/completions", "[]", 400),
        ("/load_model", "{}", 404),
        ("/reset", "{}", 404),
        ("/v1/responses", "{}", 404),
    ):
        found, said = curl(server.url + path, "-H", "Content-Type: application/json", "-d", body)
        assert (found, bool(json.loads(said)["error"]["message"])) == (status, True)


@contextmanager
def slow_steps(monkeypatch, seconds=0.05):
    step = Engine.round

    def slowly(self):
        time.sleep(seconds)
        step(self)

    with monkeypatch.context() as patched:
        patched.setattr(Engine, "round", slowly)
        yield


def test_a_request_has_left_before_its_client_holds_the_end_of_the_answer():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await send({"type": "http.response.body", "body": b"b"})

    under_way = []

    async def send(message):
        under_way.append((message["type"], gate.under_way))

    asked = iter([{"type": "http.request", "body": b"{}"}])

    async def receive():
        if (message := next(asked, None)) is not None:
            return message
        await asyncio.Event().wait()

    engine = SimpleNamespace(metrics=SimpleNamespace(note_request=lambda path, status: None))
    gate = Gate(app, engine, Limits(requests=1))
    asyncio.run(gate({"type": "http", "method": "POST", "path": "/", "headers": []}, receive, send))
    assert under_way == [("http.response.start", 1), ("http.response.body", 1), ("http.response.body", 0)]
    assert gate.under_way == 0


def test_requests_beyond_the_limit_get_429_and_those_taken_are_answered(served, monkeypatch):
    running = Running(served, Limits(requests=2), batch=1)
    try:
        with slow_steps(monkeypatch), ThreadPoolExecutor(5) as pool:
            asked = [pool.submit(chat, running.client(str(i)), "?", model="tiny", max_tokens=8) for i in range(2)]
            wait_for(lambda: running.metric("dbattn_requests_under_way") == 2)
            with pytest.raises(openai.RateLimitError) as refused:
                chat(running.client("late"), "?", model="tiny")
            assert refused.value.response.headers["retry-after"] == "1"
            assert all(answer.result().usage.completion_tokens == 8 for answer in asked)
        assert running.metric("dbattn_requests_under_way") == 0
    finally:
        running.stop()


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_ends_when_its_client_leaves_running_or_waiting(served, stream, monkeypatch):
    running = Running(served, batch=1)
    address = ("127.0.0.1", int(running.url.rpartition(":")[2]))
    body = {"model": "tiny", "messages": [{"role": "user", "content": "?"}], "max_tokens": 1500, "stream": stream}
    raw = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}"
    )
    try:
        with slow_steps(monkeypatch, 0.01):
            clients = [socket.create_connection(address) for _ in range(2)]
            for client in clients:
                client.sendall(head.encode() + b"\r\n\r\n" + raw)
            wait_for(lambda: running.engine.active == running.engine.waiting == 1)
            for client in clients:
                client.close()
            wait_for(lambda: running.metric('dbattn_answers_total{outcome="cancelled"}') == 2)
        assert running.metric('dbattn_tokens_total{kind="generated"}') < 1500
        assert running.metric("dbattn_requests_under_way") == running.engine.active == running.engine.waiting == 0
        assert chat(running.client(), "?", model="tiny").usage.completion_tokens == TOKENS
    finally:
        running.stop()


def test_an_answer_that_fails_says_so_and_the_next_one_is_answered(server, monkeypatch, caplog):
    def fails(self, tokens=1):
        raise ArithmeticError('"no"')

    with monkeypatch.context() as patched:
        patched.setattr(Generation, "read", fails)
        with pytest.raises(openai.InternalServerError) as failed:
            chat(server.client("fails"), "?")
        assert failed.value.body["message"] == "the answer failed"
        with pytest.raises(openai.APIError, match="the answer failed"):
            list(chat(server.client("fails"), "?", stream=True))
    assert "ArithmeticError" in caplog.text
    assert chat(server.client("fails"), "?").usage.completion_tokens == TOKENS


def test_a_seed_gives_the_same_sample_whoever_else_is_served(server):
    def sample(number):
        seed = number % 2
        return seed, text_of(chat(server.client(str(number)), "?", temperature=1.5, seed=seed, model="tiny"))

    with ThreadPoolExecutor(6) as pool:
        said = set(pool.map(sample, range(6)))
    assert len(said) == 2
    assert len({text for _, text in said}) == 2


def test_a_stop_is_not_part_of_the_text(server):
    whole = text_of(chat(server.client("stop"), QUESTION, max_tokens=12))
    stop = whole[5:8]
    cut = chat(server.client("stop"), QUESTION, max_tokens=12, stop=[stop, "never said"])
    assert text_of(cut) == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.usage.completion_tokens < 12


@settings(max_examples=30)
@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.integers(1, 5))
def test_text_comes_whole_until_the_first_stop_is_complete_however_it_is_cut(text, stops, size):
    until = TextUntil(stops)
    shown = "".join(until.feed(text[at : at + size]) for at in range(0, len(text), size)) + until.end()
    wanted = text
    for stop in range(len(text), 0, -1):
        complete = [len(one) for one in stops if text[:stop].endswith(one)]
        if complete:
            wanted = text[: stop - max(complete)]
    assert shown == wanted
    assert until.has_ended == any(stop in text for stop in stops)


def said_after(served, ids, conversations, owner, tokens=4, **options):
    """Let an engine answer; the ids afterwards."""
    config = copy.deepcopy(served.model.generation_config)
    config.max_new_tokens = tokens
    made = Generation(served, ids, config, put=lambda token: True, owner=owner, **options)
    Engine(conversations).answer(made)
    return made


def test_conversations_are_kept_up_to_their_memory_the_latest_ones(served):
    book, conversations = served["tiny@book"], Conversations(1 << 28)
    ids = conversation_ids(book, "?")
    one = said_after(book, ids, conversations, "a")
    assert (len(conversations), one.tokens_reused) == (1, len(book.ids))
    each = conversations.nbytes
    # Rows of its own, and not those of the context.
    assert 0 < each < sum(layer.db.nbytes for layer in book.handle.new_cache().layers)
    conversations.memory = int(2.5 * each)
    for owner in "bcb":
        said_after(book, ids, conversations, owner)
    assert len(conversations) == 2
    assert conversations.nbytes <= conversations.memory
    assert said_after(book, ids, conversations, "c").tokens_reused == len(ids) - 1
    assert said_after(book, ids, conversations, "a").tokens_reused == len(book.ids)  # it had to go
    conversations = Conversations(each // 2)
    said_after(book, ids, conversations, "a")
    assert (len(conversations), conversations.nbytes) == (0, 0)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_an_engine_says_what_models_of_every_kind_say_and_goes_back_where_they_cannot(family, monkeypatch):
    monkeypatch.setattr("dbattn.serve.engine.PIECE", 16)
    lm = tiny(family)  # gemma2's sliding windows cannot be cropped, nor be part of a batch
    prompts = [torch.randint(2, 126, (1, length)) for length in (60, 7, 1, 33)]
    options = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0}
    wanted = [lm.generate(prompt, **options)[0].tolist() for prompt in prompts]
    config = transformers.GenerationConfig(**options)
    with wrap(lm, RetrievalConfig(k=10**6, dense_below=0)) as handle:
        one = Served("tiny", lm, SimpleNamespace(eos_token_id=None), handle)
        engine = Engine(Conversations(1 << 28), batch=3)
        for _ in range(2):  # the second time from what was kept
            made = [Generation(one, prompt[0].tolist(), config, put=lambda token: True) for prompt in prompts]
            for each in made:
                engine.submit(each)
            while not all(each.ended for each in made):
                engine.round()
            assert [each.ids for each in made] == wanted
            assert [each.outcome for each in made] == ["done"] * 4
        assert made[0].tokens_reused == (0 if family == "gemma2" else 59)
        with pytest.raises(ValueError, match="the prompt is empty"):
            Generation(one, [], config, put=lambda token: True)


def test_a_context_read_by_windows_is_answered_from_those_that_the_whole_question_chooses(
    model_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("dbattn.serve.engine.PIECE", 8)
    (tmp_path / "long.txt").write_text(read_haystack()[:6000])
    words = ["ingest", str(tmp_path / "long.txt"), "--out", str(tmp_path / "long"), "--model", str(model_folder)]
    assert main([*words, "--window-tokens", "400", "--quiet"]) == 0
    with wrapped(*load_model(model_folder), "tiny", {"long": tmp_path / "long"}) as served:
        long, conversations = served["tiny@long"], Conversations(1 << 28)
        ids = conversation_ids(long, QUESTION)
        made = said_after(long, ids, conversations, "a", wants_sources=True)
        found = made.evidence
        assert made.outcome == "done"
        assert 0 < found.rows_read < 0.8 * found.of
        assert found.of >= len(long.ids)
        said, cache = torch.tensor([ids]), long.handle.new_cache()
        options = {"do_sample": False, "max_new_tokens": 4, "attention_mask": torch.ones_like(said)}
        again = long.model.generate(said, past_key_values=cache, **options)
        holes = {"attention_mask": (said != ids[3]).long(), "past_key_values": long.handle.new_cache()}
        with pytest.raises(ValueError, match="not causal with left padding: no such mask can be honoured over windows"):
            long.model.generate(said, **options | holes)
        assert made.ids == again[0].tolist()
        for source in found.sources.found:
            assert (
                long.tokenizer.decode(long.ids[source.passage.first : source.passage.stop]).strip()
                == source.passage.text
            )
        assert said_after(long, [*made.ids, ids[-1]], conversations, "a").tokens_reused == len(long.ids)


def test_an_answer_that_fails_ends_alone(served):
    book, engine = served["tiny@book"], Engine(Conversations(1 << 28))
    config = copy.deepcopy(book.model.generation_config)
    config.max_new_tokens, config.do_sample = 3, True
    made = [Generation(book, conversation_ids(book, "?"), config, put=lambda token: True, seed=1) for _ in range(2)]
    first = made[0].prompt_tokens
    made[0]._chooser._processors = lambda ids, scores: scores if ids.shape[1] == first else scores * float("nan")
    for each in made:
        engine.submit(each)
    while not all(each.ended for each in made):
        engine.round()
    assert [each.outcome for each in made] == ["failed", "done"]
    assert "no token has a probability" in str(made[0].error)


def test_an_answer_that_has_ended_does_not_wait_for_the_prompts_of_others(served):
    engine, config = Engine(Conversations(1 << 28)), copy.deepcopy(served["tiny"].model.generation_config)
    config.max_new_tokens = 1
    one, other = (Generation(served["tiny"], list(range(n)), config, put=lambda token: True) for n in (5, 60))
    for each in (one, other):
        engine.submit(each)
    engine.round()
    assert 0 < one.first_token <= one.ended < other.first_token
    engine.stop()


def test_two_conversations_that_begin_alike_do_not_take_each_others_rows(served):
    plain, conversations = served["tiny"], Conversations(1 << 28)
    for reused in (0, 9):  # the same again, after an answer that was longer than the question
        assert said_after(plain, list(range(10)), conversations, "", tokens=30).tokens_reused == reused
    conversations.clear()
    begin, one, other = list(range(10, 20)), list(range(100, 130)), list(range(200, 230))
    said_after(plain, begin + one, conversations, "")
    assert said_after(plain, begin + other, conversations, "").tokens_reused == 0
    assert said_after(plain, begin + one, conversations, "").tokens_reused == len(begin + one) - 1
    assert said_after(plain, begin + other, conversations, "").tokens_reused == len(begin + other) - 1


def test_contexts_have_names_that_can_be_typed():
    assert {name: str(path) for name, path in named(["a/book.dbattn", "law=b/book.dbattn"]).items()} == {
        "book": "a/book.dbattn", "law": "b/book.dbattn"
    }  # fmt: skip
    for wrong in (["book", "x/book.dbattn"], ["a b"], ["a@b=book"], ["=book"]):
        with pytest.raises(ValueError, match="--context"):
            named(wrong)


def test_wrong_options_of_serve_and_chat_are_said_before_a_model_is_loaded(context, tmp_path, monkeypatch, capsys):
    for place in ("dbattn.cli.serve.load", "dbattn.cli.chat.load"):
        monkeypatch.setattr(place, lambda *_: pytest.fail("a model was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for words in (
            ["serve", "--context", str(tmp_path)],
            ["serve", "--context", str(context), "--port", port],
            ["serve", "--host", "no such host"],
            ["serve", "--batch", "0"],
            ["serve", "--port", "70000"],
            ["chat", str(tmp_path / "none")],
            ["chat", str(context), "--max-tokens", "0"],
        ):
            assert main([*words, "--quiet"]) in (1, 2)
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith("dbattn: ")
    assert make_parser().parse_args(["serve"]).host == "127.0.0.1"
    with pytest.raises(SystemExit):
        make_parser().parse_args(["serve", "--memory", "lots"])


def test_sigterm_lets_answers_end_and_takes_no_new_ones(model_folder, context):
    words = ["-m", "dbattn", "serve", "--model", str(model_folder), "--name", "tiny", "--context", str(context)]
    serving = subprocess.Popen([sys.executable, *words, "--port", "0"], stderr=subprocess.PIPE, text=True)
    try:
        url = next(found[1] for line in serving.stderr if (found := re.search(r"(http\S+)/v1", line)))
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=60)
        answer = iter(chat(client, QUESTION, max_tokens=60, stream=True, model="tiny@book"))
        next(answer)
        serving.send_signal(signal.SIGTERM)
        last = list(answer)[-1]
        assert last.usage.completion_tokens == 60
        assert serving.wait(20) == 0
        assert serving.stderr.read().endswith("all requests were answered\n")
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
    finally:
        serving.kill()
        serving.wait()


@pytest.fixture
def typed(monkeypatch):
    """What is typed into a chat, line by line."""

    def type_in(*lines):
        lines = iter(lines)

        def next_line(prompt=""):
            line = next(lines, None)
            if line is None:
                raise EOFError
            return line

        monkeypatch.setattr("builtins.input", next_line)

    return type_in


def test_chat_remembers_what_was_said_shows_sources_and_figures(context, model_folder, served, dense, typed, capsys):
    book = served["tiny@book"]
    typed("/help", QUESTION, "", "And what is a class?", "/sources", "x" * 9000, "/new", QUESTION, "/quit", "never")
    words = ["chat", str(context), "--model", str(model_folder), "--max-tokens", str(TOKENS), "--k", "4096"]
    assert main(words) == 0
    said = capsys.readouterr()
    first = expected(book, dense, conversation_ids(book, QUESTION)).strip()
    ids = conversation_ids(book, QUESTION, first, "And what is a class?")
    shown = said.out.split("\n\nsources:\n")[0]
    assert [line.strip() for line in shown.splitlines()] == [first, expected(book, dense, ids).strip(), first]
    assert said.out.count("sources:\n1. tokens ") == 1
    figures = re.findall(r"(\d+) tokens read, (\d+) reused, first token after", said.err)
    assert len(figures) == 3
    assert [int(a) + int(b) for a, b in figures] == [
        len(conversation_ids(book, QUESTION)), len(ids), len(conversation_ids(book, QUESTION))
    ]  # fmt: skip
    assert int(figures[1][0]) < len(ids) - len(conversation_ids(book, QUESTION)) + TOKENS
    assert "maximum context length" in said.err
    assert "rows read per query" in said.err.rpartition("tokens read")[2]


def test_ctrl_c_ends_an_answer_of_a_chat_and_the_conversation_goes_on(
    context, model_folder, typed, monkeypatch, capsys
):
    say, count = Generation._say, [0]

    def interrupted(self, logits):
        say(self, logits)
        count[0] += 1
        if count[0] == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Generation, "_say", interrupted)
    typed(QUESTION, "Why?")
    assert main(["chat", str(context), "--model", str(model_folder), "--max-tokens", "5"]) == 0
    said = capsys.readouterr()
    assert count[0] == 3 + 5
    assert said.err.count(", stopped") == 1
    assert len(said.out.splitlines()) == 2
