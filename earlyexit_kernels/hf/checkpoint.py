"""Saving and loading a model: all files of a save or none, and only checked safetensors files of one save."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from earlyexit_kernels.core.attention import PACKED_ATTENTION
from earlyexit_kernels.errors import MissingHeadsError
from earlyexit_kernels.hf.saving import CONFIG, DIGEST, complete_copies, saved_whole, variant_of
from earlyexit_kernels.hf.weight_files import (
    StoredTensor,
    check_finite,
    digest,
    find_file,
    find_weights,
    read_headers,
)

ATTENTION_IS_FIXED = (
    "attn_implementation cannot be chosen: an early-exit model packs the rows of a batch, and only its own attention "
    f"({PACKED_ATTENTION!r}) keeps them apart"
)


class Checkpointed(PreTrainedModel):
    """Base class of the model that overrides how transformers saves and loads its files, and nothing else."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save the model with its criterion; the folder gets all files of the save, or none.

        The files are written to a temporary folder inside `save_directory` and then moved. If the process is killed
        during the moves, `from_pretrained` refuses the folder and names the one with the complete save. Other files
        of the folder are kept. The disk must have room for the old weights and the new ones. A save with
        ``distributed_checkpoint=True``, which several processes write, goes straight to the folder.

        Args:
            save_directory: created if it does not exist.
            is_main_process: False writes nothing.
            state_dict: weights to save instead of those of the model.
            push_to_hub: also upload the files after the save.
            max_shard_size, variant, kwargs: as in transformers.

        Raises:
            ValueError: a weight is NaN or infinite; nothing is saved.
            OSError: the files cannot be written, or `save_directory` is a file.
        """
        options = {"max_shard_size": max_shard_size, "variant": variant, **kwargs}
        if not is_main_process or kwargs.get("distributed_checkpoint"):
            super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, **options)
            return
        try:
            with saved_whole(save_directory) as folder:
                # a copy, since transformers empties the dict
                super().save_pretrained(folder, state_dict=state_dict and {**state_dict}, **options)
                check_finite(read_headers(find_weights(folder, {"variant": variant})))
                record_digests(folder, replaced=Path(save_directory) / CONFIG)
        except SafetensorError as error:
            raise OSError(
                f"the weights cannot be saved in {save_directory}: {error}; the folder is unchanged"
            ) from error
        if push_to_hub:
            options.setdefault("repo_id", os.path.basename(os.path.abspath(save_directory)))
            with tempfile.TemporaryDirectory() as folder:
                super().save_pretrained(folder, state_dict=state_dict, push_to_hub=True, **options)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        allow_new_heads: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a saved model with its criterion, from safetensors files only.

        Args:
            pretrained_model_name_or_path: folder or hub name.
            allow_new_heads: accept a checkpoint without weights of the exits, which are then randomly initialised.
            output_loading_info: return ``(model, info)``.
            args, kwargs: as in transformers; `attn_implementation` and `use_safetensors=False` are refused.

        Raises:
            MissingHeadsError: the checkpoint lacks weights.
            ValueError: `attn_implementation` or `use_safetensors=False` was given, or an index of weights names a file
                that is not a safetensors file in the same folder.
            RuntimeError: a file is corrupt, the files are of different saves, or a weight has an unexpected name or
                shape, or a dtype that is not floating-point.
        """
        config: Any = kwargs.get("config")
        attention = kwargs.get("attn_implementation") or getattr(config, "_attn_implementation", None)
        if attention not in (None, PACKED_ATTENTION):
            raise ValueError(ATTENTION_IS_FIXED)
        if not kwargs.pop("use_safetensors", True):
            raise ValueError("use_safetensors=False: pickled weights are never read; convert them to safetensors")
        source = pretrained_model_name_or_path
        tensors, copies = {}, []
        if source is not None:
            tensors = read_headers(find_weights(source, kwargs))
            copies = complete_copies(os.path.join(source, kwargs.get("subfolder") or ""))
        if copies:
            check_one_save(source, tensors, kwargs, copies)
        # shapes that differ are refused by check_loaded, which names the file
        kwargs["ignore_mismatched_sizes"] = True
        try:
            model, info = super().from_pretrained(
                source, *args, output_loading_info=True, use_safetensors=True, **kwargs
            )
        except SafetensorError as error:
            raise RuntimeError(f"a file of {source} is corrupt or cut short: {error}") from error
        check_loaded(info, source, tensors, allow_new_heads=allow_new_heads)
        if not allow_new_heads:
            check_one_save(source, tensors, kwargs)
        return (model, info) if output_loading_info else model

    def _upload_modified_files(self, working_dir: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        record_digests(Path(working_dir))
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Refuse another attention, since packed rows require the packed one."""
        raise ValueError(ATTENTION_IS_FIXED)


def record_digests(folder: Path, replaced: Path | None = None) -> None:
    """Write the digests of weights into the config beside them, with those of other variants in a replaced config."""
    path = folder / CONFIG
    variants = {found for each in folder.iterdir() if (found := variant_of(each.name)) is not None}
    if not variants or not path.is_file():
        return
    kept = {key: value for key, value in _read(replaced).items() if key.partition(".")[0] == DIGEST}
    new = {DIGEST + each: digest(read_headers(find_weights(folder, {"variant": each[1:]}))) for each in variants}
    text = json.dumps({**_read(path), **kept, **new}, indent=2, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")


def check_one_save(
    source: Any, tensors: Mapping[str, StoredTensor], arguments: Mapping[str, Any], copies: list[Path] | None = None
) -> None:
    """Refuse a config and weights of different saves.

    Args:
        source: folder or hub name.
        tensors: tensors in the files of weights.
        arguments: of `from_pretrained`.
        copies: complete copies of interrupted saves in the folder. Without one, a config without a digest is accepted.

    Raises:
        RuntimeError: the weights are not those that the config was saved with.
    """
    if not tensors or os.path.isfile(source):
        return
    path = find_file(source, CONFIG, arguments)
    entry = f"{DIGEST}.{arguments['variant']}" if arguments.get("variant") else DIGEST
    expected = _read(path).get(entry)
    if expected == digest(tensors) or (expected is None and not copies):
        return
    files = ", ".join(sorted({str(tensor.file) for tensor in tensors.values()}))
    cure = f"Use the files of one save; if the weights were changed on purpose, remove {entry!r} from {path}"
    if copies:
        cure = (
            "A save was interrupted, or is running in another process; all of its files are in "
            f"{' or in '.join(map(str, copies))}. Move them into place, or save to this folder again"
        )
    raise RuntimeError(
        f"{path} and {files} are of different saves: the weights are not those that the config was saved with, so the "
        f"model would answer as neither. {cure}"
    )


def check_loaded(
    info: Mapping[str, Any], source: Any, tensors: Mapping[str, StoredTensor], *, allow_new_heads: bool
) -> None:
    """Refuse a load in which transformers initialised missing weights or ignored some of the checkpoint.

    Args:
        info: the loading info of transformers.
        source, tensors: of the checkpoint, for the message.
        allow_new_heads: accept missing weights of the exits, which are then randomly initialised.

    Raises:
        MissingHeadsError: the checkpoint lacks weights.
        RuntimeError: weights have another shape, or are not part of the model.
    """
    missing = sorted(info["missing_keys"])
    encoder = [name for name in missing if not name.startswith("heads.")]
    if encoder:
        raise MissingHeadsError(
            f"the checkpoint {str(source)!r} lacks {_listed(encoder)} of the encoder, which would be random; "
            "copy the whole checkpoint again, or save the model again"
        )
    if missing and not allow_new_heads:
        raise MissingHeadsError(
            f"the checkpoint {str(source)!r} lacks {_listed(missing)}, which would be random. Train and save "
            "the model, or pass allow_new_heads=True to start with fresh ones"
        )
    mismatched = [
        f"{key} {tuple(found)} in {tensors[key].file if key in tensors else 'the weights'}, {tuple(expected)} by the "
        "config"
        for key, found, expected in sorted(info["mismatched_keys"])
    ]
    wrong = {
        "have another shape than in the config": mismatched,
        "are not part of the model in the config": sorted(info["unexpected_keys"]),
    }
    for problem, keys in wrong.items():
        if keys:
            raise RuntimeError(
                f"the checkpoint {str(source)!r}: {_listed(keys)} {problem}; config.json and the weights are "
                "of different models, use the two files of one save"
            )


def _listed(keys: list[str]) -> str:
    more = "" if len(keys) <= 5 else f" and {len(keys) - 5} more"
    return f"{len(keys)} weight(s): {', '.join(keys[:5])}{more}"


def _read(config: Path | None) -> dict[str, Any]:
    """Return the data of a config; none where there is no config, or a damaged one."""
    try:
        data = {} if config is None else json.loads(config.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
