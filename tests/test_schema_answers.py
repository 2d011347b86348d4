"""Answers to random JSON schemas parse and validate, on both demo models and while other answers run; slow."""

import json
import random
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from server_process import serving

pytestmark = pytest.mark.slow
pytest.importorskip("llguidance", reason="pip install llguidance")
jsonschema_rs = pytest.importorskip("jsonschema_rs", reason="pip install schemathesis")
DEMOS = Path(__file__).resolve().parent.parent / "examples" / "belle_tiny"
SCHEMAS, STREAMS, LIMIT = 1000, 8, 100
NAMES = ["a", "名", "b c", 'q"\\', "$ref", "é", "x-y", "0"]
SCALARS = [None, True, False, 0, -7, 2.5, "", "京", 'a"\\\n']
PATTERNS = ["^[a-c]{2,4}$", "^(京|沪)[0-9]+$", r"^\d{3}$", "x", "^.{2}$"]
FORMATS = ["date", "time", "date-time", "uuid", "ipv4", "email", "hostname"]
REFUSED = [{"not": {"type": "null"}}, {"type": "string", "pattern": "^(?=a)b"}, {"type": "array", "uniqueItems": True},
           {"oneOf": [{"type": "integer"}, {"minimum": 0}]}, {"type": "string", "format": "unheard-of"}]
LEAVES = [  # as functions of a source of random numbers
    lambda draw: {"type": draw.choice(["boolean", "null", "integer", "number", "string"])},
    lambda draw: {"enum": draw.sample(SCALARS, draw.randint(1, 4))}, lambda draw: {"const": draw.choice(SCALARS)},
    lambda draw: {"type": "integer"} | limits(draw, "minimum", "maximum", 50) | draw.choice([{}, {"multipleOf": 3}]),
    lambda draw: {"type": "number", "minimum": draw.randint(-9, 9), "exclusiveMaximum": draw.randint(10, 20)},
    lambda draw: {"type": "string"} | limits(draw, "minLength", "maxLength", 4),
    lambda draw: {"type": "string", "pattern": draw.choice(PATTERNS)},
    lambda draw: {"type": "string", "format": draw.choice(FORMATS)},
    lambda draw: {"type": ["integer", "null"]}, lambda draw: draw.choice(REFUSED) if draw.random() < 0.3 else {}]


def limits(draw, low, high, most):
    first, second = sorted((draw.randint(0, most), draw.randint(0, most)))
    return draw.choice([{}, {low: first}, {high: second}, {low: first, high: second}])


def random_schema(draw, depth):
    """A JSON schema, some of which llguidance does not support, or no value satisfies."""
    if depth == 0 or draw.random() < 0.25:
        return draw.choice(LEAVES)(draw)
    schemas = [random_schema(draw, depth - 1) for _ in range(draw.randint(1, 3))]
    kind = draw.randrange(10)
    if kind == 0:
        return {draw.choice(["anyOf", "anyOf", "allOf", "oneOf"]): schemas}
    if kind < 4:
        prefix = draw.choice([{}, {"prefixItems": schemas[1:]}]) if schemas[1:] else {}
        return {"type": "array", "items": schemas[0]} | limits(draw, "minItems", "maxItems", 3) | prefix
    properties = dict(zip(draw.sample(NAMES, len(schemas)), schemas, strict=True))
    return {"type": "object", "properties": properties, "required": draw.sample([*properties], draw.randint(
        0, len(properties))), "additionalProperties": draw.choice([False, False, False, True, {"type": "null"}])}


def random_schemas(count):
    """Schemas, every fifth one with a recursive definition."""
    draw = random.Random(27)
    found = [random_schema(draw, 3) for _ in range(count)]
    tree = {"type": "object", "properties": {"v": {"type": "integer"}, "n": {"type": "array", "maxItems": 2, "items": {
        "$ref": "#/$defs/tree"}}}, "required": ["v"], "additionalProperties": False}
    return [schema if place % 5 else {"type": "object", "properties": {"s": schema, "t": {"$ref": "#/$defs/tree"}},
                                      "required": ["s", "t"], "additionalProperties": False, "$defs": {"tree": tree}}
            for place, schema in enumerate(found)]


def finite(text):
    """A number of JSON, whose exponent has no limit, within the range of Python's."""
    return max(-sys.float_info.max, min(float(text), sys.float_info.max))


def outcome(client, schema, number):
    """What became of a schema: "valid", "length" or "refused"; anything else fails."""
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    response = client.post("/v1/chat/completions", json={
        "messages": [{"role": "user", "content": "写一个例子"}], "response_format": form, "temperature": 1.5,
        "seed": number, "max_tokens": LIMIT})
    body = response.json()
    if response.status_code == 400:
        assert body["error"]["param"] == "response_format", body
        assert body["error"]["message"].startswith("response_format: json_schema: "), body
        return "refused: " + body["error"]["message"][:70]
    assert response.status_code == 200, (schema, body)
    choice = body["choices"][0]
    if choice["finish_reason"] == "length":
        assert body["usage"]["completion_tokens"] == LIMIT
        return "length"
    assert choice["finish_reason"] == "stop"
    answer = json.loads(choice["message"]["content"], parse_float=finite)
    assert jsonschema_rs.validator_for(schema).is_valid(answer), (schema, answer)
    return "valid"


@pytest.mark.parametrize("demo", ["bloom", "llama"])
def test_answers_to_random_schemas_validate(tmp_path, demo):
    schemas = random_schemas(SCHEMAS)
    with serving(DEMOS / demo, tmp_path / "log", "--max-batch", str(STREAMS)) as server, \
            httpx.Client(base_url=server.url, timeout=600) as client, ThreadPoolExecutor(STREAMS) as pool:
        found = list(pool.map(lambda item: outcome(client, item[1], item[0]), enumerate(schemas)))
        assert httpx.get(f"{server.url}/health").json()["running"] == 0
        assert "Traceback" not in server.log
    counts = Counter(found)
    print(json.dumps(counts.most_common(), ensure_ascii=False))
    assert counts["valid"] > len(schemas) / 3
