"""A model's files: a save is whole or absent, and a load reads nothing but checked safetensors files of one save."""

from __future__ import annotations

import os
import tempfile
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from earlyexit_kernels.engine.packing import PACKED_ATTENTION
from earlyexit_kernels.hf.execution import ATTENTION_IS_FIXED
from earlyexit_kernels.hf.loading import check_loaded, check_one_save, corrupt_files, record_digest
from earlyexit_kernels.hf.saving import check_finished, saved_whole
from earlyexit_kernels.hf.weight_files import check_finite, check_floating, find_weights, read_headers


class Checkpointed(PreTrainedModel):
    """Base of the model: `save_pretrained` and `from_pretrained`."""

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
        """Save the model, criterion and thresholds included: the folder gets all files of the save, or none.

        They are written to a temporary folder inside `save_directory` and moved into place together. If the process is
        killed during these moves, `from_pretrained` refuses the folder and says how to finish the save. Other files of
        the folder are kept. The disk needs room for the old weights and the new ones. A save with
        ``distributed_checkpoint=True``, which several processes write, goes straight to the folder.

        Args:
            save_directory: created if it does not exist.
            is_main_process: False writes nothing.
            state_dict: weights to save instead of the model's own.
            push_to_hub: upload the files too, once they are in the folder.
            max_shard_size, variant, kwargs: as in transformers.

        Raises:
            ValueError: a weight is NaN or infinite; nothing is saved.
            OSError: the files cannot be written.
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
        """Load a saved model, criterion and thresholds included; safetensors files only.

        Args:
            pretrained_model_name_or_path: folder or hub name.
            allow_new_heads: accept a checkpoint that lacks weights of the exits, which are then freshly initialised.
            output_loading_info: return ``(model, info)``.
            args, kwargs: as in transformers, but for `attn_implementation` and `use_safetensors=False`, which are
                refused.

        Raises:
            MissingHeadsError: the checkpoint lacks weights.
            ValueError: `attn_implementation` or `use_safetensors=False` was given, or an index of weights names a file
                that is not a safetensors file in the same folder.
            RuntimeError: a file is corrupt, the files are of different saves, or a weight has another shape, a dtype
                that is not floating, or no place.
        """
        config: Any = kwargs.get("config")
        chosen = kwargs.get("attn_implementation") or getattr(config, "_attn_implementation", None)
        if chosen not in (None, PACKED_ATTENTION):
            raise ValueError(ATTENTION_IS_FIXED)
        if not kwargs.pop("use_safetensors", True):
            raise ValueError("use_safetensors=False: pickled weights are never read; convert them to safetensors")
        source = pretrained_model_name_or_path
        tensors = {}
        if source is not None:
            check_finished(os.path.join(source, kwargs.get("subfolder") or ""))
            tensors = read_headers(find_weights(source, kwargs))
            check_floating(tensors)
        # mismatches are refused below, in words that name the file
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
