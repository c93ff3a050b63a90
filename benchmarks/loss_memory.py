"""How much memory does the loss over 262,144 words take, chunked and plain?

    python benchmarks/loss_memory.py [--tokens 8192]

What the compiled programs ask for beside inputs and results, by `memory_analysis()`: nothing is
run, so the figures are exact and the same on every machine of a kind.
"""

import argparse

import jax
import jax.numpy as jnp
from machine import describe_machine

import equigemma as eg
from equigemma import train


def plain(hidden, table, targets, weights):
    """All logits at once."""
    table = table.astype(hidden.dtype)
    logits = jnp.einsum("LD,VD->LV", hidden, table, preferred_element_type=jnp.float32)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=-1)[:, 0]
    return -jnp.sum(chosen * weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    tokens = parser.parse_args().tokens
    config = eg.variants.get("gemma3-270m")

    def arguments(dtype):
        shapes = ((tokens, config.width), dtype), ((config.vocab, config.width), jnp.float32)
        rest = ((tokens,), jnp.int32), ((tokens,), jnp.float32)
        return [jax.ShapeDtypeStruct(*shape) for shape in (*shapes, *rest)]

    print(describe_machine("jax", "equigemma"))
    print(f"\nGradients of the loss of {tokens} tokens, table in float32\n")
    print("| loss | activations | gradient of the table | GB |\n|---|---|---|---|")
    for name, loss in (("plain", plain), ("chunked", train.cross_entropy)):
        for dtype in (jnp.float32, jnp.bfloat16):
            for trained in (True, False):
                slope = jax.jit(jax.grad(loss, (0, 1) if trained else 0))
                memory = slope.lower(*arguments(dtype)).compile().memory_analysis()
                size = memory.temp_size_in_bytes / 1e9
                cells = (name, jnp.dtype(dtype).name, "yes" if trained else "no", f"{size:.2f}")
                print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
