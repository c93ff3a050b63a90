"""How long does a step of a mixture of experts take, and how much of its weights does it read?

    python benchmarks/experts.py [--layers 2] [--experts 128] [--steps 32] [--write]

Layers of Gemma 4 26B-A4B with random weights, as many as fit into memory, with a small vocabulary.
A token passes 8 experts. The same layers with 8 experts in all read the same bytes without a
choice: what a step takes longer than there is the price of 128. That only the chosen experts are
read is what `tests/nn/test_moe.py` shows on the compiled program.
"""

import statistics
import time
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
from report import Report, parser_of
from tables import table

import equigemma as eg
from equigemma.config import DensePlusMoEConfig, ModelConfig


WARM_UP, CAPACITY = 3, 1024


def scaled(layers: int, experts: int) -> ModelConfig:
    """The last `layers` of the first period, of which the very last sees everything."""
    config = eg.variants.get("gemma4-26b-a4b")

    def one(layer):
        ffw = layer.ffw
        assert isinstance(ffw, DensePlusMoEConfig)
        return replace(layer, ffw=replace(ffw, moe=replace(ffw.moe, num_experts=experts)))

    chosen = tuple(map(one, config.layers[6 - layers : 6]))
    return replace(config, vocab=1024, layers=chosen)


def experts_bytes(model: eg.Transformer) -> int:
    """Of all experts of all layers."""
    held = [layer.ffw.experts for layer in model.layers]
    return sum(leaf.nbytes for leaf in jax.tree.leaves(held))


def measure(config: ModelConfig, steps: int) -> tuple[list[float], int, int]:
    """Seconds of each step; bytes of all weights but the experts', and of the experts'."""
    make = eqx.filter_jit(lambda key: eg.Transformer(config, key=key, dtype=jnp.bfloat16))
    model = eg.prepare(make(jax.random.key(0)))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(model))

    @jax.jit(donate_argnums=1)
    def step(model, cache, token):
        output = model(token[None], cache=cache)
        return output.cache, output.logits[0].argmax().astype(jnp.int32)

    cache = eg.init_cache(config, capacity=CAPACITY, dtype=jnp.bfloat16)
    token, seconds = jnp.asarray(7, jnp.int32), []
    for _ in range(WARM_UP + steps):
        start = time.perf_counter()
        cache, token = jax.block_until_ready(step(model, cache, token))
        seconds.append(time.perf_counter() - start)
    return seconds[WARM_UP:], total - experts_bytes(model), experts_bytes(model)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--layers", type=int, default=2, choices=range(1, 7))
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--steps", type=int, default=32)
    options = parser.parse_args()
    chosen = 8
    report = Report(options, "jax", "equigemma")
    report.say(
        f"{options.layers} layers of Gemma 4 26B-A4B with random weights, bfloat16, one token, "
        f"{options.steps} steps.\n"
    )
    rows = []
    for experts in (chosen, options.experts):
        seconds, others, of_experts = measure(scaled(options.layers, experts), options.steps)
        read = others + of_experts * chosen // experts
        low, median, high = (1e3 * cut for cut in statistics.quantiles(seconds, n=4))
        megabytes = [f"{size / 1e6:,.0f}" for size in (others + of_experts, read)]
        times = [f"{median:.1f}", f"{low:.1f} to {high:.1f}", f"{read / median / 1e6:.1f}"]
        rows.append([experts, *megabytes, *times])
    head = ["experts", "MB in all", "MB of a step", "ms, median", "ms, quartiles", "GB/s"]
    report.say(table(head, rows))


if __name__ == "__main__":
    main()
