"""llama.cpp with a file, in a process of its own: `python llama.py FILE` says where it listens.

With `--embedding` behind it, it makes vectors of texts instead of going on with them; with
`--mmproj FILE`, that is its vision tower, and `<image>` in a prompt stands for an image.

Caches and sums are float32, and nothing is kept from one request to the next, so that a text
depends on the weights alone.
"""

import os
import sys

import xllamacpp


def main(path: str) -> None:
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = 512
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.warmup = False
    params.fit_params = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_ram_mib = 0
    params.verbosity = 0
    params.embedding = "--embedding" in sys.argv
    if "--mmproj" in sys.argv:
        params.mmproj.path = sys.argv[sys.argv.index("--mmproj") + 1]
        params.mmproj_use_gpu = False
        # Otherwise it is drawn at random.
        os.environ["LLAMA_MEDIA_MARKER"] = "<image>"
    params.port = 0
    server = xllamacpp.Server(params)
    print(f"\nlistening {server.listening_address}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1])
