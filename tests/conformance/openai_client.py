"""Runs in an environment with nothing but the openai SDK: chat and text, streamed and not. argv: base URL."""

import sys

from openai import BadRequestError, NotFoundError, OpenAI

client = OpenAI(base_url=sys.argv[1] + "/v1", api_key="none", _strict_response_validation=True, max_retries=0)
# OpenAI's own chunks of text completions have `finish_reason: null`, which the SDK's strict types forbid.
lenient = OpenAI(base_url=sys.argv[1] + "/v1", api_key="none", max_retries=0)
proxy = {"decoding": {"strategy": "proxy_tuning", "expert": "expert", "anti": "base-small", "alpha": 1.0}}
messages = [{"role": "user", "content": "What is 12 + 30?"}]

ids = [model.id for model in client.models.list()]
assert {"base", "expert", "base-small"} <= set(ids), ids
assert client.models.retrieve(ids[0]).id == ids[0]

whole = client.chat.completions.create(
    model="base", messages=messages, temperature=0, max_tokens=40, extra_body=proxy, logprobs=True, top_logprobs=3
)
text = whole.choices[0].message.content
assert text and whole.usage.completion_tokens == len(whole.choices[0].logprobs.content), whole

stream = client.chat.completions.create(
    model="base", messages=messages, temperature=0, max_tokens=40, extra_body=proxy, stream=True,
    stream_options={"include_usage": True},
)  # fmt: skip
pieces, usage = [], None
for chunk in stream:
    usage = chunk.usage or usage
    pieces += [choice.delta.content or "" for choice in chunk.choices]
assert "".join(pieces) == text, (pieces, text)
assert usage is not None and usage.completion_tokens == whole.usage.completion_tokens

several = lenient.completions.create(
    model="base", prompt=["One", "Two"], n=2, max_tokens=5, seed=1, logprobs=2, echo=True
)
assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
assert several.choices[0].text.startswith("One")
assert several.choices[0].logprobs.token_logprobs[0] is None

strict = client.completions.create(model="base", prompt="One", max_tokens=5, seed=1, logprobs=2)
assert several.choices[0].text == "One" + strict.choices[0].text
again = "".join(
    c.choices[0].text for c in lenient.completions.create(model="base", prompt="One", max_tokens=5, seed=1, stream=True)
)
assert several.choices[0].text == "One" + again, (several.choices[0].text, again)

for error, arguments in (
    (NotFoundError, {"model": "nobody"}),
    (BadRequestError, {"model": "base", "extra_body": {"no_such_field": 1}}),
    (BadRequestError, {"model": "base", "temperature": -1}),
    (
        BadRequestError,
        {"model": "base", "extra_body": {"decoding": {"strategy": "proxy_tuning", "expert": "x", "anti": "y"}}},
    ),
):
    try:
        client.chat.completions.create(messages=messages, **arguments)
    except error as problem:
        assert problem.body["message"], problem
    else:
        raise AssertionError(f"{arguments} was accepted")
print("ok")
