"""Models by their name on the Hugging Face hub, through its own library.

Cache folder, token, offline mode and address of the hub are those that the library is set to.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from equigemma.checkpoint.core._errors import CheckpointError
from equigemma.checkpoint.core._safetensors import INDEX, WEIGHTS
from equigemma.checkpoint.core._tokenizer_files import FILES as TOKENIZER_FILES
from equigemma.checkpoint.gguf._split import part_names
from equigemma.checkpoint.hf._read import CONFIG


_WORD = r"[A-Za-z0-9][\w.-]*"
_NAME = re.compile(rf"({_WORD}/{_WORD})(?:/({_WORD}\.gguf))?")
# Weights in other formats may lie beside these: they are not fetched.
_WANTED = (CONFIG, "generation_config.json", WEIGHTS, INDEX, "model-*.safetensors")


def is_name(source: str) -> bool:
    """Whether `source` could be `owner/name`, or `owner/name/file.gguf`, on the hub."""
    match = _NAME.fullmatch(source)
    return match is not None and (match[2] is not None or not source.endswith(".gguf"))


def download(
    source: str, revision: str | None, *, config_only: bool = False, also: Sequence[str] = ()
) -> Path:
    """The local folder of a repository's files, or the one file asked for.

    Files that the cache holds are not fetched again.

    **Arguments:** `source`: a name for which `is_name` holds. `revision`: a branch, tag or commit.
    `also`: patterns of further files.

    **Raises:** `CheckpointError` with what to do if it is not there, not for everyone, or cannot be
    reached; `ImportError` if `huggingface_hub` is not installed.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            "Loading by name needs the package huggingface_hub, which is not installed: "
            'pip install "equigemma[hf]".'
        ) from error
    match = _NAME.fullmatch(source)
    assert match is not None, source
    repository, file = match.groups()
    wanted = [CONFIG] if config_only else [*_WANTED, *TOKENIZER_FILES, *also]
    with _explained(repository, revision):
        if file is not None:
            parts = part_names(file)
            if file != parts[0]:
                raise CheckpointError(f"{file} is one part of several; load the first, {parts[0]}.")
            # All of one commit come to lie beside each other.
            paths = [
                huggingface_hub.hf_hub_download(repository, part, revision=revision)
                for part in parts
            ]
            return Path(paths[0])
        folder = Path(
            huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=wanted)
        )
    if not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"{repository} has no {CONFIG} on the hub. If it has .gguf files, load one of them as "
            f"{repository}/NAME.gguf."
        )
    return folder


@contextmanager
def _explained(repository: str, revision: str | None) -> Iterator[None]:
    """What the library raises, as a sentence that says what to do."""
    from huggingface_hub import constants, errors

    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    try:
        yield
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{repository} is gated: accept its terms at {constants.ENDPOINT}/{repository}, then "
            f"{log_in} to the account that did."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"There is nothing at {repository}: no folder here, and no repository of that name at "
            f"{constants.ENDPOINT}. If it is private, {log_in}."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{repository} has no revision {revision!r}; give a branch, a tag or a commit."
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        raise CheckpointError(f"{repository} has no such file on the hub.") from error
    except errors.LocalEntryNotFoundError as error:
        is_offline = constants.HF_HUB_OFFLINE
        reason = (
            "HF_HUB_OFFLINE is set; unset it, or download the files first"
            if is_offline
            else f"{constants.ENDPOINT} cannot be reached; check the connection"
        )
        raise CheckpointError(
            f"{repository} is neither a folder here nor complete in the cache "
            f"{constants.HF_HUB_CACHE}, and {reason}."
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        hint = f" The token is refused: {log_in} again." if status in (401, 403) else ""
        raise CheckpointError(
            f"{constants.ENDPOINT} answers {status} when asked for {repository}.{hint}"
        ) from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"{repository} is no name of a repository. {error}") from error
