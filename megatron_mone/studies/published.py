"""The studies under docs/studies: copied there, their pages made of their numbers, and the README's
table of claims. May touch: docs/studies, README.md.
"""

from collections.abc import Sequence
from pathlib import Path

from megatron_mone.common.files import atomic_write
from megatron_mone.common.marked_text import with_parts
from megatron_mone.common.places import ROOT
from megatron_mone.studies.catalogue import MODULES, study_of
from megatron_mone.studies.claims import CLAIMS
from megatron_mone.studies.command import PAGE, RESULTS, write_page
from megatron_mone.studies.document import StudyResults

FOLDER = ROOT / "docs" / "studies"
README = ROOT / "README.md"


def publish(folders: Sequence[Path]) -> None:
    """Copy studies to docs/studies, make all pages there anew, and the README's table.

    Args:
        folders: of studies, each with a results.json.

    Raises:
        ValueError: one line; a folder holds no results.
    """
    for folder in folders:
        results = StudyResults.read(folder / RESULTS, "give the folder of a study that has ended")
        target = FOLDER / results.study
        target.mkdir(parents=True, exist_ok=True)
        atomic_write(target / RESULTS, (folder / RESULTS).read_bytes())
    for name, results in published().items():
        write_page(study_of(name), results, FOLDER / name)
        for picture in (*(FOLDER / name).glob("*.png"), *(FOLDER / name).glob("*.svg")):
            picture.unlink()  # the page holds them
    atomic_write(README, with_claims(README.read_text(encoding="utf-8")).encode())


def published() -> dict[str, StudyResults]:
    """Study -> its published results."""
    files = {name: FOLDER / name / RESULTS for name in MODULES}
    return {
        name: StudyResults.read(file, "publish the study again")
        for name, file in files.items()
        if file.is_file()
    }


def with_claims(text: str) -> str:
    """A text with its table of claims written anew."""
    lines = ["| claim or question | what was found | how sure |", "| --- | --- | --- |"]
    found = published()
    for claim in CLAIMS:
        if claim.study in found:
            results = found[claim.study]
            lines.append(
                f"| {claim.words} ([{claim.study}](docs/studies/{claim.study}/{PAGE})) | "
                f"{claim.found(results)} | {claim.sure(results)} |"
            )
    return with_parts(text, "claims", lambda of: "\n".join(lines))
