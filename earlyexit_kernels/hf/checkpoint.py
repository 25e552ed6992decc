"""Saving and loading a model: all files of a save or none, and only checked safetensors files of one save."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from earlyexit_kernels.engine.attention import PACKED_ATTENTION
from earlyexit_kernels.hf.loading import check_loaded, check_one_save, corrupt_files, record_digest
from earlyexit_kernels.hf.saving import check_finished, saved_whole
from earlyexit_kernels.hf.weight_files import check_finite, check_floating, find_weights, read_headers

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
        during the moves, `from_pretrained` refuses the folder and names the command that finishes the save. Other files
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
                tensors = read_headers(find_weights(folder, {"variant": variant}))
                check_finite(tensors)
                if variant is None:
                    record_digest(folder, tensors)
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
        tensors = {}
        if source is not None:
            check_finished(os.path.join(source, kwargs.get("subfolder") or ""))
            tensors = read_headers(find_weights(source, kwargs))
            check_floating(tensors)
        # shapes that differ are refused by check_loaded, which names the file
        kwargs["ignore_mismatched_sizes"] = True
        try:
            model, info = super().from_pretrained(
                source, *args, output_loading_info=True, use_safetensors=True, **kwargs
            )
        except SafetensorError as error:
            raise RuntimeError(f"{corrupt_files(source)} is corrupt or cut short: {error}") from error
        check_loaded(info, source, tensors, allow_new_heads=allow_new_heads)
        if not allow_new_heads:
            check_one_save(source, tensors, kwargs)
        return (model, info) if output_loading_info else model

    def _upload_modified_files(self, working_dir: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        tensors = read_headers(find_weights(working_dir, {}))
        record_digest(Path(working_dir), tensors)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Refuse another attention, since packed rows require the packed one."""
        raise ValueError(ATTENTION_IS_FIXED)
