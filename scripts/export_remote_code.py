"""Saves model, processor and their code, for people who load with `trust_remote_code=True` and without this package.

    python scripts/export_remote_code.py path/to/model exported
    python scripts/export_remote_code.py ZhengPeng7/BiRefNet exported --push-to-hub my-name/birefnet

MODEL is a Hub id, a released directory or one that `save_pretrained` wrote. The result needs torch, torchvision and
transformers, and timm where the backbone is timm's.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi
from safetensors import SafetensorError

from birefnet_hf import BiRefNetConfig, BiRefNetForImageSegmentation, BiRefNetImageProcessor
from birefnet_hf.checkpoints_birefnet import find_model
from birefnet_hf.image_loading import staged_files


logger = logging.getLogger("export_remote_code")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="export_remote_code.py"
    )
    parser.add_argument("model", help="Hub id, alias or directory")
    parser.add_argument("output_dir", type=Path, help="directory to create; new or empty")
    parser.add_argument("--patch-order", choices=["c_hg_wg", "wg_hg_c"], help="override the model's, see the README")
    parser.add_argument("--push-to-hub", metavar="REPO_ID", help="also upload it, e.g. my-name/birefnet")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    output_dir: Path = arguments.output_dir
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        logger.error("%s exists and is not empty; choose another OUTPUT_DIR.", output_dir)
        return 2
    overrides = {"patch_order": arguments.patch_order} if arguments.patch_order else {}
    try:
        name = find_model(arguments.model)
        model = BiRefNetForImageSegmentation.from_pretrained(name, **overrides)
        processor = BiRefNetImageProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        logger.error("%s", error)
        return 1
    if getattr(model, "_hf_peft_config_loaded", False):
        logger.error(
            "%s holds adapters (LoRA): run its training with --resume --merge-lora for a whole network.", name
        )
        return 1
    # From here on every save of these classes in this process copies code: hence a script, not a part of the package.
    BiRefNetConfig.register_for_auto_class()
    BiRefNetForImageSegmentation.register_for_auto_class("AutoModelForImageSegmentation")
    BiRefNetImageProcessor.register_for_auto_class()
    # Nothing appears under OUTPUT_DIR until it is complete.
    try:
        with staged_files(output_dir) as folder:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        logger.error("%s could not be written: %s", output_dir, error)
        return 1
    logger.info("Saved %s with %d code files.", output_dir, len(list(output_dir.glob("*.py"))))
    if arguments.push_to_hub:
        try:
            api = HfApi()
            repository = api.create_repo(arguments.push_to_hub, exist_ok=True).repo_id
            api.upload_folder(
                repo_id=repository, folder_path=output_dir, commit_message="Upload BiRefNet with its code"
            )
        except Exception as error:  # of the Hub's client, of the connection below it, or of the disk
            logger.error(
                "Not pushed: %s. %s is complete: hf upload %s %s", error, output_dir, arguments.push_to_hub, output_dir
            )
            return 1
        logger.info("Pushed to %s.", arguments.push_to_hub)
    return 0


if __name__ == "__main__":
    sys.exit(main())
