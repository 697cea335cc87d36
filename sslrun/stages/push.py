"""Publish a run on the Hugging Face hub: its weights, an export, and a model card."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml

from sslrun.backbones.weights import WEIGHTS
from sslrun.data.specs import SPEC, TOKENIZER
from sslrun.errors import UserError
from sslrun.hub import reach_hub
from sslrun.pretexts.weights import KEPT, KeptModules, find_kept
from sslrun.results.formats import to_markdown
from sslrun.results.record import RunRecord, find_records
from sslrun.results.table import Table
from sslrun.runs import check_output, report_unwritable
from sslrun.stages.export import export

CARD = "README.md"
REMEDY = "name another folder with --output"
ENVIRONMENT = ("sslrun", "python", "torch", "torchvision", "numpy", "cuda", "device", "devices")
"""Entries of the run's environment that the card shows: no paths, no command line."""


def push(
    run: Path,
    repo: str,
    *,
    to: str | None = None,
    license: str | None = None,
    private: bool = False,
    output: Path | None = None,
    upload: bool = True,
) -> str:
    """Write a model's folder and upload it; return its address, or the folder if not uploaded.

    The folder holds the run's own backbone.safetensors with its spec and what the pretext task
    kept, a model card, and the files of `export(to=...)`, if given. It is `output`, or a temporary
    folder that is deleted.

    Raises:
        UserError: the run has no weights, what was kept is missing or damaged, or the hub cannot be
            reached or refuses.
    """
    if not (run / WEIGHTS).is_file():
        raise UserError(f"{run}: no {WEIGHTS} there; name the folder of a finished run")
    if not upload and output is None:
        raise UserError("--dry-run uploads nothing: name the folder to write with --output")
    temporary = nullcontext(output) if output else tempfile.TemporaryDirectory()
    with temporary as name:
        folder = Path(str(name))
        write_folder(run, repo, folder, to, license)
        return _upload(folder, repo, private) if upload else str(folder)


def write_folder(run: Path, repo: str, folder: Path, to: str | None, license: str | None) -> None:
    """Write the weights, the export and the card of a run into a folder."""
    check_output(folder, is_folder=True)
    kept = find_kept(run / WEIGHTS)
    card = render_card(RunRecord(run.absolute()), repo, to, license, kept)
    with report_unwritable(folder, REMEDY):
        folder.mkdir(parents=True, exist_ok=True)
        if to is not None:
            export(run, folder, to, force=True)
        for name in (WEIGHTS, SPEC, TOKENIZER, *([KEPT] if kept else [])):
            # The export's tokenizer adds [CLS] and [SEP] by itself, and holds the same entries.
            if (run / name).is_file() and not (folder / name).exists():
                shutil.copyfile(run / name, folder / name)
        (folder / CARD).write_text(card, encoding="utf-8")


def render_card(
    record: RunRecord, repo: str, to: str | None, license: str | None, kept: KeptModules | None
) -> str:
    """Write the model card of a run: use, results, recipe and environment."""
    recipe, result = record.recipe, record.result
    tags = ["sslrun", "self-supervised-learning", str(result["backbone"])]
    if result.get("pretext"):
        tags.append(str(result["pretext"]))
    front: dict[str, Any] = {"tags": tags}
    if license is not None:
        front["license"] = license
    if to in ("transformers", "timm"):
        front["library_name"] = to
    name = repo.rpartition("/")[2]
    about = f"A {result['backbone']} backbone"
    about += f", pretrained with {result['pretext']}" if result.get("pretext") else ""
    inputs = "sentences" if (record.folder / TOKENIZER).is_file() else "images"
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {name}\n",
        f"{about}. Written by sslrun from the run {record.name}.\n",
        "## Use\n\nDownload this repository into a folder, then:\n",
        "```python\nimport sslrun\n\n"
        f'backbone = sslrun.load("{name}")\nfeatures = backbone({inputs})\n```\n',
        _describe_kept(kept) if kept else "",
        f"The other files are for {to}.\n" if to else "",
        _results(record),
        f"## Recipe\n\n```yaml\n{_dump(recipe)}```\n",
        f"## Environment\n\n{_environment(record.environment)}",
    ]
    return "\n".join(part for part in parts if part)


def _describe_kept(kept: KeptModules) -> str:
    """Say what the pretext task kept beside the backbone."""
    names = " and ".join(f"`{name}`" for name in kept.modules)
    return (
        f"`{KEPT}` holds what the pretext task {kept.pretext} kept beside the backbone: {names}. "
        "Give this folder to `sslrun` with `--from`, and tasks that read it find it.\n"
    )


def _results(record: RunRecord) -> str:
    """The table of the evaluations that started from a run; or of the run itself."""
    beside = find_records(record.folder.parent)
    evaluations = [
        other
        for other in beside
        if other.is_evaluation
        and (
            other.folder == record.folder
            or (other.pretraining is not None and other.pretraining.folder == record.folder)
        )
    ]
    if not evaluations:
        return "## Results\n\nThere are no evaluations of this run.\n"
    table = Table.from_records(evaluations, record.folder.parent.name)
    return f"## Results\n\n{to_markdown(table)}"


def _dump(mapping: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(mapping), sort_keys=False, allow_unicode=True)


def _environment(environment: Mapping[str, Any]) -> str:
    rows = [f"| {key} | {environment[key]} |" for key in ENVIRONMENT if environment.get(key)]
    return "\n".join(["| package or machine | |", "|---|---|", *rows]) + "\n"


def _upload(folder: Path, repo: str, private: bool) -> str:
    """Create the repository if it is missing, and upload the folder in one commit."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not reach_hub():
        raise UserError(
            f"{repo}: the hub at {constants.ENDPOINT} cannot be reached; write the folder with "
            "--dry-run --output FOLDER, and upload it elsewhere"
        )
    api = HfApi(endpoint=constants.ENDPOINT)
    try:
        address = str(api.create_repo(repo, private=private or None, exist_ok=True))
        api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Upload a backbone of sslrun"
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        cause = " ".join(str(error).split())[:200]
        raise UserError(f"{repo}: the hub refused: {cause}; log in with `hf auth login`") from None
    return address
