"""DeepMind's sampler with tools, on their tiny model and ours.

A tiny model never calls a tool. Here, the tokenizer reads a call into what it says first; all that
follows, the result that is put into the conversation and the answer to it, is the sampler's.
"""

from importlib.metadata import version

import jax.numpy as jnp
import kinds
import pytest
from characters import Characters
from gemma import gm


# From Gemma 4 on, tools are handled in another way.
HANDLED = not hasattr(gm.tools, "Calculator")
# Of 4.0.1: it writes into fields that have other names since.
OLD_MCP = not HANDLED or int(version("mcp").split(".")[0]) < 2
CALL = (
    "<|tool_call>call:add{a:2,b:3}<tool_call|><|tool_response>"
    if HANDLED
    else '{"tool_name": "calculator", "expression": "2 + 3"}'
)
RANDOM = gm.text.RandomSampling(temperature=0.9)
SCHEMA = {"type": "object", "properties": {}}


def tools(called):
    """The options of a sampler for a tool that adds, and writes into `called` what it is given."""
    if not HANDLED:

        class Calculator(gm.tools.Calculator):
            @property
            def name(self):
                return "calculator"

            def call(self, expression):
                called.append(expression)
                return super().call(expression)

        return {"tools": [Calculator()]}

    from mcp import types

    class Handler(gm.tools.ToolHandlerBase):
        def _tools(self):
            return [types.Tool(name="add", description="Adds.", inputSchema=SCHEMA)]

        def _call_tool(self, name, arguments):
            called.append((name, arguments))
            return types.CallToolResult(content=[types.TextContent(type="text", text="5")])

    return {"tool_handler": Handler()}


@pytest.mark.skipif(not OLD_MCP, reason="DeepMind's handling of tools needs mcp < 2")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_same_tokens_after_the_call_of_a_tool(dtype):
    # With 4.0.1 and a model of Gemma 3 theirs fails: it cannot read its own conversation.
    theirs, ours, variables = kinds.models("gemma4 sharing" if HANDLED else "gemma3", dtype)
    outcomes = []
    for model in (theirs, ours):
        called = []
        sampler = gm.text.ToolSampler(
            model=model,
            params=variables["params"],
            tokenizer=Characters(model.INFO.tokenizer_version, answers=(CALL,)),
            cache_length=2048,
            max_out_length=5,
            **tools(called),
        )
        answer = sampler.chat("Two and three?", rng=1, sampling=RANDOM)
        outcomes.append((answer, called, [turn.text for turn in sampler.turns]))
    assert outcomes[1] == outcomes[0]
    answer, called, turns = outcomes[0]
    assert len(called) == 1 and len(turns) == 4 and turns[1] == CALL and "5" in turns[2]
    assert turns[3] == answer and len(set(answer.split())) > 2
