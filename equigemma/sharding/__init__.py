"""Sharding: which axis of each array is split over which axis of a device mesh, from one table.

Placement alone is here; JAX does the communication. Its compiler derives that of each product from
where the weights and the batch are.

```python
mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))  # explicit axes, or those of AxisType.Auto
with jax.set_mesh(mesh):
    model, tokens = sharding.shard((model, tokens), mesh)
    output = eqx.filter_jit(model)(tokens)
    answers = sampling.generate(model, tokens, max_new_tokens=32)
```

Prepare, quantize, stack and adapt a model before it is sharded.
"""

from equigemma.sharding._rules import PRESETS as PRESETS
from equigemma.sharding._rules import Rules as Rules
from equigemma.sharding._rules import rules_for as rules_for
from equigemma.sharding._specs import bytes_per_device as bytes_per_device
from equigemma.sharding._specs import shard as shard
from equigemma.sharding._specs import shardings as shardings
from equigemma.sharding._specs import specs as specs
