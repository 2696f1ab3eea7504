"""Puts together what is pushed to a Hugging Face Space: the app and, until it is on a registry, the package itself.

python space/build.py build/space
hf upload OWNER/NAME build/space . --repo-type space     # after `hf auth login`
"""

import argparse
import shutil
import sys
from pathlib import Path


SPACE = Path(__file__).resolve().parent
ROOT = SPACE.parent
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", "*.pyi", Path(__file__).name)


def build_space(target: Path) -> Path:
    """Writes the Space's folder: what is in `space/`, the licence, and `birefnet_hf` next to the app, which finds it there.

    Args:
        target: Folder to write; it must be empty or not exist, so that nothing old is pushed along.

    Raises:
        FileExistsError: there is something in it.
    """
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty; name a new folder or remove it first.")
    shutil.copytree(SPACE, target, ignore=LEFT_OUT, dirs_exist_ok=True)
    shutil.copytree(ROOT / "src" / "birefnet_hf", target / "birefnet_hf", ignore=LEFT_OUT)
    shutil.copy2(ROOT / "LICENSE", target)
    return target


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="folder to write")
    target = parser.parse_args(arguments).target
    try:
        build_space(target)
    except FileExistsError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{target} is ready: hf upload OWNER/NAME {target} . --repo-type space")
    return 0


if __name__ == "__main__":
    sys.exit(main())
