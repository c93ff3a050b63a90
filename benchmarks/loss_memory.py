"""How much memory does the loss over 262,144 words take, chunked and plain?

    python benchmarks/loss_memory.py [--tokens 8192] [--write]

What the compiled programs ask for beside inputs and results, by `memory_analysis()`: nothing is
run, so the figures are exact and the same on every machine of a kind.
"""

import jax
import jax.numpy as jnp
from report import Report, parser_of
from tables import table

import equigemma as eg
from equigemma import train


def plain(hidden, table, targets, weights):
    """All logits at once."""
    table = table.astype(hidden.dtype)
    logits = jnp.einsum("LD,VD->LV", hidden, table, preferred_element_type=jnp.float32)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=-1)[:, 0]
    return -jnp.sum(chosen * weights)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    options = parser.parse_args()
    tokens = options.tokens
    config = eg.variants.get("gemma3-270m")

    def arguments(dtype):
        shapes = ((tokens, config.width), dtype), ((config.vocab, config.width), jnp.float32)
        rest = ((tokens,), jnp.int32), ((tokens,), jnp.float32)
        return [jax.ShapeDtypeStruct(*shape) for shape in (*shapes, *rest)]

    report = Report(options, "jax", "equigemma")
    report.say(f"Gradients of the loss of {tokens:,} tokens over {config.vocab:,} words.\n")
    rows = []
    for name, loss in (("plain", plain), ("chunked", train.cross_entropy_sum)):
        for dtype in (jnp.float32, jnp.bfloat16):
            for trained in (True, False):
                grad = jax.jit(jax.grad(loss, (0, 1) if trained else 0))
                memory = grad.lower(*arguments(dtype)).compile().memory_analysis()
                size = memory.temp_size_in_bytes / 1e9
                yes = "yes" if trained else "no"
                rows.append([name, jnp.dtype(dtype).name, yes, f"{size:.2f}"])
    report.say(table(["loss", "activations", "gradient of the table", "GB"], rows))


if __name__ == "__main__":
    main()
