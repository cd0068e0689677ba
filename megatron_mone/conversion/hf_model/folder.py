"""The code that stands in an exported folder: what it is called there, and whether it is ours."""

from pathlib import Path

CODE = ("configuration_mone.py", "modeling_mone.py")
AUTO_MAP = {
    "AutoConfig": "configuration_mone.MoNEConfig",
    "AutoModel": "modeling_mone.MoNEModel",
    "AutoModelForCausalLM": "modeling_mone.MoNEForCausalLM",
}
"""Of config.json: where transformers finds the classes (trust_remote_code)."""
_HERE = Path(__file__).parent


def copy_code(folder: Path) -> None:
    """Put the model's two files into a folder.

    Raises:
        OSError: what the system says.
    """
    for name in CODE:
        (folder / name).write_bytes((_HERE / name).read_bytes())


def has_own_code(folder: Path) -> bool:
    """Whether a folder's two files are those of this package, byte for byte."""
    return all(
        (folder / name).is_file() and (folder / name).read_bytes() == (_HERE / name).read_bytes()
        for name in CODE
    )
