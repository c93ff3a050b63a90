"""Attribution graphs: which features of transcoders make each other, and the logits, of a text."""

from equigemma.interpret.graph._attribute import attribute as attribute
from equigemma.interpret.graph._graph import Graph as Graph
from equigemma.interpret.graph._graph import Pruned as Pruned
from equigemma.interpret.graph._graph import prune as prune
from equigemma.interpret.graph._show import draw as draw
from equigemma.interpret.graph._show import to_json as to_json
