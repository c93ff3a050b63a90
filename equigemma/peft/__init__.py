"""Adapters in the files of PEFT, the library of adapters for `transformers`, both ways.

A folder with `adapter_config.json` and `adapter_model.safetensors`. What an adapter computes is in
`equigemma.lora`; whole models are written by `equigemma.save`.

**Source:** PEFT's documentation, "PEFT checkpoint format"; `peft/tuners/lora/config.py`.
"""

from equigemma.peft._file import CONFIG as CONFIG
from equigemma.peft._file import WEIGHTS as WEIGHTS
from equigemma.peft._load import load as load
from equigemma.peft._save import save as save
