"""Generation on token ids: no tokenizer, no strings. `equigemma.text` puts words around it."""

from equigemma.sampling._choose import AbstractChoice as AbstractChoice
from equigemma.sampling._choose import Greedy as Greedy
from equigemma.sampling._choose import Sample as Sample
from equigemma.sampling._choose import Transform as Transform
from equigemma.sampling._choose import at_temperature as at_temperature
from equigemma.sampling._choose import chain as chain
from equigemma.sampling._choose import temperature as temperature
from equigemma.sampling._generate import Generated as Generated
from equigemma.sampling._generate import generate as generate
from equigemma.sampling._generate import stream as stream
from equigemma.sampling._state import CHUNK as CHUNK
from equigemma.sampling._state import State as State
from equigemma.sampling._state import decode_step as decode_step
from equigemma.sampling._state import prefill as prefill
